"""Sensitivity and noise of a private release, against brute force and published formulas."""

import math

import pytest
import torch
from scipy.stats import norm

from paperlib import RandomFeatures, sphere
from paperlib.privacy import (
    gaussian_delta,
    gaussian_epsilon,
    gaussian_sigma,
    private_ridge,
    ridge_sensitivity,
)


def minimiser(Phi, Y, ridge):
    n, p = Phi.shape
    return torch.linalg.solve(Phi.T @ Phi / n + ridge * torch.eye(p).double(), Phi.T @ Y / n).T


@pytest.mark.parametrize("ridge", [0.05, 1.0, 30.0])
def test_no_replaced_sample_moves_ridge_regression_beyond_the_bound(ridge):
    generator = torch.Generator().manual_seed(0)
    bound, n, p = 2.0, 4, 5
    largest = 0.0
    for trial in range(300):
        Phi = torch.randn(n + 1, p, generator=generator).double()
        Phi = bound * Phi / Phi.norm(dim=1, keepdim=True)
        Y = torch.randn(n + 1, 2, generator=generator).double()
        Y = Y / Y.norm(dim=1, keepdim=True)
        if trial % 2:  # one direction, labels of either sign: close to the worst case
            Phi[1:] = Phi[0]
            Y[1:] = Y[0]
            Y[n] = -Y[0]
        first = minimiser(Phi[:n], Y[:n], ridge)
        second = minimiser(Phi[1:], Y[1:], ridge)
        largest = max(largest, float((first - second).norm()))
    sensitivity = ridge_sensitivity(n, ridge, bound)
    assert largest <= sensitivity
    if ridge == 30.0:
        assert largest > 0.5 * sensitivity  # tight where the ridge is strong


def test_sensitivity_in_numbers():
    # 2 B Y / (ridge n) (1 + B / (2 sqrt(ridge))) = 2 * 3 * 1 / (4 * 5) * (1 + 3 / 4)
    assert ridge_sensitivity(5, 4.0, 3.0) == pytest.approx(0.3 * 1.75)
    assert ridge_sensitivity(10, 4.0, 3.0) == pytest.approx(ridge_sensitivity(5, 4.0, 3.0) / 2)
    assert ridge_sensitivity(5, 4.0, 3.0, labels=2.0) == pytest.approx(0.6 * 1.75)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 5.0])
def test_delta_is_the_largest_gain_of_any_event(sigma, epsilon):
    # In one dimension: the mass by which N(1, s^2) exceeds e^epsilon N(0, s^2), summed on a grid.
    x = torch.linspace(-40, 41, 400_001, dtype=torch.float64)
    p, q = (torch.from_numpy(norm.pdf(x.numpy(), mean, sigma)) for mean in (1, 0))
    excess = torch.trapezoid((p - math.exp(epsilon) * q).clamp(min=0), x)
    assert gaussian_delta(1.0, sigma, epsilon) == pytest.approx(float(excess), abs=1e-7)


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 10.0, 1e3, 1e6])
def test_sigma_is_the_least_and_epsilon_its_inverse(epsilon):
    sigma = gaussian_sigma(2.0, epsilon, 1e-5)
    assert gaussian_delta(2.0, sigma, epsilon) == pytest.approx(1e-5, rel=1e-3)
    assert gaussian_delta(2.0, 0.99 * sigma, epsilon) > 1e-5
    assert gaussian_epsilon(2.0, sigma, 1e-5) == pytest.approx(epsilon, rel=1e-4)
    if epsilon < 1:  # the older formula asks for more
        assert sigma < 2.0 * math.sqrt(2 * math.log(1.25e5)) / epsilon


def test_no_epsilon_is_claimed_that_delta_does_not_cover():
    delta = 2 * norm.cdf(1 / 2000) - 1  # at epsilon 0, of sensitivity 1 and sigma 1000
    assert gaussian_epsilon(1.0, 1000.0, delta * (1 + 1e-9)) == 0
    assert 0 < gaussian_epsilon(1.0, 1000.0, delta * (1 - 1e-4)) < 1e-6


def test_a_release_is_ridge_regression_plus_that_noise():
    data = sphere(6, 8, seed=1, dtype=torch.float64)
    model = RandomFeatures(8, 3000, "relu+tanh", seed=1, dtype=torch.float64)
    Y = torch.nn.functional.one_hot(torch.arange(6) % 3, 3).double()
    norms = model.features(data.X).norm(dim=1)
    bound = float(norms.median())
    fit = private_ridge(model, data.X, Y, ridge=500.0, bound=bound, epsilon=3.0)
    Phi = model.features(data.X)
    Phi = Phi * (bound / norms).clamp(max=1)[:, None]
    a = torch.linalg.solve(Phi @ Phi.T / 6 + 500 * torch.eye(6).double(), Y / 6)
    torch.testing.assert_close(fit.clean, a.T @ Phi)
    assert 0 < fit.clipped < 1
    assert fit.sensitivity == ridge_sensitivity(6, 500.0, bound)
    assert fit.sigma == gaussian_sigma(fit.sensitivity, 3.0, 1e-5)
    assert float((fit.theta - fit.clean).std()) == pytest.approx(fit.sigma, rel=0.03)
    options = {"ridge": 500.0, "bound": bound, "epsilon": 3.0}
    again = private_ridge(model, data.X, Y, **options)
    assert torch.equal(again.clean, fit.clean)
    # Nobody draws that noise again, unless an experiment has a seed.
    assert not torch.equal(again.theta, fit.theta)
    first, second, other = (private_ridge(model, data.X, Y, **options, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.theta, second.theta) and not torch.equal(first.theta, other.theta)


def test_bad_input_is_refused():
    data = sphere(3, 4, dtype=torch.float64)
    model = RandomFeatures(4, 20, dtype=torch.float64)
    good = {"ridge": 1.0, "bound": 1.0, "epsilon": 1.0}
    labels = torch.eye(3, 2).double()
    for y, change, message in (
        (2 * labels, {}, "norm at most 1, got 2"),
        (labels[:2], {}, r"shape \(3, C\), got \(2, 2\)"),
        (labels, {"ridge": 0.0}, "ridge must be above 0"),
        (labels, {"bound": -1.0}, "bound must be above 0"),
        (labels, {"epsilon": 0.0}, "epsilon must be above 0"),
        (labels, {"delta": 1.0}, "delta must be above 0 and below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            private_ridge(model, data.X, y, **good | change)
