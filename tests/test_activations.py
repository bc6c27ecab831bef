"""Activations against autograd, closed forms and Parseval's identity."""

import math

import pytest
import torch

from paperlib import Activation, activation, activation_names

SMOOTH = ("tanh", "gelu", "erf", "softplus")


def test_the_activations_of_the_paper_are_there():
    assert {"relu", "relu+tanh", "tanh", "gelu", "erf"} <= set(activation_names())


@pytest.mark.parametrize("name", activation_names())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slope_is_the_derivative_and_keeps_the_dtype(name, dtype):
    act = activation(name)
    u = torch.linspace(-6, 6, 240, dtype=dtype, requires_grad=True)  # 0 is not among them
    value = act.value(u)
    (expected,) = torch.autograd.grad(value.sum(), u)
    slope = act.slope(u.detach())
    assert value.dtype == slope.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(slope, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["gelu", "erf", "tanh"])
def test_values_of_smooth_activations(name):
    u = torch.linspace(-4, 4, 41, dtype=torch.float64)
    library = {"gelu": torch.nn.functional.gelu, "erf": torch.erf, "tanh": torch.tanh}[name]
    torch.testing.assert_close(activation(name).value(u), library(u), rtol=1e-12, atol=1e-14)


def test_slope_at_the_kink_is_zero_from_the_left():
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(activation("relu").slope(zero)) == 0
    assert float(activation("relu+tanh").slope(zero)) == 1


@pytest.mark.parametrize("name", activation_names())
def test_oddness_and_relu_are_declared_rightly(name):
    act = activation(name)
    u = torch.linspace(0.1, 5, 50, dtype=torch.float64)
    assert act.odd == torch.allclose(act.value(-u), -act.value(u), atol=1e-12)
    eps = 1e-9
    jump = act.slope(torch.tensor([eps])) - act.slope(torch.tensor([-eps]))
    assert act.has_relu == (abs(float(jump)) > 0.5)


PI = math.pi
CLOSED_FORMS = {
    "relu": (
        1 / math.sqrt(2 * PI),
        0.5,
        1 / (2 * math.sqrt(PI)),
        0,
        -1 / math.sqrt(48 * PI),
        0,
    ),
    "gelu": (1 / (2 * math.sqrt(PI)), 0.5),
    "erf": (0, 2 / math.sqrt(3 * PI), 0, -4 / (3 * math.sqrt(18 * PI))),
    "softplus": (None, 0.5, None, 0, None, 0),
    "tanh": (0, None, 0, None, 0),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_hermite_coefficients_against_closed_forms(name):
    expected = CLOSED_FORMS[name]
    found = activation(name).hermite_coefficients(len(expected) - 1)
    for value, closed in zip(found, expected, strict=True):
        if closed is not None:
            assert value == pytest.approx(closed, abs=1e-12)


def test_hermite_coefficients_are_linear_in_the_activation():
    both = activation("relu+tanh").hermite_coefficients(5)
    relu, tanh = (activation(name).hermite_coefficients(5) for name in ("relu", "tanh"))
    assert both == pytest.approx([a + b for a, b in zip(relu, tanh, strict=True)], abs=1e-12)
    # The odd orders that ReLU lacks, and with them its sign ambiguity, are what tanh adds.
    assert relu[3] == relu[5] == 0
    assert abs(both[3]) > 0.01


@pytest.mark.parametrize("name", ["relu", *SMOOTH])
def test_parseval(name):
    """The squares of the coefficients add up to E[act(z)^2]."""
    act = activation(name)
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * PI)
    second_moment = float(torch.trapezoid(act.value(z).square() * density, z))
    partial = sum(mu**2 for mu in act.hermite_coefficients(30))
    # Coefficients of ReLU fall like r^(-5/4), the rest beyond order 30 is a few thousandths.
    assert partial <= second_moment + 1e-9
    assert partial == pytest.approx(second_moment, rel=3e-3)
    if name == "erf":
        assert second_moment == pytest.approx(2 / PI * math.asin(2 / 3), rel=1e-9)


@pytest.mark.parametrize("name", activation_names())
def test_linear_coefficient_is_the_mean_slope(name):
    act = activation(name)
    z = torch.linspace(-12, 12, 240_000, dtype=torch.float64)  # 0 lies between two points
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * PI)
    mean_slope = float(torch.trapezoid(act.slope(z) * density, z))
    assert act.linear_coefficient == pytest.approx(mean_slope, abs=1e-4)


def test_activations_of_ones_own_pass_through():
    own = Activation("cube", lambda u: u**3, lambda u: 3 * u**2, odd=True)
    assert activation(own) is own


def test_an_activation_of_ones_own_has_its_own_hermite_coefficients():
    """z^3 = 3 z + He_3(z), so mu_1 = 3 and mu_3 = sqrt(6)."""
    own = Activation("cube", lambda u: u**3, lambda u: 3 * u**2, odd=True)
    assert own.hermite_coefficients(3) == pytest.approx((0, 3, 0, math.sqrt(6)), abs=1e-10)
    assert own.linear_coefficient == pytest.approx(3)


def test_negative_order_is_refused():
    with pytest.raises(ValueError, match="order must be at least 0, got -1"):
        activation("relu").hermite_coefficients(-1)


def test_only_a_relu_is_silent_below_zero():
    assert [name for name in activation_names() if activation(name).silent] == ["relu"]
