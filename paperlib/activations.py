"""Activations of a feature map: value, slope, Hermite coefficients, linear part.

With z ~ N(0, 1) and the normalised probabilists' Hermite polynomials h_r, every activation is
act(z) = sum_r mu_r h_r(z). The order-one coefficient mu_1 = E[act'(z)] is the *linear part*,
mu_1 z; what is left, act(z) - mu_1 z, is the *rest*. Theorem 1 of the paper expands the activation
in this way, and the default solver projects the linear part off (see `lift.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """An activation applied entry by entry to the pre-activations u = V x.

    Attributes:
        name: the name that `activation(name)` knows it by.
        value: u -> act(u), any shape, keeps device and dtype.
        slope: u -> act'(u), same shape. At a kink the slope is that from the left.
        has_relu: whether the activation contains a ReLU, which the paper's gradient treats with
            a surrogate slope on the inactive side (see `published.py`).
        odd: whether act(-u) = -act(u). Then phi(-x) = -phi(x), and no attack on any loss of the
            span can tell x from -x.
        two_slopes: the slopes left and right of 0 of an activation with act(u) = s u on either
            side; None for all others.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    has_relu: bool = False
    odd: bool = False
    two_slopes: tuple[float, float] | None = None

    @property
    def linear_coefficient(self) -> float:
        """mu_1 = E[act'(z)], the Hermite coefficient of order one."""
        return self.hermite_coefficients(1)[1]

    @property
    def mean_square(self) -> float:
        """E[act(z)^2], the sum of all mu_r^2."""
        return _mean_square(self.value)

    @property
    def mean_square_slope(self) -> float:
        """E[act'(z)^2], the sum of all r mu_r^2."""
        return _mean_square(self.slope)

    @property
    def silent(self) -> bool:
        """Whether act(u) = 0 for all u < 0, as for a ReLU."""
        return not bool(self.value(torch.linspace(-8, -0.01, 100)).any())

    def hermite_coefficients(self, order: int) -> tuple[float, ...]:
        """The coefficients mu_0, .., mu_order of act in the normalised Hermite basis.

        mu_r = E[act(z) He_r(z)] / sqrt(r!), by adaptive quadrature on each side of the kink.

        Args:
            order: the highest order wanted, at least 0.

        Raises:
            ValueError: if `order` is negative.
        """
        if order < 0:
            raise ValueError(f"order must be at least 0, got {order}")
        return tuple(_hermite_coefficient(self, r) for r in range(order + 1))


@lru_cache(maxsize=1024)
def _hermite_coefficient(act: Activation, r: int) -> float:
    from scipy import special

    normaliser = math.exp(0.5 * special.gammaln(r + 1))
    # He_r(z) exp(-z^2 / 2) is below 1e-16 of its peak beyond this range.
    reach = 12.0 + math.sqrt(2.0 * r)
    coefficient = _normal_mean(
        lambda z: _at(act.value, z) * special.eval_hermitenorm(r, z) / normaliser, reach
    )
    return 0.0 if abs(coefficient) < 1e-12 else coefficient


@lru_cache(maxsize=64)
def _mean_square(function: Callable[[Tensor], Tensor]) -> float:
    return _normal_mean(lambda z: _at(function, z) ** 2, 12.0)


def _normal_mean(function: Callable[[float], float], reach: float) -> float:
    """E[function(z)], z ~ N(0, 1), by quadrature on each side of the kink, |z| up to `reach`."""
    from scipy import integrate

    def integrand(z: float) -> float:
        return function(z) * math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)

    halves = [
        integrate.quad(integrand, low, high, epsabs=1e-13, epsrel=1e-13, limit=200)[0]
        for low, high in ((-reach, 0.0), (0.0, reach))
    ]
    return float(np.sum(halves))


def _at(function: Callable[[Tensor], Tensor], z: float) -> float:
    return float(function(torch.tensor(z, dtype=torch.float64)))


def step(u: Tensor) -> Tensor:
    """1 where u > 0 and 0 elsewhere, in the dtype of u: the slope of a ReLU."""
    return torch.sign(torch.relu(u))  # several times as fast as a comparison and its conversion


def _tanh_slope(u: Tensor) -> Tensor:
    return 1 - torch.tanh(u).square()


def _normal_density(u: Tensor) -> Tensor:
    return torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi)


def _normal_cdf(u: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(u / math.sqrt(2)))


_ACTIVATIONS = {
    act.name: act
    for act in (
        Activation("relu", torch.relu, step, has_relu=True, two_slopes=(0.0, 1.0)),
        Activation(
            "relu+tanh",
            lambda u: torch.relu(u) + torch.tanh(u),
            lambda u: step(u) + _tanh_slope(u),
            has_relu=True,
        ),
        Activation("tanh", torch.tanh, _tanh_slope, odd=True),
        Activation(
            "gelu", lambda u: u * _normal_cdf(u), lambda u: _normal_cdf(u) + u * _normal_density(u)
        ),
        Activation(
            "erf",
            torch.erf,
            lambda u: torch.exp(-u.square()) * (2 / math.sqrt(math.pi)),
            odd=True,
        ),
        Activation("softplus", torch.nn.functional.softplus, torch.sigmoid),
    )
}


def activation_names() -> tuple[str, ...]:
    """The names that `activation` knows, in alphabetical order."""
    return tuple(sorted(_ACTIVATIONS))


def activation(name: str | Activation) -> Activation:
    """The activation of that name; an `Activation` is returned as it is.

    Raises:
        ValueError: if the name is not known.
    """
    if isinstance(name, Activation):
        return name
    if name not in _ACTIVATIONS:
        known = ", ".join(activation_names())
        raise ValueError(f"unknown activation {name!r}: expected one of {known}")
    return _ACTIVATIONS[name]
