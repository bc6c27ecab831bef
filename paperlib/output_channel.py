"""What a parameter says about one pre-activation: the output channel of message passing.

Of the pre-activation z of one sample at one feature only z ~ N(omega, tau) is known. This file
holds what then follows for the features and, once theta_k is seen, for z itself:

    mean and variance of f(z),   and   g = (E[z | theta_k] - omega) / tau,

the score, called g_out where message passing is described (Rangan 2011, arXiv 1010.5141). f is the
activation without its linear part, of which message passing keeps account separately. Every
integral is a sum over a grid in z.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.activations import Activation

# Grid of the integrals, in standard deviations of the belief.
NODES, REACH = 31, 4.5


class OutputChannel:
    """f(z) for z ~ N(omega, tau), before and after theta_k is seen.

    Attributes:
        mu: mu_1, the coefficient of the linear part that is taken off the activation.
        t: (nodes,) the grid, in standard deviations of the belief.
        even: whether f is even, so that no feature tells z from -z.
    """

    def __init__(self, activation: Activation, device: torch.device | str):
        """An activation, and a grid in float32 on that device."""
        self.activation = activation
        self.mu = activation.linear_coefficient
        self.t = torch.linspace(-REACH, REACH, NODES, dtype=torch.float32, device=device)
        self.log_weight = torch.log_softmax(-self.t.square() / 2, 0)
        self.weight = self.log_weight.exp()
        self.spacing = 2 * REACH / (NODES - 1)
        f = self.rest(self.t)
        self.even = bool((f - f.flip(0)).abs().max() <= 1e-4 * f.abs().max())

    def rest(self, z: Tensor) -> Tensor:
        """f, the activation without its linear part."""
        return self.activation.value(z) - self.mu * z

    def moments(self, omega: Tensor, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values f(z) on the grid, their mean and their variance.

        Args:
            omega: (n, h) means of z.
            tau: (n,) their variances, one a sample.

        Returns:
            (n, h, nodes), (n, h) and (n, h).
        """
        f = self.rest(omega[:, :, None] + tau.sqrt()[:, None, None] * self.t)
        mean = f @ self.weight
        return f, mean, (f.square() @ self.weight - mean.square()).clamp(min=0)

    def mean_variance(self, tau: Tensor) -> Tensor:
        """The mean of Var f(z) over features, (n,): there omega ~ N(0, 1 - tau)."""
        omega = (1 - tau).clamp(min=0).sqrt()[:, None] * self.t
        return self.moments(omega, tau)[2] @ self.weight

    def coarseness(self, gain: Tensor, tau: Tensor) -> Tensor:
        """Variance of `gain` times z below which points of the grid are not told apart, (n,)."""
        return 0.5 * gain.square() * tau * self.spacing**2

    def score(self, f: Tensor, tau: Tensor, gain: Tensor, seen: Tensor, noise: Tensor) -> Tensor:
        """The score g, where `gain` times f(z) is seen with Gaussian noise.

        Args:
            f: (n, h, nodes), from `moments`.
            tau: (n,).
            gain: (n,).
            seen: (n, h).
            noise: (n, h) variances.

        Returns:
            (n, h).
        """
        misses = seen[:, :, None] - gain[:, None, None] * f
        density = torch.softmax(self.log_weight - misses.square() / (2 * noise[:, :, None]), -1)
        return (density @ self.t) / tau.sqrt()[:, None]
