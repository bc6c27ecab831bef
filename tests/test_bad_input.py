"""Bad input is refused with an error that says what was expected and what came."""

import math

import pytest
import torch

from paperlib import RandomFeatures, activation, fit_min_norm, projection_loss, reconstruct, sphere
from paperlib.checks import check_device
from paperlib.sphere import to_sphere

N, D, P = 4, 10, 200


@pytest.fixture(scope="module")
def work():
    """A sound problem, to be spoilt in one place at a time."""
    model = RandomFeatures(D, P, "relu", seed=0)
    data = sphere(N, D, 0)
    return model, data.X, data.y, fit_min_norm(model, data.X, data.y)


def spoilt(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[1] = value
    return tensor


NOT_FINITE = [math.nan, math.inf, -math.inf]


# The model


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"d": 0}, ValueError, "d must be at least 1, got 0"),
        ({"p": -3}, ValueError, "p must be at least 1, got -3"),
        ({"d": 3.5}, TypeError, "d must be a whole number, got 3.5"),
        ({"p": True}, TypeError, "p must be a whole number, got True"),
        ({"activation": "swish"}, ValueError, "unknown activation 'swish': expected one of erf, "),
        ({"activation": 3}, ValueError, "unknown activation 3: expected one of"),
        (
            {"device": "cuda:7"},
            ValueError,
            "device cuda:7 is not there, .*: expected one of .*'cpu'",
        ),
        ({"device": "nonsense"}, ValueError, "device nonsense is not there, .*: expected one of"),
        ({"device": "meta"}, ValueError, "device meta is not there, .*: expected one of"),
        ({"dtype": torch.float16}, TypeError, "torch.float32 or torch.float64, got torch.float16"),
        ({"dtype": torch.int32}, TypeError, "torch.float32 or torch.float64, got torch.int32"),
        ({"dtype": "float32"}, TypeError, "torch.float32 or torch.float64, got float32"),
        ({"block_rows": 1000}, ValueError, "positive multiple of 1024, got 1000"),
        ({"block_rows": 0}, ValueError, "positive multiple of 1024, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"block_rows": 2048.0}, TypeError, "block_rows must be a whole number, got 2048.0"),
        ({"seed": 1.5}, TypeError, "seed must be a whole number, got 1.5"),
        ({"seed": 2**63}, ValueError, r"seed must be at least 0 and below 2\^63, got 9223"),
    ],
)
def test_random_features(arguments, error, message):
    if arguments.get("device") == "cuda:7" and torch.cuda.device_count() > 7:
        pytest.skip("this machine has that many devices")
    with pytest.raises(error, match=message):
        RandomFeatures(**{"d": D, "p": P, **arguments})


def test_unknown_activation_by_name():
    with pytest.raises(ValueError, match="unknown activation 'Relu': expected one of .*relu"):
        activation("Relu")


def test_a_device_is_named_as_tensors_name_it(monkeypatch):
    """Tensors on "cuda" are on "cuda:0", and checks compare a model's device with theirs."""

    class Probe:
        device = torch.device("cuda:0")

        def cpu(self):
            return self

    monkeypatch.setattr(torch, "empty", lambda *size, **options: Probe())
    assert check_device("cuda") == torch.device("cuda:0") != torch.device("cuda")


def test_a_device_without_float64_is_refused(monkeypatch):
    def empty(*size, dtype, device):
        if dtype == torch.float64:
            raise TypeError("no float64 there")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(ValueError, match="device mps is not there, or has no float64: expected"):
        check_device("mps")


def test_no_device_means_the_cpu():
    assert check_device(None) == torch.device("cpu")


@pytest.mark.parametrize("product", ["features", "jvp", "vjp"])
@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda t: t[:, :5], ValueError, r"must have shape \(.*\), got \(4, 5\)"),
        (lambda t: t[0], ValueError, r"must have shape \(.*\), got \(\d+,\)"),
        (lambda t: t.double(), TypeError, "dtype torch.float32, got torch.float64"),
        (lambda t: t.int(), TypeError, "dtype torch.float32, got torch.int32"),
        (lambda t: t.numpy(), TypeError, "must be a torch tensor, got ndarray"),
        (lambda t: t[:0], ValueError, r"must have shape \(.*\), got \(0, \d+\)"),
        (lambda t: t.to("meta"), ValueError, "on the model's device cpu, got meta"),
    ],
)
def test_products(work, product, spoil, error, message):
    model, X, _, _ = work
    with pytest.raises(error, match=message):
        if product == "features":
            model.features(spoil(X))
        else:
            second = X if product == "jvp" else torch.zeros(N, P)
            getattr(model, product)(X, spoil(second))


def test_products_want_as_many_rows_as_points(work):
    model, X, _, _ = work
    with pytest.raises(ValueError, match=r"dX must have shape \(4, 10\), got \(3, 10\)"):
        model.jvp(X, X[:3])
    with pytest.raises(ValueError, match=r"W must have shape \(4, 200\), got \(3, 200\)"):
        model.vjp(X, torch.zeros(3, P))


# Training


@pytest.mark.parametrize("value", NOT_FINITE)
def test_training_data_that_are_not_finite(work, value):
    model, X, y, _ = work
    message = "must be finite, got 1 entries that are NaN or infinite"
    with pytest.raises(ValueError, match="X " + message):
        fit_min_norm(model, spoilt(X, value), y)
    with pytest.raises(ValueError, match="y " + message):
        fit_min_norm(model, X, spoilt(y, value))
    with pytest.raises(ValueError, match="theta_0 " + message):
        fit_min_norm(model, X, y, theta_0=spoilt(torch.zeros(1, P), value))


@pytest.mark.parametrize("scale", [0.5, 2.0, 1.02, 0.0])
def test_training_data_off_the_sphere(work, scale):
    model, X, y, _ = work
    one_off = X.clone()
    one_off[2] *= scale
    with pytest.raises(ValueError, match=r"rows of X must lie on the sphere of radius sqrt\(d\)"):
        fit_min_norm(model, one_off, y)


def test_a_row_of_zeros_cannot_be_put_on_the_sphere(work):
    with pytest.raises(ValueError, match="a row of zeros has no direction"):
        to_sphere(torch.cat([work[1], torch.zeros(1, D)]))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda y: y[:3], ValueError, r"y must have shape \(4,\) or \(4, C\), got \(3,\)"),
        (lambda y: y[None, :, None], ValueError, r"y must have shape .* got \(1, 4, 1\)"),
        (lambda y: y.numpy(), TypeError, "y must be a torch tensor, got ndarray"),
        (lambda y: 0 * y, ValueError, "all labels are zero"),
    ],
)
def test_labels(work, spoil, error, message):
    model, X, y, _ = work
    with pytest.raises(error, match=message):
        fit_min_norm(model, X, spoil(y))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda X: X[:, :5], ValueError, r"X must have shape \(n, 10\), got \(4, 5\)"),
        (lambda X: X[:0], ValueError, r"X must have shape \(n, 10\), got \(0, 10\)"),
        (lambda X: X.double(), TypeError, "dtype torch.float32, got torch.float64"),
        (lambda X: X.numpy(), TypeError, "X must be a torch tensor, got ndarray"),
    ],
)
def test_training_inputs(work, spoil, error, message):
    model, X, y, _ = work
    with pytest.raises(error, match=message):
        fit_min_norm(model, spoil(X), y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ridge": -1.0}, ValueError, "ridge must be at least 0 and finite, got -1.0"),
        ({"ridge": math.nan}, ValueError, "ridge must be at least 0 and finite, got nan"),
        ({"ridge": "1"}, TypeError, "ridge must be a number, got '1'"),
        ({"theta_0": torch.zeros(2, P)}, ValueError, r"theta_0 must have shape \(1, 200\), got"),
        ({"theta_0": torch.zeros(P)}, ValueError, r"theta_0 must have shape \(1, 200\), got"),
        ({"theta_0": torch.zeros(1, P).double()}, TypeError, "theta_0 must have the model's dtype"),
        ({"theta_0": 0.0}, TypeError, "theta_0 must be a torch tensor, got float"),
    ],
)
def test_training_options(work, options, error, message):
    model, X, y, _ = work
    with pytest.raises(error, match=message):
        fit_min_norm(model, X, y, **options)


def test_fewer_parameters_than_samples(work):
    _, X, y, _ = work
    with pytest.raises(ValueError, match="p must be at least n: 3 parameters cannot interpolate 4"):
        fit_min_norm(RandomFeatures(D, 3), X, y)


# The loss


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda X: X[:, :5], ValueError, r"candidates must have shape \(n, 10\), got \(4, 5\)"),
        (lambda X: X[0], ValueError, r"candidates must have shape \(n, 10\), got \(10,\)"),
        (lambda X: X[:0], ValueError, r"candidates must have shape \(n, 10\), got \(0, 10\)"),
        (lambda X: X.double(), TypeError, "dtype torch.float32, got torch.float64: .* not mixed"),
        (lambda X: X.half(), TypeError, "dtype torch.float32, got torch.float16: .* not mixed"),
        (lambda X: X.tolist(), TypeError, "candidates must be a torch tensor, got list"),
        (lambda X: spoilt(X, math.nan), ValueError, "candidates must be finite, got 1 entries"),
        (lambda X: spoilt(X, math.inf), ValueError, "candidates must be finite, got 1 entries"),
    ],
)
def test_candidates(work, spoil, error, message):
    model, X, _, theta = work
    with pytest.raises(error, match=message):
        projection_loss(model, theta, spoil(X))


BAD_THETA = [
    (lambda t: t[:, 1:], ValueError, r"theta must have shape \(C, 200\), got \(1, 199\)"),
    (lambda t: t.T, ValueError, r"theta must have shape \(C, 200\), got \(200, 1\)"),
    (lambda t: t[None], ValueError, r"theta must have shape \(C, 200\), got \(1, 1, 200\)"),
    (lambda t: t[:0], ValueError, r"theta must have shape \(C, 200\), got \(0, 200\)"),
    (lambda t: 0 * t, ValueError, "theta is zero: nothing was learned"),
    (lambda t: spoilt(t, math.nan), ValueError, "theta must be finite, got 1 entries"),
    (lambda t: spoilt(t, -math.inf), ValueError, "theta must be finite, got 1 entries"),
    (
        lambda t: t.int(),
        TypeError,
        "theta must have the model's dtype torch.float32, got torch.int32",
    ),
    (lambda t: t.numpy(), TypeError, "theta must be a torch tensor, got ndarray"),
    (lambda t: t.to("meta"), ValueError, "theta must be on the model's device cpu, got meta"),
]


@pytest.mark.parametrize(("spoil", "error", "message"), BAD_THETA)
def test_parameters(work, spoil, error, message):
    model, X, _, theta = work
    with pytest.raises(error, match=message):
        projection_loss(model, spoil(theta), X)
    for solver in ("levenberg-marquardt", "published"):
        with pytest.raises(error, match=message):
            reconstruct(model, spoil(theta), N, solver=solver)


@pytest.mark.parametrize("solver", ["levenberg-marquardt", "published"])
def test_parameters_come_with_their_graph(work, solver):
    """As `layer.weight - before` does, which is what users subtract."""
    model, _, _, theta = work
    options = {"solver": solver, "max_steps": 2, "restarts": 1}
    found = reconstruct(model, theta.clone().requires_grad_(), N, **options)
    assert not found.samples.requires_grad
    assert torch.equal(found.samples, reconstruct(model, theta, N, **options).samples)


# The attack


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "n must be at least 1, got 0"),
        (-2, ValueError, "n must be at least 1, got -2"),
        (1.5, TypeError, "n must be a whole number, got 1.5"),
        ("4", TypeError, "n must be a whole number, got '4'"),
        (P + 1, ValueError, "p must be at least n: 200 features cannot hold 201 samples"),
    ],
)
def test_number_of_samples(work, n, error, message):
    with pytest.raises(error, match=message):
        reconstruct(work[0], work[3], n)


PUBLISHED = {"solver": "published"}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"solver": "adam"},
            ValueError,
            r"unknown solver 'adam': expected one of \['levenberg-marquardt', 'published'\]",
        ),
        ({"stepps": 5}, TypeError, "'levenberg-marquardt' has no option 'stepps': expected .*bulk"),
        ({"learning_rate": 1.0}, TypeError, "'levenberg-marquardt' has no option 'learning_rate'"),
        ({"watch": None}, TypeError, "has no option 'watch'"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"seed": 0.5}, TypeError, "seed must be a whole number, got 0.5"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be above 0 and below 1.0, got 0.0"),
        ({"tolerance": math.nan}, ValueError, "tolerance must be above 0 and below 1.0, got nan"),
        ({"tolerance": "small"}, TypeError, "tolerance must be a number, got 'small'"),
        ({"max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ({"max_steps": 1e3}, TypeError, "max_steps must be a whole number, got 1000.0"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1, got 0"),
        ({"oversampling": 0.9}, ValueError, "oversampling must be at least 1 and finite, got 0.9"),
        ({"oversampling": math.inf}, ValueError, "oversampling must be .* finite, got inf"),
        ({"oversampling": "2"}, TypeError, "oversampling must be a number, got '2'"),
        ({"forcing": 1.0}, ValueError, "forcing must be above 0 and below 1.0, got 1.0"),
        ({"bulk": "float8"}, ValueError, "bulk must be 'auto' or one of .*, got 'float8'"),
        ({"bulk": "float64"}, ValueError, "bulk='float64' needs a model of dtype float64"),
        ({"lift": "yes"}, TypeError, "lift must be True, False or None, got 'yes'"),
        ({**PUBLISHED, "lift": True}, TypeError, "'published' has no option 'lift': .*momentum"),
        ({**PUBLISHED, "learning_rate": 0}, ValueError, "learning_rate must be above 0, got 0"),
        ({**PUBLISHED, "learning_rate": math.inf}, ValueError, "learning_rate must be .* got inf"),
        ({**PUBLISHED, "momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1"),
        ({**PUBLISHED, "momentum": "0.9"}, TypeError, "momentum must be a number, got '0.9'"),
        ({**PUBLISHED, "relu_slope": -0.1}, ValueError, "relu_slope must be at least 0 and finite"),
        ({**PUBLISHED, "max_steps": 0}, ValueError, "max_steps must be at least 1, got 0"),
        ({**PUBLISHED, "restarts": 1.0}, TypeError, "restarts must be a whole number, got 1.0"),
    ],
)
def test_options_of_the_attack(work, options, error, message):
    with pytest.raises(error, match=message):
        reconstruct(work[0], work[3], N, **options)


def test_lift_needs_a_linear_part(work):
    """An even activation has none, and cannot be lifted even on request."""
    from paperlib import Activation

    even = Activation("square", torch.square, lambda u: 2 * u)
    model = RandomFeatures(D, P, even)
    theta = fit_min_norm(model, work[1], work[2])
    with pytest.raises(ValueError, match="lift=True needs a model with weights V and an activ"):
        reconstruct(model, theta, N, lift=True)


def test_every_error_comes_before_v_is_drawn(monkeypatch):
    """A typing error in a long run must not cost its memory first."""
    model = RandomFeatures(D, 100_000_000)

    def draw(*_):
        raise AssertionError("V was drawn")

    monkeypatch.setattr(model, "draw", draw)
    X = sphere(N, D, 0).X
    with pytest.raises(ValueError, match="sphere"):
        fit_min_norm(model, 2 * X, torch.ones(N))
    with pytest.raises(ValueError, match="all labels are zero"):
        fit_min_norm(model, X, torch.zeros(N))
    theta = torch.ones(1).expand(1, model.p)
    for options in ({"solver": "adam"}, {"stepps": 5}, {"max_steps": 0}, {"forcing": 2.0}):
        with pytest.raises((ValueError, TypeError)):
            reconstruct(model, theta, N, **options)


def test_parameters_of_another_dtype_are_refused():
    model = RandomFeatures(5, 40)
    theta = torch.ones(1, 40, dtype=torch.float64)
    for attack in (
        lambda: reconstruct(model, theta, 2),
        lambda: projection_loss(model, theta, torch.ones(2, 5)),
    ):
        with pytest.raises(TypeError, match="theta must have the model's dtype torch.float32"):
            attack()
