"""Spectral starts and message passing against dense oracles, and what they find near p = d n."""

import math

import pytest
import torch

from paperlib import RandomFeatures, compare, fit_min_norm, photographs, reconstruct, sphere
from paperlib.known_samples import WithoutKnown
from paperlib.message_passing import DAMPING, SLOWER, MessagePassing, whiten
from paperlib.signs import turned_round
from paperlib.spectral_start import SpectralStart


def problem(n=4, d=30, ratio=2.0, name="relu", seed=0, C=1, dtype=torch.float32):
    model = RandomFeatures(d, round(ratio * d * n), name, seed=seed, dtype=dtype, block_rows=1024)
    data = sphere(n, d, seed, dtype=dtype)
    generator = torch.Generator().manual_seed(500 + seed)
    labels = torch.randn(n, C, generator=generator, dtype=torch.float64).to(dtype)
    return model, fit_min_norm(model, data.X, labels), data


def second_moment_coefficient(model):
    return math.sqrt(2) * model.activation.hermite_coefficients(2)[2]


def passing(model, theta, n, *, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return MessagePassing(model, theta, n, generator=generator, **options)


# The spectral start


@pytest.mark.parametrize("C", [1, 3])
def test_second_moments_are_those_of_the_residual_of_a_regression_on_V(C):
    model, theta, _ = problem(C=C, ratio=10, dtype=torch.float64)
    V = model.V
    rest = theta - (torch.linalg.lstsq(V, theta.T).solution.T) @ V.T
    rest = rest - rest.mean(1, keepdim=True)
    expected = torch.stack([(V.T * row) @ V for row in rest]) * model.d / model.p
    M, scale = SpectralStart(model, 1.0, dtype=torch.float64).second_moments(theta)
    torch.testing.assert_close(M, expected, rtol=1e-9, atol=1e-12)
    assert float(scale) == pytest.approx(float(rest.square().mean().sqrt()) * (30 / model.p) ** 0.5)


@pytest.mark.parametrize("C", [1, 2])
def test_overlap_and_coefficients_are_about_what_the_spectrum_promises(C):
    model, theta, data = problem(8, 100, 4.0, C=C)
    start = SpectralStart(model, second_moment_coefficient(model), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    U, overlap, alpha = start.directions(theta, 4, generator=generator)
    truth = data.X / data.X.norm(dim=1, keepdim=True)
    squares = (U @ truth.T).square()[0]
    found = int(squares.argmax())
    assert float(squares[found]) == pytest.approx(float(overlap[0]), abs=0.2)
    weights = theta @ torch.linalg.pinv(model.features(data.X))  # (C, n)
    assert float(alpha[0] @ weights[:, found]) > 0
    norm = weights[:, found].norm()
    assert float((alpha[0] - weights[:, found]).norm() / norm) < 0.4


# Message passing


def test_whitened_outputs_are_orthonormal_and_independent():
    Y = torch.randn(3, 200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Z = whiten(torch.cat([Y, Y[:1] - 2 * Y[1:2]]))
    assert Z.shape == (3, 200)
    torch.testing.assert_close(Z @ Z.T / 200, torch.eye(3, dtype=Z.dtype), rtol=0, atol=1e-9)
    torch.testing.assert_close(Z @ torch.linalg.pinv(Y) @ Y, Z, rtol=1e-8, atol=1e-9)


def test_scores_against_a_dense_posterior():
    """The belief about z of one sample given theta: a fine grid and Bayes's rule."""
    model, theta, _ = problem(2, 20, 3.0)
    belief = passing(model, theta, 2)
    V = model.V
    omega = belief.X @ V.T
    omega_L = belief.L @ V.T
    tau, alpha = belief.tau, belief.alpha[:, 0]
    t = torch.linspace(-6, 6, 2001)
    z = omega[:, :, None] + tau.sqrt()[:, None, None] * t
    f = torch.relu(z) - 0.5 * z
    prior = torch.softmax(-t.square() / 2, 0)
    mean, variance = f @ prior, f.square() @ prior - (f @ prior).square()
    others = belief.y - omega_L - (alpha @ mean - alpha[:, None] * mean)
    width = alpha.flip(0).square()[:, None] * variance.flip(0) + float(belief.L_cov) + 1e-9
    width = width + 0.5 * (alpha.square() * tau)[:, None] * belief.channel.spacing**2
    misses = others[:, :, None] - alpha[:, None, None] * f
    density = torch.softmax(prior.log() - misses.square() / (2 * width[:, :, None]), -1)
    expected = (density @ t) / tau.sqrt()[:, None]
    belief.pace = 1 / DAMPING  # the new value alone
    belief.channel.even = False  # none is turned round
    belief.step(learn_alpha=False)
    torch.testing.assert_close(belief.g, expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("name", "C"), [("relu", 1), ("relu", 2)])
def test_most_samples_are_found_where_descent_finds_none(name, C):
    """About 1.5 numbers per unknown: random starts of descent find almost nothing here."""
    found = {"messages": 0, "random": 0}
    for seed in range(2):
        model, theta, data = problem(6, 50, 1.5 / C + 0.1 * (C > 1), name, seed, C)
        for start in found:
            record = reconstruct(
                model, theta, 6, start=start, restarts=2, seed=seed, progress=False
            )
            found[start] += compare(data.X, record.samples).recovered()
    assert found["messages"] >= 10
    assert found["messages"] > found["random"]


def test_resume_finds_the_sample_with_a_tiny_coefficient():
    """Five of six are right, the sixth has 2% of the weight: the rest of theta gives it away."""
    model = RandomFeatures(50, 450, seed=0)
    X = sphere(6, 50, 0).X
    alpha = torch.tensor([[0.44, -0.58, 0.3, 0.6, 0.15, -0.02]])
    theta = alpha @ model.features(X)
    candidates = torch.cat([X[:5], sphere(1, 50, 9).X])
    belief = passing(model, theta, 6)
    belief.resume(candidates)
    assert int(belief.tau.argmax()) == 5
    beliefs = belief.run(300)
    assert compare(X, beliefs.X).recovered(0.5, "up_to_sign") == 6


def test_what_was_projected_off_is_given_back():
    """At the truth, what the known samples' span took of the unknown ones' features is c . Q."""
    model = RandomFeatures(20, 240, "relu+tanh", seed=0)
    X = sphere(5, 20, 0).X
    rest = WithoutKnown(model, X[2:])
    alpha = torch.tensor([[0.8, -0.6]])
    left = rest.off(alpha @ model.features(X[:2]))
    belief = passing(rest, left, 2)
    belief.X, belief.tau = X[:2].clone(), torch.full((2,), 1e-6)
    belief.alpha = alpha.T / left.square().mean().sqrt()
    belief.L = belief.mu * belief.alpha.T @ belief.X
    belief._give_back()
    Q = rest.projected_off
    expected = -(Q @ model.features(X[:2]).T) @ belief.alpha
    torch.testing.assert_close(belief.c, expected, rtol=1e-2, atol=2e-2)
    belief.pace = 1 / DAMPING  # the new value alone
    assert belief.step(learn_alpha=False) < 1e-4
    torch.testing.assert_close(belief.c, expected, rtol=1e-2, atol=2e-2)
    belief.c = torch.zeros_like(belief.c)
    assert belief.step(learn_alpha=False) > 1e-3


@pytest.mark.parametrize("on_sphere", [True, False])
def test_means_are_as_long_as_points_on_the_sphere_leave_them(on_sphere):
    model, theta, data = problem()
    belief = passing(model, theta, 4)
    belief.pace = 1 / DAMPING  # the new value alone
    for _ in range(3):
        belief.step(learn_alpha=False, on_sphere=on_sphere)
        lengths = belief.X.square().sum(1) / data.d
        same = torch.allclose(lengths, 1 - belief.tau, rtol=1e-4, atol=1e-5)
        assert same == on_sphere


def test_two_photographs_that_are_nearly_opposite_are_told_apart():
    """Their even features are nearly one; a start with free lengths finds both."""
    data = photographs(10, size=16, grey=True, seed=5)
    directions = torch.nn.functional.normalize(data.X)
    assert (directions @ directions.T).min() < -0.9
    model = RandomFeatures(256, 5120, seed=5)
    theta = fit_min_norm(model, data.X, data.y).reshape(1, -1)
    options = {"start": "messages", "seed": 5, "progress": False, "max_steps": 100}
    record = reconstruct(model, theta, 10, restarts=3, **options)
    assert record.explained
    assert compare(data.X, record.samples).recovered() == 10


def believed(name, signs):
    """Message passing that knows six samples but for the signs of some, and their weights."""
    model = RandomFeatures(50, 600, name, seed=0)
    X = sphere(6, 50, 0).X
    alpha = torch.tensor([[0.44, -0.58, 0.3, 0.6, 0.15, -0.25]])
    theta = alpha @ model.features(X)
    belief = passing(model, theta, 6)
    belief.tau = torch.full((6,), 0.02)
    scale = (1 - belief.tau[:, None]).sqrt()
    belief.X = X * torch.tensor(signs)[:, None] * scale
    belief.alpha = alpha.T * belief.y[0, 0] / theta[0, 0]
    belief.L = belief.mu * belief.alpha.T @ X  # as theta shows it
    belief.L_cov *= 1e-3
    return belief, X


@pytest.mark.parametrize(
    "signs", [[1.0] * 6, [-1.0, 1, 1, 1, 1, 1], [1.0, -1, 1, 1, -1, 1], [-1.0] * 6]
)
def test_beliefs_of_the_wrong_sign_are_turned_round(signs):
    belief, X = believed("relu", signs)
    cosines = torch.nn.functional.cosine_similarity
    assert (cosines(belief.X, X) * torch.tensor(signs) > 0.99).all()
    belief.step(learn_alpha=False)
    assert (cosines(belief.X, X) > 0.9).all()


def test_rows_are_turned_while_that_raises_the_likelihood():
    """Against the density of torch's multivariate normal distribution."""
    generator = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    X, weights, root = new(7, 30), new(7, 2), new(2, 2)
    covariance = root @ root.T + 0.1 * torch.eye(2, dtype=torch.float64)
    wrong = torch.tensor([True, False, True, False, False, False, True])
    truth = torch.where(wrong[:, None], -X, X)
    observed = weights.T @ truth + 0.1 * new(2, 30)
    normal = torch.distributions.MultivariateNormal(torch.zeros_like(covariance[0]), covariance)

    def likelihood(turned):
        return float(normal.log_prob((observed - weights.T @ turned).T).sum())

    found = turned_round(X, weights, observed, covariance, least=5.0)
    assert torch.equal(found, wrong)
    # A turn is made when it raises the likelihood by just more than what is asked, and only then.
    single = truth.clone()
    single[3] = -single[3]
    gain = likelihood(truth) - likelihood(single)
    assert bool(turned_round(single, weights, observed, covariance, least=0.999 * gain)[3])
    assert not turned_round(single, weights, observed, covariance, least=1.001 * gain).any()


def test_where_the_features_tell_the_sign_no_belief_is_turned_round():
    belief, X = believed("relu+tanh", [-1.0, 1, 1, 1, 1, 1])
    assert not belief.channel.even
    belief.step(learn_alpha=False)
    assert torch.nn.functional.cosine_similarity(belief.X, X)[0] < 0


def test_equal_seeds_give_equal_beliefs():
    model, theta, _ = problem()
    first, again, other = (passing(model, theta, 4, seed=s).run(5) for s in (1, 1, 2))
    assert torch.equal(first.X, again.X) and first.history == again.history
    assert not torch.equal(first.X, other.X)


def test_starts_by_message_passing_need_a_second_moment():
    model, theta, _ = problem(name="tanh")
    with pytest.raises(ValueError, match="second moment"):
        reconstruct(model, theta, 4, start="messages", progress=False)
    with pytest.raises(ValueError, match="start must be one of"):
        reconstruct(model, theta, 4, start="spectral", progress=False)


def test_below_the_threshold_and_on_request_starts_are_random():
    for ratio, start in ((0.8, "auto"), (1.5, "random")):
        model, theta, _ = problem(ratio=ratio)
        found = reconstruct(model, theta, 4, start=start, restarts=2, max_steps=3, progress=False)
        assert "message passing" not in {stage["stage"] for stage in found.stages}


@pytest.mark.parametrize("overshoot", [9.0, math.inf, math.nan])
def test_updates_that_overshoot_are_taken_back_and_slowed(monkeypatch, overshoot):
    model, theta, _ = problem()
    belief = passing(model, theta, 4)
    step, shares = MessagePassing.step, iter([0.5, 0.4, 0.3, overshoot, 0.35])
    seen = []

    def rising(self, **options):
        seen.append(self.X.clone())
        step(self, **options)
        return next(shares)

    monkeypatch.setattr(MessagePassing, "step", rising)
    beliefs = belief.run(5)
    assert beliefs.history == [0.5, 0.4, 0.3, 0.3, 0.35] and beliefs.ended == "step limit"
    assert torch.equal(seen[4], seen[2]) and not torch.equal(seen[3], seen[2])
    assert belief.pace == SLOWER
