"""The attack as a whole: what it finds, what it claims, and that it can be run again."""

import math

import pytest
import torch

from paperlib import RandomFeatures, compare, fit_min_norm, projection_loss, reconstruct, sphere


def problem(n, d, p, name="relu", seed=0, **options):
    model = RandomFeatures(d, p, name, seed=seed, **options)
    data = sphere(n, d, seed, dtype=model.dtype)
    return model, fit_min_norm(model, data.X, data.y), data


@pytest.mark.parametrize(
    ("n", "name", "ratio", "seed"),
    [(20, "relu", 10, 0), (20, "relu", 10, 1), (10, "relu+tanh", 3, 0), (10, "relu+tanh", 3, 1)],
)
def test_all_samples_come_back_with_their_signs(n, name, ratio, seed):
    """The paper's synthetic setting, d = 100, above the threshold p = d n."""
    model, theta, data = problem(n, 100, ratio * 100 * n, name, seed)
    found = reconstruct(model, theta, n, seed=seed, progress=False)
    assert compare(data.X, found.samples).recovered(1e-3) == n
    assert found.explained and found.identifiable
    assert found.loss <= 1e-10
    assert found.status.startswith("explained and identified")
    radii = found.samples.norm(dim=1) / 10
    torch.testing.assert_close(radii, torch.ones(n), rtol=1e-5, atol=0)
    # The loss that is reported is the loss of the samples that are returned.
    loss = float(projection_loss(model, theta, found.samples))
    assert found.loss == pytest.approx(loss, rel=0.5)


@pytest.mark.parametrize("name", ["tanh", "gelu", "erf", "softplus"])
def test_other_activations(name):
    model, theta, data = problem(4, 20, 1200, name)
    found = reconstruct(model, theta, 4, progress=False)
    # An odd activation leaves the sign of every sample open.
    error = "up_to_sign" if model.odd else "signed"
    assert compare(data.X, found.samples).recovered(1e-3, error) == 4


def test_float64_goes_to_the_precision_of_float64():
    model, theta, data = problem(4, 20, 800, "relu+tanh", dtype=torch.float64)
    found = reconstruct(model, theta, 4, progress=False)
    assert found.samples.dtype == torch.float64
    assert found.loss < 1e-20
    assert compare(data.X, found.samples).recovered(1e-8) == 4


def test_several_outputs():
    model = RandomFeatures(20, 400, "relu")
    data = sphere(4, 20, 0)
    labels = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 0])).float()
    theta = fit_min_norm(model, data.X, labels)
    assert theta.shape == (3, 400)
    found = reconstruct(model, theta, 4, progress=False)
    assert compare(data.X, found.samples).recovered(1e-3) == 4


@pytest.mark.parametrize("name", ["tanh", "relu+tanh"])
def test_below_the_threshold_other_data_explain_the_parameters_and_it_says_so(name):
    """p = d n / 2: found, explained, and not the training data."""
    model, theta, data = problem(5, 20, 50, name)
    found = reconstruct(model, theta, 5, progress=False)
    assert found.explained and not found.identifiable
    assert found.loss <= 1e-10
    assert compare(data.X, found.samples).recovered(0.2, "up_to_sign") == 0
    assert "explained, not identified" in found.status
    assert "not guaranteed to be the training data" in found.status


def test_a_search_that_fails_claims_nothing():
    model, theta, _ = problem(5, 20, 50, "relu")
    found = reconstruct(model, theta, 5, max_steps=2, restarts=1, progress=False)
    assert not found.explained and not found.identifiable
    assert found.status.startswith("not explained: stopped at loss")
    assert found.loss > 1e-10


@pytest.mark.parametrize("ratio", [1.5, 6])
def test_there_may_be_more_samples_than_dimensions(ratio):
    n, d = 8, 5
    model, theta, data = problem(n, d, round(ratio * d * n))
    found = reconstruct(model, theta, n, restarts=2, max_steps=20, progress=False)
    assert found.samples.shape == (n, d)
    assert "message passing" not in {stage["stage"] for stage in found.stages}
    for start in ("messages", "subspace"):
        with pytest.raises(ValueError, match="needs n <= d <= p, got n = 8, d = 5"):
            reconstruct(model, theta, n, start=start, progress=False)


def test_a_lift_that_leaves_no_equations_is_refused():
    model, theta, _ = problem(3, 30, 32)
    with pytest.raises(ValueError, match=r"spends d \+ 5 candidates = 35 .* got p = 32"):
        reconstruct(model, theta, 3, lift=True, progress=False)


def test_the_attack_does_not_depend_on_the_default_dtype():
    results = []
    for default in (torch.float32, torch.float64):
        torch.set_default_dtype(default)
        try:
            model = RandomFeatures(30, 140)  # 1.5 d n: by messages
            data = sphere(3, 30, 0, dtype=torch.float32)
            theta = fit_min_norm(model, data.X, data.y)
            results.append(reconstruct(model, theta, 3, restarts=1, progress=False))
        finally:
            torch.set_default_dtype(torch.float32)
    assert results[0].loss == results[1].loss
    assert torch.equal(results[0].samples, results[1].samples)


@pytest.mark.parametrize(
    ("name", "p", "C", "off", "identifiable"),
    [
        ("relu+tanh", 100, 1, 0, False),
        ("relu+tanh", 101, 1, 0, True),
        ("relu+tanh", 52, 2, 0, False),
        ("relu+tanh", 53, 2, 0, True),
        ("relu", 103, 1, 3, False),
        ("relu", 104, 1, 3, True),
    ],
)
def test_identifiable_counts_numbers_against_unknowns(name, p, C, off, identifiable):
    """C p numbers against n (d - 1) directions and n C coefficients; p > d n for one output.

    Features that are off at all samples are no equations.
    """
    model = RandomFeatures(20, p, name)
    theta = torch.stack([torch.linspace(0.1, 1, p) ** (c + 1) for c in range(C)])
    theta[:, :off] = 0
    found = reconstruct(model, theta, 5, max_steps=1, restarts=1, progress=False)
    assert found.identifiable == identifiable


def test_equal_seeds_give_equal_results_and_others_do_not():
    model, theta, _ = problem(4, 20, 400)
    first, again = (reconstruct(model, theta, 4, seed=3, progress=False) for _ in range(2))
    other = reconstruct(model, theta, 4, seed=4, progress=False)
    assert torch.equal(first.samples, again.samples)
    assert [h["loss"] for h in first.history] == [h["loss"] for h in again.history]
    assert (first.passes, first.loss) == (again.passes, again.loss)
    assert first.history[0]["loss"] != other.history[0]["loss"]


def test_nothing_else_is_random():
    model, theta, _ = problem(4, 20, 400)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = reconstruct(model, theta, 4, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(reconstruct(model, theta, 4, progress=False).samples, first.samples)


@pytest.mark.parametrize("solver", ["levenberg-marquardt", "published"])
def test_the_options_in_the_record_are_enough_to_run_it_again(solver):
    model, theta, _ = problem(3, 10, 300, "relu+tanh", seed=5)
    found = reconstruct(
        model, theta, 3, solver=solver, seed=7, max_steps=30, restarts=2, progress=False
    )
    options = dict(found.options)
    about = dict(options.pop("model"))
    assert about.pop("model") == "RandomFeatures"
    same = RandomFeatures(**{**about, "dtype": getattr(torch, about["dtype"])})
    again = reconstruct(same, theta, **options, progress=False)
    assert torch.equal(again.samples, found.samples)
    assert again.options == found.options
    assert again.loss == found.loss


def test_the_attack_does_not_touch_what_it_is_given():
    model, theta, _ = problem(4, 20, 400)
    before = theta.clone()
    reconstruct(model, theta, 4, progress=False)
    assert torch.equal(theta, before)


def test_the_scale_of_theta_does_not_matter():
    model, theta, data = problem(4, 20, 400)
    for scale in (1e-6, 1e6):
        found = reconstruct(model, scale * theta, 4, progress=False)
        assert compare(data.X, found.samples).recovered(1e-3) == 4


def test_one_output_may_be_a_vector():
    model, theta, _ = problem(4, 20, 400)
    flat = reconstruct(model, theta[0], 4, progress=False)
    assert torch.equal(flat.samples, reconstruct(model, theta, 4, progress=False).samples)


def test_the_record_tells_what_was_done():
    model, theta, _ = problem(4, 20, 400)
    seen = []
    callback = lambda *about: seen.append(about)  # noqa: E731
    found = reconstruct(model, theta, 4, start="random", progress=False, callback=callback)
    frame = found.history_frame()
    assert {"step", "loss", "damping", "inner", "seconds", "stage", "restart"} <= set(frame)
    assert len(seen) == len(frame)
    # The passes of reseeding and of settling signs belong to no stage.
    assert found.passes >= sum(stage["passes"] for stage in found.stages) > 0
    assert [stage["stage"] for stage in found.stages[:3]] == ["lift", "bulk", "eliminate"]
    assert found.stages[-1]["stage"] == "finish"
    assert found.stages[-1]["dtype"] == "float32"
    assert all(stage["ended"] for stage in found.stages)
    assert found.elimination_losses == sorted(found.elimination_losses, reverse=True)
    assert found.seconds > 0
    assert str(found).startswith("4 samples of dimension 20, loss")


def test_elimination_shows_the_number_of_samples():
    """With all candidates kept the loss is small; with one fewer than n samples it jumps."""
    model, theta, _ = problem(4, 20, 1600)
    losses = reconstruct(model, theta, 4, start="random", progress=False).elimination_losses
    assert len(losses) == 1 + math.ceil(1.4 * 4)
    assert losses[4] < 1e-3 * losses[3]


@pytest.mark.parametrize(("n", "d"), [(1, 20), (4, 2)])
def test_smallest_problems(n, d):
    model, theta, data = problem(n, d, 200)
    found = reconstruct(model, theta, n, progress=False)
    assert compare(data.X, found.samples).recovered(1e-3) == n


# Degenerate data


def test_a_zero_label_is_no_obstacle():
    """Its coefficient alpha is not zero: interpolation has to cancel the others there."""
    model = RandomFeatures(20, 1000)
    data = sphere(5, 20, 0)
    labels = data.y.clone()
    labels[2] = 0
    theta = fit_min_norm(model, data.X, labels)
    found = reconstruct(model, theta, 5, progress=False)
    assert compare(data.X, found.samples).recovered(1e-3) == 5


def equal_samples(same_label):
    data = sphere(5, 20, 1)
    X, y = data.X.clone(), data.y.clone()
    X[1] = X[0]
    if same_label:
        y[1] = y[0]
    return X, y


@pytest.mark.parametrize("same_label", [True, False])
def test_equal_samples_are_fitted_by_the_mean_of_their_labels(same_label):
    X, y = equal_samples(same_label)
    model = RandomFeatures(20, 1000)
    theta = fit_min_norm(model, X, y)
    outputs = (model.features(X) @ theta.T)[:, 0]
    wanted = torch.cat([y[:2].mean().expand(2), y[2:]])
    torch.testing.assert_close(outputs, wanted, rtol=1e-4, atol=1e-5)
    once = fit_min_norm(model, X[1:], wanted[1:])
    torch.testing.assert_close(theta, once, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("same_label", [True, False])
def test_equal_samples_count_once(same_label):
    """The span holds four directions. Asked for four samples, the attack finds them exactly.

    Asked for five it has one to spare: every sample still lies near a candidate, but the spare
    one is arbitrary, and may share a sample with its neighbour, each a little off.
    """
    X, y = equal_samples(same_label)
    model = RandomFeatures(20, 1000)
    theta = fit_min_norm(model, X, y)
    four = reconstruct(model, theta, 4, progress=False)
    assert compare(X[1:], four.samples).recovered(1e-3) == 4
    five = reconstruct(model, theta, 5, progress=False)
    assert five.explained
    assert float(compare(X[1:], five.samples).nearest.max()) < 0.1


def test_a_sample_with_no_weight_cannot_be_found():
    """theta holds nothing of it: the others come back, and its place is taken by anything."""
    model = RandomFeatures(20, 1000, dtype=torch.float64)
    X = sphere(5, 20, 0, dtype=torch.float64).X
    alpha = torch.tensor([[1.0, -1.0, 0.0, 0.5, 2.0]], dtype=torch.float64)
    theta = alpha @ model.features(X)
    found = reconstruct(model, theta, 5, progress=False)
    nearest = compare(X, found.samples).nearest
    assert float(nearest[[0, 1, 3, 4]].max()) < 0.1 < 0.5 < float(nearest[2])


@pytest.mark.parametrize(("start", "p", "fewest"), [("auto", 2400, 2), ("messages", 900, 3)])
def test_restarts_end_when_independent_ones_agree(start, p, fewest):
    # Noise on the parameters that no sample can explain: the tolerance is out of reach.
    data = sphere(6, 40, seed=3)
    model = RandomFeatures(40, p, seed=5)
    theta = fit_min_norm(model, data.X, data.y)
    noise = torch.randn(theta.shape, generator=torch.Generator().manual_seed(1))
    noisy = theta + 0.02 * theta.norm() / noise.norm() * noise
    found = reconstruct(model, noisy, 6, seed=1, start=start, restarts=8, progress=False)
    assert not found.explained
    assert "independent restarts found the same samples" in found.status
    assert fewest <= 1 + max(stage["restart"] for stage in found.stages) < 8
    assert compare(data.X, found.samples).recovered(0.1) >= 5


def test_dependent_outputs_count_once():
    # Twice the same output is one release: 2 p numbers, but only p different ones.
    data = sphere(6, 40, seed=3)
    model = RandomFeatures(40, 200, seed=5)
    theta = fit_min_norm(model, data.X, data.y)
    twice = torch.cat([theta, 2 * theta])
    options = {"seed": 1, "restarts": 1, "max_steps": 2, "progress": False}
    assert not reconstruct(model, twice, 6, **options).identifiable
    other = fit_min_norm(model, data.X, data.y.flip(0))
    assert reconstruct(model, torch.cat([theta, other]), 6, **options).identifiable
