"""Gradient features against closed forms and dense autograd, in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from paperlib import (
    GradientFeatures,
    TwoLayer,
    VisionTransformer,
    compare,
    fit_min_norm,
    projection_loss,
    reconstruct,
    sphere,
)
from paperlib.gradient_features import smooth_relus

D = 6


def two_layer(outputs=1, activation="relu", width=7):
    return TwoLayer(D, width, outputs, activation=activation, seed=3, dtype=torch.float64)


def deep(outputs=2):
    torch.manual_seed(1)
    layers = [nn.Linear(D, 5), nn.Softplus(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, outputs)]
    return nn.Sequential(*layers).double()


def points(n=4, seed=0):
    return sphere(n, D, seed=seed, dtype=torch.float64).X


def closed_form(network, X, slope):
    """Gradients of w2 . relu(W1 x): w2 * slope(W1 x) x^T, then relu(W1 x)."""
    W1, w2 = network.body[0].weight.detach(), network.head.weight.detach()[0]
    U = X @ W1.T
    first = (w2 * slope(U))[:, :, None] * X[:, None, :]
    return torch.cat([first.flatten(1), torch.relu(U)], dim=1)


def dense_gradient(network, x, weights):
    """d (weights . f(x)) / d parameters by one backward pass, (p,)."""
    value = (network(x[None]).reshape(-1) * weights).sum()
    grads = torch.autograd.grad(value, list(network.parameters()), create_graph=True)
    return torch.cat([g.reshape(-1) for g in grads])


def test_two_layer_closed_form():
    network, X = two_layer(), points()
    features = GradientFeatures(network, D)
    assert features.p == 7 * (D + 1) and features.outputs == 1
    expected = closed_form(network, X, lambda U: (U > 0).double())
    torch.testing.assert_close(features.features(X), expected)


@pytest.mark.parametrize("weights", [[1.0, 0.0], [0.3, -2.0]])
def test_features_and_products_are_those_of_dense_autograd(weights):
    network, X = deep(), points()
    v = torch.tensor(weights, dtype=torch.float64)
    features = GradientFeatures(network, D, weights=weights, chunk=3)
    Phi = torch.stack([dense_gradient(network, x, v).detach() for x in X])
    torch.testing.assert_close(features.features(X), Phi)
    J = [torch.autograd.functional.jacobian(lambda z: dense_gradient(network, z, v), x) for x in X]
    dX, W = torch.randn_like(X), torch.randn(len(X), features.p, dtype=torch.float64)
    push = torch.stack([Ji @ dx for Ji, dx in zip(J, dX, strict=True)])
    pull = torch.stack([Ji.T @ w for Ji, w in zip(J, W, strict=True)])
    torch.testing.assert_close(features.jvp(X, dX), push)
    torch.testing.assert_close(features.vjp(X, W), pull)


def test_combine_is_the_weighted_sum_of_gradients_of_all_outputs():
    network, X = deep(), points()
    A = torch.randn(len(X), 2, dtype=torch.float64, requires_grad=True)
    moving = X.clone().requires_grad_()
    features = GradientFeatures(network, D, weights=[1.0, 1.0])
    expected = sum(dense_gradient(network, x, a) for x, a in zip(moving, A, strict=True))
    got = features.combine(moving, A)
    torch.testing.assert_close(got, expected)
    w = torch.randn(features.p, dtype=torch.float64)
    for one, other in zip(
        torch.autograd.grad(got @ w, (moving, A)),
        torch.autograd.grad(expected @ w, (moving, A)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("exact_value", [True, False])
def test_smoothed_slope_its_derivative_and_the_value(exact_value):
    network, X = two_layer(), points()
    s = 3.0
    smooth = GradientFeatures(network, D).smoothed(s, exact_value=exact_value)
    expected = closed_form(network, X, lambda U: torch.sigmoid(s * U))
    W1, w2 = network.body[0].weight.detach(), network.head.weight.detach()[0]
    if not exact_value:
        expected[:, 7 * D :] = nn.functional.softplus(s * (X @ W1.T)) / s
    torch.testing.assert_close(smooth.features(X), expected)

    def surrogate(x):  # the value's slope is the sigmoid too
        u = W1 @ x
        slope = torch.sigmoid(s * u)
        return torch.cat([((w2 * slope)[:, None] * x).flatten(), nn.functional.softplus(s * u) / s])

    J = torch.autograd.functional.jacobian(surrogate, X[0])
    w = torch.randn(1, smooth.p, dtype=torch.float64)
    torch.testing.assert_close(smooth.vjp(X[:1], w)[0], J.T @ w[0])
    torch.testing.assert_close(smooth.jvp(X[:1], X[1:2])[0], J @ X[1])


def test_sharper_slopes_come_closer_to_the_relu():
    network, X = two_layer(), points()
    features = GradientFeatures(network, D)
    exact = features.features(X)
    distances = [float((features.smoothed(s).features(X) - exact).norm()) for s in (1, 30, 3000)]
    assert distances[0] > 2 * distances[1] > 4 * distances[2]


def test_smoothing_replaces_every_relu_and_keeps_the_original():
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU()), nn.Linear(3, 1), nn.ReLU())
    smooth = smooth_relus(module, 2.0)
    assert "ReLU()" in str(module) and "ReLU()" not in str(smooth)
    assert str(smooth).count("SmoothReLU(sharpness=2") == 2
    assert type(smooth_relus(nn.ReLU(), 5.0)).__name__ == "SmoothReLU"


def test_smoothing_replaces_one_relu_in_all_its_places():
    act = nn.ReLU()
    block = nn.Sequential(nn.Linear(3, 3), act)
    smooth = smooth_relus(nn.Sequential(nn.Linear(3, 3), act, nn.Sequential(block, block)), 2.0)
    places = [type(part).__name__ for _, part in smooth.named_modules(remove_duplicate=False)]
    assert places.count("SmoothReLU") == 3 and "ReLU" not in places


class NestedReLU(nn.ReLU):
    """A ReLU that holds another, two levels down."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU())


def test_smoothing_a_relu_that_holds_another():
    smooth = smooth_relus(nn.Sequential(nn.Linear(3, 3), NestedReLU()), 2.0)
    assert [type(part).__name__ for part in smooth] == ["Linear", "SmoothReLU"]


class Scaled(nn.Module):
    """A parameter that is one number, of no dimension."""

    def __init__(self):
        super().__init__()
        self.body, self.scale = two_layer(), nn.Parameter(torch.tensor(2.0).double())

    def forward(self, X):
        return self.scale * self.body(X)


def test_a_parameter_that_is_one_number_has_a_gradient():
    network, X = Scaled(), points()
    features = GradientFeatures(network, D)
    one = torch.ones(1, dtype=torch.float64)
    Phi = torch.stack([dense_gradient(network, x, one).detach() for x in X])
    torch.testing.assert_close(features.features(X), Phi)


def test_the_statistics_of_the_caller_s_network_stay():
    network = nn.Sequential(nn.BatchNorm1d(D), nn.Linear(D, 1)).double().train()
    with pytest.raises(ValueError):
        GradientFeatures(network, D)
    assert int(network[0].num_batches_tracked) == 0
    assert bool((network[0].running_var == 1).all())


def test_a_numpy_number_is_an_input_shape():
    assert GradientFeatures(two_layer(), np.int64(D)).input_shape == (D,)


def test_a_linearised_network_moves_in_the_span_and_fits():
    network, X = two_layer(width=30), points()
    features = GradientFeatures(network, D)
    y = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    theta = fit_min_norm(features, X, y - features.outputs_at(X)[:, 0])
    linear = features.outputs_at(X) + features.features(X) @ theta.T
    torch.testing.assert_close(linear[:, 0], y)
    assert float(projection_loss(features, theta, X)) < 1e-20
    assert float(projection_loss(features, theta, points(seed=1))) > 0.1


def test_gradient_of_the_projection_loss():
    features = GradientFeatures(two_layer(activation="gelu", width=12), D)
    theta = fit_min_norm(features, points(3), torch.tensor([1.0, -1.0, 2.0]))
    X = points(3, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda Z: projection_loss(features, theta, Z), X, atol=1e-6)


def test_all_layers_give_the_data_back():
    features = GradientFeatures(two_layer(activation="gelu", width=40), D)
    X = points(3)
    theta = fit_min_norm(features, X, torch.tensor([1.0, -1.0, 2.0]))
    record = reconstruct(features, theta, 3, restarts=3, progress=False)
    assert record.explained and record.options["model"]["model"] == "GradientFeatures"
    assert compare(X, record.samples).recovered() == 3


def test_flatten_and_block_of_keep_order_and_shape():
    before, after = two_layer(), two_layer()
    with torch.no_grad():
        after.head.weight += 1.0
    features = GradientFeatures(before, D)
    move = features.flatten(after) - features.flatten(before)
    assert move.shape == (1, features.p)
    assert not bool(features.block_of(move, "body.0.weight").any())
    torch.testing.assert_close(
        features.block_of(move, "head.weight"), torch.ones(1, 1, 7, dtype=torch.float64)
    )
    assert torch.equal(features.flatten(after.state_dict()), features.flatten(after))
    Phi = features.features(points())
    assert features.block_of(Phi, "body.0.weight").shape == (4, 7, D)


def test_the_copy_stays_when_the_network_is_trained():
    network, X = two_layer(), points()
    features = GradientFeatures(network, D)
    before = features.features(X)
    with torch.no_grad():
        network.body[0].weight += 1.0
    assert torch.equal(features.features(X), before)
    assert all(p.requires_grad for p in network.parameters())


def test_a_transformer_can_be_differentiated():
    network = VisionTransformer((4, 4), 4, 2, dtype=torch.float64, patch=2, depth=1, heads=2)
    features = GradientFeatures(network, 16, weights=[1.0, -1.0])
    X = sphere(2, 16, seed=0, dtype=torch.float64).X
    Phi = torch.stack([dense_gradient(network, x, features.weights).detach() for x in X])
    torch.testing.assert_close(features.features(X), Phi)
    assert features.jvp(X, X).shape == (2, features.p)


def test_small_memory_differentiates_in_chunks():
    network, X = deep(), points(5)
    whole = GradientFeatures(network, D, weights=[1, 0])
    tight = GradientFeatures(network, D, weights=[1, 0], memory=1e-9)
    assert tight.chunk == 1
    torch.testing.assert_close(tight.features(X), whole.features(X))
    W = torch.randn(5, whole.p, dtype=torch.float64)
    torch.testing.assert_close(tight.vjp(X, W), whole.vjp(X, W))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GradientFeatures(3, D), TypeError, "module must be a torch.nn.Module, got int"),
        (lambda: GradientFeatures(nn.ReLU(), D), ValueError, "ReLU has no parameters"),
        (
            lambda: GradientFeatures(two_layer(), D + 1),
            ValueError,
            r"TwoLayer does not take real inputs of shape \(7\): ",
        ),
        (lambda: GradientFeatures(two_layer(), 0), ValueError, "input_shape must be at least 1"),
        (lambda: GradientFeatures(deep(), D), ValueError, "2 outputs: pass weights=, 2 numbers"),
        (lambda: GradientFeatures(deep(), D, weights=[1.0]), ValueError, "must be 2 numbers"),
        (lambda: GradientFeatures(deep(), D, weights=[0, 0]), ValueError, "not all be zero"),
        (
            lambda: GradientFeatures(deep(), D, weights=[1, float("nan")]),
            ValueError,
            "weights must be finite",
        ),
        (
            lambda: GradientFeatures(nn.Conv2d(1, 1, 1), (1, 2, 3)),
            ValueError,
            r"expected \(2, C\), got \(2, 1, 2, 3\)",
        ),
        (
            lambda: GradientFeatures(two_layer(), D).flatten(two_layer(width=8)),
            ValueError,
            r"'body.0.weight' must be \(7, 6\), got \(8, 6\)",
        ),
        (
            lambda: GradientFeatures(two_layer(), D).flatten({}),
            ValueError,
            "must be .* got nothing",
        ),
        (
            lambda: GradientFeatures(two_layer(), D).block_of(torch.zeros(1, 49), "W1"),
            ValueError,
            "no parameter 'W1': there are body.0.weight, head.weight",
        ),
        (
            lambda: GradientFeatures(two_layer(), D).smoothed(0.0),
            ValueError,
            "sharpness must be above 0",
        ),
        (
            lambda: GradientFeatures(two_layer(activation="tanh"), D).smoothed(1.0),
            ValueError,
            "no ReLU whose slope",
        ),
        (
            lambda: GradientFeatures(two_layer(), D).combine(points(), torch.zeros(4, 2)),
            ValueError,
            r"A must have shape \(4, 1\), got \(4, 2\)",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
