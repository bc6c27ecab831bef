import math

import pytest
import torch

from paperlib.compare import compare
from paperlib.data import digits, sphere
from paperlib.gradient_descent import gradient_descent, top_curvature
from paperlib.losses import loss_named
from paperlib.min_norm import fit_min_norm
from paperlib.networks import ResNet, TwoLayer, VisionTransformer
from paperlib.projection import projection_loss
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import reconstruct
from paperlib.training import train, train_last_layer


def problem(n=5, d=12, p=300, **options):
    data = sphere(n, d, dtype=torch.float64)
    return RandomFeatures(d, p, dtype=torch.float64, **options), data.X, data.y.sign()


def one_hot(n, C):
    return torch.nn.functional.one_hot(torch.arange(n) % C, C).double()


def test_squared_loss_on_the_last_layer_ends_at_the_minimum_norm_fit():
    model, X, y = problem()
    theta_0 = torch.randn(1, model.p, dtype=X.dtype) / model.p**0.5
    run = train_last_layer(model, X, y, theta_0=torch.nn.Parameter(theta_0), target=1e-22)
    assert not run.theta.requires_grad
    assert run.reached and run.loss <= 1e-22
    fitted = fit_min_norm(model, X, y, theta_0=torch.nn.Parameter(theta_0))
    assert not fitted.requires_grad
    torch.testing.assert_close(run.theta, fitted, rtol=1e-7, atol=1e-10)
    assert run.residual_at_truth < 1e-20 and run.drift == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_descent_in_the_span_takes_the_same_steps_as_on_theta(momentum):
    model, X, y = problem(p=40)
    phi = model.features(X)
    generator = torch.Generator().manual_seed(7)
    start = torch.randn(2, 40, dtype=X.dtype, generator=generator) * 0.1
    labels = torch.stack([y, -y], dim=1)
    for name in ("squared", "logistic"):
        loss = loss_named(name)
        theta = start.clone().requires_grad_()
        options = {"target": 1e-30, "max_steps": 8, "momentum": momentum, "step_scale": 1.0}
        direct = gradient_descent(
            lambda theta=theta, loss=loss: loss.value(phi @ theta.T, labels), [theta], **options
        )
        run = train_last_layer(
            model,
            X,
            labels,
            loss=name,
            theta_0=start,
            target=1e-30,
            max_steps=8,
            momentum=momentum,
        )
        assert run.steps == direct.steps == 8 and not run.reached
        # The two measure the curvature from different random starts, so steps differ by percents.
        assert run.loss == pytest.approx(direct.loss, rel=0.2)
        inside = projection_loss(model, theta.detach() - start, X)
        assert float(inside) < 1e-20 and run.residual_at_truth < 1e-20


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        ("logistic", torch.tensor([1.0, -1, 1, 1, -1])),
        ("cross-entropy", torch.tensor([0, 1, 2, 0, 1])),
        ("cross-entropy", one_hot(5, 3)),
    ],
)
def test_classification_losses_reach_the_target_on_the_last_layer(loss, labels):
    model, X, _ = problem()
    run = train_last_layer(model, X, labels, loss=loss)
    assert run.reached and run.loss <= 1e-7 and run.residual_at_truth < 1e-20
    f = model.features(X) @ run.theta.T
    if loss == "logistic":
        value = torch.log1p(torch.exp(-labels.double() * f[:, 0])).mean()
    else:
        right = labels if labels.ndim == 1 else labels.argmax(1)
        value = torch.nn.functional.cross_entropy(f, right)
        assert f.shape == (5, 3)
    assert float(value) == pytest.approx(run.loss, rel=1e-6)
    steps = [record["step_size"] for record in run.history]
    assert steps[-1] > 100 * steps[0]  # the curvature falls with the loss


@pytest.mark.parametrize("loss", ["squared", "logistic"])
def test_labels_of_a_whole_number_dtype_are_classes_for_cross_entropy_alone(loss):
    model, X, y = problem(p=40)
    one, other = (
        train_last_layer(model, X, labels, loss=loss, max_steps=3) for labels in (y, y.long())
    )
    assert one.theta.shape == (1, 40) and torch.equal(one.theta, other.theta)


def test_losses_keep_their_digits_near_zero():
    f, y = torch.tensor([[30.0, 0.0]]), torch.tensor([[1.0, 0.0]]).double()
    expected = torch.exp(torch.tensor(-30.0, dtype=torch.float64))
    torch.testing.assert_close(loss_named("cross-entropy").value(f, y), expected)
    torch.testing.assert_close(loss_named("logistic").value(f[:, :1], y[:, :1]), expected)
    f = torch.randn(4, 3, dtype=torch.float64)
    torch.testing.assert_close(
        loss_named("cross-entropy").value(f, one_hot(4, 3)),
        torch.nn.functional.cross_entropy(f, torch.arange(4) % 3),
    )
    torch.testing.assert_close(
        loss_named("squared").value(f, one_hot(4, 3)), ((f - one_hot(4, 3)) ** 2).mean()
    )


def test_curvature_is_the_largest_eigenvalue_of_the_hessian():
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    A = torch.diag(torch.tensor([7.0, 3, 2, 1, 0.5, 0.1], dtype=torch.float64))
    value, direction = top_curvature(lambda: 0.5 * w @ A @ w, [w])
    assert value == pytest.approx(7.0, rel=1e-4)
    again, _ = top_curvature(lambda: 0.5 * w @ A @ w, [w], direction, iterations=2)
    assert 0 <= 7.0 - again <= 7.0 - value + 1e-12


def test_the_loss_never_rises_even_where_the_curvature_changes():
    w = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)
    run = gradient_descent(
        lambda: (w**4).sum() + torch.cosh(3 * w).sum() - 2,
        [w],
        target=1e-12,
        max_steps=5000,
        momentum=0.9,
    )
    losses = [record["loss"] for record in run.history]
    assert run.status == "converged"
    assert all(b <= a for a, b in zip(losses, losses[1:], strict=False))


def test_a_target_out_of_reach_ends_and_says_so():
    model, X, y = problem()
    X, y = torch.cat([X, X[:1]]), torch.cat([y, -y[:1]])  # one sample with both labels
    run = train_last_layer(model, X, y, max_steps=2000)
    assert not run.reached and "not trained" in run.status and "1e-07" in run.status
    assert run.loss > 0.1


NETWORKS = {
    "two layers": lambda C: TwoLayer(64, 500, C),
    "residual": lambda C: ResNet((8, 8), 12, C, blocks=1),
    "transformer": lambda C: VisionTransformer((8, 8), 24, C, depth=1),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_all_layers_reach_the_target(name):
    data = digits(4, labels="one-hot", seed=0)
    network = NETWORKS[name](10)
    start = {k: v.clone() for k, v in network.state_dict().items()}
    run = train(network, data.X, data.y, max_steps=20_000, momentum=0.9)
    assert run.reached, run.status
    assert float((network(data.X) - data.y).square().mean().detach()) == pytest.approx(
        run.loss, rel=1e-2
    )
    assert torch.equal(run.theta, network.head.weight - start["head.weight"])
    moved = [k for k, v in network.state_dict().items() if not torch.equal(v, start[k])]
    assert len(moved) > 1 and "head.weight" in moved and "theta_0" not in moved
    assert 0 < run.drift < 1
    truth = float(projection_loss(network.feature_map(), run.theta, data.X))
    assert run.residual_at_truth == pytest.approx(truth, rel=1e-6) and truth > 1e-8


@pytest.mark.parametrize("name", NETWORKS)
def test_last_layer_alone_leaves_the_others_and_has_no_residual(name):
    data = digits(4, seed=0)
    network = NETWORKS[name](1)
    start = {k: v.clone() for k, v in network.state_dict().items()}
    run = train(network, data.X, data.y, layers="last")
    assert run.reached and run.residual_at_truth < 1e-10
    moved = [k for k, v in network.state_dict().items() if not torch.equal(v, start[k])]
    assert moved == ["head.weight"]
    value = (network(data.X)[:, 0] - data.y).square().mean().detach()
    assert float(value) == pytest.approx(run.loss, rel=0.05)
    fitted = fit_min_norm(run.features, data.X, data.y, theta_0=network.theta_0)
    assert float((run.theta - fitted).norm() / fitted.norm()) < 1e-2


def test_wider_networks_drift_less():
    data = digits(4, labels="one-hot", seed=0)
    runs = [train(TwoLayer(64, width, 10), data.X, data.y) for width in (100, 3200)]
    assert all(run.reached for run in runs)
    assert runs[1].drift < 0.4 * runs[0].drift
    assert runs[1].residual_at_truth < 0.1 * runs[0].residual_at_truth


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_in_the_span_of_the_data_takes_the_same_steps(momentum):
    data = digits(5, labels="one-hot", seed=0, dtype=torch.float64)
    direct, spanned = (TwoLayer(64, 60, 10, dtype=torch.float64) for _ in range(2))
    options = {"target": 1e-30, "max_steps": 8, "momentum": momentum}
    trace = gradient_descent(
        lambda: (direct(data.X) - data.y).square().mean(),
        list(direct.parameters()),
        step_scale=0.5,
        **options,
    )
    run = train(spanned, data.X, data.y, step_scale=0.5, **options)
    # The two measure the curvature from different random starts, so steps differ by percents.
    assert run.steps == trace.steps == 8
    assert run.loss == pytest.approx(trace.loss, rel=0.2)
    start = TwoLayer(64, 60, 10, dtype=torch.float64).body[0].weight.detach()
    moves = [network.body[0].weight.detach() - start for network in (direct, spanned)]
    assert float((moves[0] - moves[1]).norm() / moves[0].norm()) < 0.05
    inside = data.X.T @ torch.linalg.pinv(data.X.T)  # projector on span{x_i}
    assert torch.allclose(moves[1] @ inside, moves[1], atol=1e-12)
    value = (spanned(data.X) - data.y).square().mean()
    assert float(value.detach()) == pytest.approx(run.loss, rel=1e-9)


def test_training_that_is_interrupted_leaves_both_layers_as_they_were_then():
    data = digits(5, labels="one-hot", seed=0, dtype=torch.float64)
    network = TwoLayer(64, 60, 10, dtype=torch.float64)
    with pytest.raises(KeyboardInterrupt), network.in_span(data.X) as (trained, rows):
        with torch.no_grad():
            for weight in trained.parameters():
                weight += 0.1
            outputs = trained(rows)
        raise KeyboardInterrupt
    torch.testing.assert_close(network(data.X), outputs)


def test_a_frozen_first_layer_stays_as_it_is():
    data = digits(5, labels="one-hot", seed=0)
    network = TwoLayer(64, 60, 10)
    network.body[0].weight.requires_grad_(False)
    before = network.body[0].weight.clone()
    run = train(network, data.X, data.y, target=1e-30, max_steps=5)
    assert torch.equal(network.body[0].weight, before) and run.drift == 0
    assert bool(run.theta.any())


def test_more_samples_than_dimensions_train_without_a_span():
    data = digits(70, labels="one-hot", seed=0)
    network = TwoLayer(64, 20, 10)
    with network.in_span(data.X) as (trained, rows):
        assert trained is network and rows is data.X


def test_cross_entropy_through_all_layers():
    data = digits(4, labels="one-hot", seed=0)
    run = train(TwoLayer(64, 400, 10), data.X, data.y, loss="cross-entropy")
    assert run.reached and run.options["loss"] == "cross-entropy"


def test_digits_come_back_from_a_two_layer_network_trained_on_both_layers():
    n = 6
    data = digits(n, labels="one-hot", seed=0)
    run = train(TwoLayer(64, 10 * 64 * n // 10, 10), data.X, data.y)
    found = reconstruct(run.features, run.theta, n, progress=False, tolerance=1e-3)
    assert compare(data.X, found.samples).recovered(0.05) == n


def test_shares_are_what_the_loss_rises_by_without_a_sample():
    data = digits(4, labels="one-hot", seed=0, dtype=torch.float64)
    run = train(TwoLayer(64, 300, 10, dtype=torch.float64), data.X, data.y)
    for i in range(4):
        others = [j for j in range(4) if j != i]
        without = float(projection_loss(run.features, run.theta, data.X[others]))
        assert float(run.shares[i]) == pytest.approx(without - run.residual_at_truth, rel=1e-6)
    assert float(run.shares.min()) > run.residual_at_truth


def test_labels_and_inputs_that_do_not_fit_are_refused():
    model, X, y = problem()
    network = TwoLayer(12, 20, 1, dtype=torch.float64)
    cases = [
        (lambda: train(model, X, y), TypeError, "must be a paperlib Network"),
        (lambda: train(network, X, y, layers="first"), ValueError, "layers must be one of"),
        (lambda: train(network, X, y, loss="hinge"), ValueError, "unknown loss 'hinge'"),
        (lambda: train(network, X.float(), y), TypeError, "dtypes are not mixed"),
        (lambda: train(network, 2 * X, y), ValueError, "sphere of radius"),
        (lambda: train(network, X, y[:3]), ValueError, "must have 5 rows"),
        (lambda: train(network, X, y.tolist()), TypeError, "torch tensor, got list"),
        (lambda: train(network, X, one_hot(5, 3)), ValueError, r"\(n, 1\) for 1 outputs"),
        (lambda: train(network, X, y / 0), ValueError, "finite"),
        (lambda: train(network, X, y, momentum=1.0), ValueError, "below 1"),
        (lambda: train(network, X, y, step_scale=2.0), ValueError, "below 2"),
        (lambda: train(network, X, y, target=0), ValueError, "target must be above 0"),
        (lambda: train(network, X, 2 * y, loss="logistic"), ValueError, r"labels -1 and \+1"),
        (lambda: train(network, X, y, loss="cross-entropy"), ValueError, "at least 2 outputs"),
        (
            lambda: train_last_layer(model, X, one_hot(5, 3) / 2, loss="cross-entropy"),
            ValueError,
            "one-hot",
        ),
        (
            lambda: train_last_layer(
                model, X, torch.tensor([0, 1, 2, 3, 4]), outputs=3, loss="cross-entropy"
            ),
            ValueError,
            "classes must be 0 to 2",
        ),
    ]
    for act, error, message in cases:
        with pytest.raises(error, match=message):
            act()


def test_a_network_without_an_active_neuron_is_reported_as_not_trained():
    data = sphere(3, 5, seed=0)
    network = TwoLayer(5, 1, seed=0)
    with torch.no_grad():
        # The one neuron has input -1 at every sample: it is never active and has no gradient.
        network.body[0].weight.copy_(-torch.linalg.lstsq(data.X, torch.ones(3, 1)).solution.T)
    assert bool((data.X @ network.body[0].weight.T < 0).all())
    outcome = train(network, data.X, data.y, max_steps=20, progress=False)
    assert not outcome.reached and outcome.status.startswith("not trained")
    assert not outcome.theta.any() and not outcome.shares.any()
    assert math.isnan(outcome.residual_at_truth)
