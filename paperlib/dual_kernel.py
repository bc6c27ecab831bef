"""The dual kernel of an activation: what its features have in common, on average over the weights.

For u, u' standard normal with correlation rho (v . x and v . x' for weights v ~ N(0, I / d) and
inputs on the sphere of radius sqrt(d)),

    k(rho) = E[act(u) act(u')] = sum_r mu_r^2 rho^r

with the Hermite coefficients mu_r (Daniely, Frostig and Singer 2016, "dual activation"). Its
derivatives belong to the slopes: k'(rho) = E[act'(u) act'(u')], and so on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.activations import Activation

# Hermite coefficients up to this order; what is beyond matters only between equal inputs.
ORDER = 24


class DualKernel:
    """k, k' and k'' at correlations of inputs, as n x n matrices.

    The series is cut at `ORDER`; what it leaves out is added between equal inputs, on the diagonal.
    All three belong to one positive semi-definite kernel.

    Attributes:
        coefficients: mu_0, mu_1, .. , float64.
    """

    def __init__(self, activation: Activation, *, lifted: bool):
        """Expand an activation.

        Args:
            activation: act.
            lifted: leave out its linear part mu_1 z.
        """
        self.coefficients = torch.tensor(
            activation.hermite_coefficients(ORDER), dtype=torch.float64
        )
        self.square = activation.mean_square
        self.slope_square = activation.mean_square_slope
        if lifted:
            # mu_1 is the mean of the slope, too.
            linear = float(self.coefficients[1])
            self.square -= linear**2
            self.slope_square -= linear**2
            self.coefficients[1] = 0

    def __call__(self, rho: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, k' and k'' of correlations.

        Args:
            rho: (n, n) float64, symmetric, of n inputs with one another.
        """
        r = torch.arange(len(self.coefficients), dtype=rho.dtype)
        weights = self.coefficients.to(rho.dtype).square()
        series = [weights, (r * weights)[1:], (r * (r - 1) * weights)[2:]]
        kernel, first, second = (_polynomial(terms.tolist(), rho) for terms in series)
        kernel.diagonal().fill_(self.square)
        first.diagonal().fill_(self.slope_square)
        return kernel, first, second


def _polynomial(terms: list[float], x: Tensor) -> Tensor:
    """sum_r terms[r] x^r, by Horner's rule."""
    total = torch.zeros_like(x)
    for term in reversed(terms):
        total.mul_(x).add_(term)
    return total
