"""Directions of samples from the second moment of the parameters.

With theta_k = sum_i alpha_i act(v_k . x_i) and the linear part taken out, the matrix

    M = (d / p) sum_k (theta_k - mean(theta)) v_k v_k^T

has mean c_2 sum_i alpha_i x_i x_i^T / d,
c_2 = E[act(z) (z^2 - 1)]. What it deviates by is close to a symmetric random matrix with a
semicircle of radius 2 s, s = std(theta) sqrt(d / p). Eigenvalues beyond it belong to samples
(Baik, Ben Arous and Peche 2005): for a ReLU those with |alpha_i| above 0.75 sqrt(d / p) |alpha|.
As |alpha| is about sqrt(n) times a typical |alpha_i|, this too is a condition on p / (d n) alone.

C outputs give C matrices side by side, (d, C d), whose left singular vectors are taken; the
formulas for their overlap with the truth are those of Benaych-Georges and Nadakuditi 2012 (arXiv
1103.2221).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from paperlib.feature_map import FeatureMap
from paperlib.symmetric_product import SymmetricSum
from paperlib.weight_gram import WeightGram

# A direction inside the bulk of the spectrum still begins with a little overlap.
LEAST_OVERLAP, MOST_OVERLAP = 0.15, 0.98


def second_moment_coefficient(model: FeatureMap) -> float:
    """c_2 = E[act(z) (z^2 - 1)], sqrt(2) times the Hermite coefficient of order two."""
    return math.sqrt(2) * model.activation.hermite_coefficients(2)[2]


class SpectralStart:
    """The second moment of whatever the features leave unexplained, and its outliers."""

    def __init__(
        self,
        model: FeatureMap,
        c_2: float,
        *,
        dtype: torch.dtype,
        weight_gram: WeightGram | None = None,
    ):
        """Take V^T V, or form it.

        Args:
            model: random features with weights V.
            c_2: E[act(z) (z^2 - 1)], not 0.
            dtype: of the products with V.
            weight_gram: V^T V in that dtype, where it is there already.
        """
        self.model, self.c_2, self.dtype = model, c_2, dtype
        self.weight_gram = WeightGram(model, dtype=dtype) if weight_gram is None else weight_gram

    def linear_part(self, Y: Tensor) -> Tensor:
        """The w (C, d) for which w V^T is closest to Y (C, p)."""
        return (self.weight_gram.products(Y) @ self.weight_gram.inverse).to(Y.dtype)

    def second_moments(self, Y: Tensor) -> tuple[Tensor, Tensor]:
        """The matrices M, (C, d, d) float64, and the scale s of their noise (per output, rms)."""
        model, C = self.model, len(Y)
        w = self.linear_part(Y)
        moments = [SymmetricSum(model.d, device=Y.device) for _ in range(C)]
        sums = torch.zeros(2, C, dtype=torch.float64, device=Y.device)
        for block in model.blocks(dtype=self.dtype):
            V = block.weights
            rest = Y[:, block.start : block.stop] - block.project(w).to(Y.dtype)
            sums += torch.stack([rest.double().sum(1), rest.double().square().sum(1)])
            for moment, row in zip(moments, rest, strict=True):
                moment.add(V * row.to(V.dtype)[:, None], V)
        M = torch.stack([moment.total for moment in moments])
        model.sum_over_processes([M, sums])
        mean, square = sums / model.p
        M -= mean[:, None, None] * self.weight_gram.gram
        M *= model.d / model.p
        scale = ((square - mean.square()).mean().clamp(min=0) * model.d / model.p).sqrt()
        return 0.5 * (M + M.mT), scale

    def directions(
        self, Y: Tensor, count: int, *, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `count` strongest directions in Y, (C, p); see `directions_of`."""
        parts = self.directions_of(*self.second_moments(Y), count, generator=generator)
        return tuple(part.to(Y.dtype) for part in parts)

    def directions_of(
        self, M: Tensor, s: Tensor, count: int, *, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The `count` strongest directions of second moments.

        Singular vectors of samples that are equally strong over all outputs are mixed. A random
        combination of the outputs tells them apart.

        Args:
            M: (C, d, d) float64, of `second_moments`.
            s: the scale of their noise.
            count: how many directions.
            generator: source of that combination.

        Returns:
            Unit vectors (count, d); the square of their expected overlap with a sample (count,);
            the coefficients (count, C) of the samples they stand for.
        """
        C = len(M)
        square = torch.einsum("cij,cjk->ik", M, M)
        U = torch.linalg.eigh(square).eigenvectors[:, -count:].T
        if C > 1:
            weights = torch.randn(C, generator=generator, dtype=torch.float64).to(M.device)
            mixture = torch.einsum("ai,cij,bj,c->ab", U, M, U, weights)
            U = torch.linalg.eigh(mixture).eigenvectors.T @ U
        strengths = torch.einsum("ki,ij,kj->k", U, square, U)
        order = strengths.argsort(descending=True)
        U, strengths = U[order], strengths[order]
        # In units of the noise of the (d, C d) matrix: lambda^2 and the theta^2 behind it.
        observed = strengths.clamp(min=1e-30) / (C * s.square())
        excess = observed - 1 - 1 / C
        outside = excess > 2 / C**0.5
        behind = (excess + (excess.square() - 4 / C).clamp(min=0).sqrt()) / 2
        behind = torch.where(outside, behind, observed / 4)
        overlap = 1 - (1 + behind) / (C * behind * (behind + 1 / C))
        shrink = (behind / observed).sqrt()
        alpha = torch.einsum("ki,cij,kj->kc", U, M, U) * shrink[:, None] / self.c_2
        return U, overlap.clamp(LEAST_OVERLAP, MOST_OVERLAP), alpha
