"""One sample at a time: what of a parameter tells most about it, the others taken as noise.

theta_k = sum_i alpha_i f(z_ik) + the linear part, and of each pre-activation z_ik only a belief is
held. For sample i all others are Gaussian noise of covariance B_i over the outputs, so what matters
of theta_k is one number,

    w_i . (theta_k - what the others are expected to add),   w_i = B_i^-1 alpha_i,

in which f(z_ik) has the factor w_i . alpha_i, the gain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.output_channel import OutputChannel


class Separation:
    """The statistics of n samples, and what they say about pre-activations.

    Attributes:
        noise: (C, C) covariance of theta_k about what is expected of it.
    """

    def __init__(self, channel: OutputChannel, alpha: Tensor, tau: Tensor, ground: Tensor):
        """Weigh the outputs.

        Args:
            channel: f and its integrals.
            alpha: (n, C) coefficients.
            tau: (n,) variances of the beliefs.
            ground: (C, C) covariance of what no sample's f is to explain.
        """
        self.channel, self.tau = channel, tau
        expected = channel.mean_variance(tau)
        self.noise = ground + (alpha.T * expected) @ alpha
        own = expected[:, None, None] * alpha[:, :, None] * alpha[:, None, :]
        self.w = torch.linalg.solve(self.noise - own, alpha)  # (n, C)
        self.gain = (self.w * alpha).sum(1)
        self.cross = (self.w @ alpha.T).square().fill_diagonal_(0)
        base = torch.einsum("ic,cd,id->i", self.w, ground, self.w)
        self.base = base + channel.coarseness(self.gain, tau) + 1e-30

    def scores(self, e: Tensor, f: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        """The scores g (n, h) of all samples at h features.

        Args:
            e: (C, h) parameters less what is expected of them.
            f: (n, h, nodes), and their mean (n, h) and variance (n, h), of `OutputChannel.moments`.
            mean: see f.
            variance: see f.
        """
        seen = self.w @ e + self.gain[:, None] * mean
        noise = self.base[:, None] + self.cross @ variance
        return self.channel.score(f, self.tau, self.gain, seen, noise)
