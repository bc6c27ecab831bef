"""Moments and scores of the output channel against integrals by scipy and against samples."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from paperlib.activations import activation
from paperlib.output_channel import OutputChannel

NAMES = ["relu", "gelu", "relu+tanh"]


def rest_of(name):
    """The channel of an activation, and f as a function of one number."""
    channel = OutputChannel(activation(name), "cpu")
    return channel, lambda z: float(channel.rest(torch.tensor(z)))


@pytest.mark.parametrize(("name", "even"), [("relu", True), ("gelu", True), ("relu+tanh", False)])
def test_only_what_is_left_of_an_even_activation_is_even(name, even):
    assert rest_of(name)[0].even == even


@pytest.mark.parametrize("name", NAMES)
def test_the_rest_has_no_linear_part(name):
    channel, f = rest_of(name)
    slope, _ = quad(lambda z: z * f(z) * norm.pdf(z), -8, 8, points=[0])
    assert abs(slope) < 1e-4
    assert channel.mu > 0.4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("omega", "tau"), [(0.0, 1.0), (-1.3, 0.5), (0.4, 0.01)])
def test_moments_are_those_of_a_gaussian(name, omega, tau):
    channel, f = rest_of(name)
    density = norm(omega, tau**0.5).pdf
    reach = omega - 8 * tau**0.5, omega + 8 * tau**0.5
    mean = quad(lambda z: f(z) * density(z), *reach, points=[0])[0]
    square = quad(lambda z: f(z) ** 2 * density(z), *reach, points=[0])[0]
    values, found, variance = channel.moments(torch.tensor([[omega]]), torch.tensor([tau]))
    assert values.shape == (1, 1, len(channel.t))
    assert float(found) == pytest.approx(mean, abs=5e-3)  # a kink on the grid
    assert float(variance) == pytest.approx(square - mean**2, rel=0.04, abs=1e-5)


def test_mean_variance_is_that_of_samples():
    channel, _ = rest_of("relu")
    tau = torch.tensor([1.0, 0.6, 0.2, 0.01])
    generator = torch.Generator().manual_seed(1)
    omega = torch.randn(4, 4000, generator=generator) * (1 - tau).sqrt()[:, None]
    noise = torch.randn(4, 4000, 200, generator=generator)
    z = omega[:, :, None] + tau.sqrt()[:, None, None] * noise
    sampled = (torch.relu(z) - 0.5 * z).var(2).mean(1)
    torch.testing.assert_close(channel.mean_variance(tau), sampled, rtol=0.05, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seen", [-0.2, 0.1, 0.9])
def test_the_score_is_that_of_bayes_rule(name, seen):
    channel, f = rest_of(name)
    omega, tau, gain, noise = 0.3, 0.4, 0.7, 0.05

    def posterior(z):
        return norm.pdf(z, omega, tau**0.5) * norm.pdf(seen, gain * f(z), noise**0.5)

    mass = quad(posterior, -4, 5, points=[0])[0]
    first = quad(lambda z: z * posterior(z), -4, 5, points=[0])[0]
    values = channel.moments(torch.tensor([[omega]]), torch.tensor([tau]))[0]
    found = channel.score(
        values,
        torch.tensor([tau]),
        torch.tensor([gain]),
        torch.tensor([[seen]]),
        torch.tensor([[noise]]),
    )
    assert float(found) == pytest.approx((first / mass - omega) / tau, abs=0.02)


def test_what_is_seen_with_little_noise_cannot_be_told_finer_than_the_grid():
    channel, _ = rest_of("relu")
    gain, tau = torch.tensor([0.7, -0.7]), torch.tensor([0.4, 0.4])
    step = float(channel.t[1] - channel.t[0]) * 0.4**0.5 * 0.7  # between neighbours
    np.testing.assert_allclose(channel.coarseness(gain, tau), [0.5 * step**2] * 2, rtol=1e-5)
