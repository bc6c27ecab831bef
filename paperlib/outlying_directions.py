"""Directions in which samples lie, found without ever forming a d x d matrix.

The second moment of the parameters, or of what candidates leave unexplained of them,

    M_c = (d / p) sum_k (E_ck - mean(E_c)) v_k v_k^T    (one matrix for each output c),

has eigenvalues beyond the edge of a random matrix's spectrum where samples are missing or not yet
sharp (`spectral_start.py`). Their eigenvectors are found by a Chebyshev filter on sum_c M_c^2,
which is at most one below the edge and grows exponentially beyond it (Zhou and Saad 2007), and the
method of Rayleigh and Ritz: products of V with a few dozen rows in place of d.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.feature_map import FeatureMap
from paperlib.weight_gram import WeightGram

# Degree of the filter in sum_c M_c^2: with one output, twice that in M.
DEGREE = 4

# An eigenvalue counts as outlying this far beyond the edge, relatively (in M, not in its square).
BEYOND = 1.025

# Rows that are filtered at once, at first; doubled while all of them turn out to be outlying.
ROWS = 48


class SecondMoment:
    """sum_c M_c^2 as an operator on rows.

    Attributes:
        edge: where the spectrum of pure noise would end.
        passes: readings of V so far.
    """

    def __init__(self, model: FeatureMap, Y: Tensor, gram: WeightGram, *, dtype: torch.dtype):
        """Take the means and the scale of the noise.

        Args:
            model: features with weights V.
            Y: (C, p) parameters, or residuals, without their part in the span of V.
            gram: V^T V.
            dtype: of the products with V.
        """
        self.model, self.Y, self.dtype, self.passes = model, Y, dtype, 0
        self.gram = gram.gram.to(Y.dtype)
        C = len(Y)
        sums = torch.zeros(2, C, dtype=torch.float64, device=Y.device)
        for block in model.blocks(dtype=dtype):
            part = Y[:, block.start : block.stop].double()
            sums += torch.stack([part.sum(1), part.square().sum(1)])
        model.sum_over_processes([sums])
        mean, square = sums / model.p
        self.mean = mean.to(Y.dtype)
        variance = float((square - mean.square()).mean().clamp(min=0)) * model.d / model.p
        # Marchenko and Pastur's edge for C matrices side by side; 4 times the variance for one.
        self.edge = C * variance * (1 + C**-0.5) ** 2

    def of_outputs(self, Q: Tensor) -> Tensor:
        """The rows of Q times each M_c: (C, q, d) for Q of shape (q, d)."""
        C, (q, d) = len(self.Y), Q.shape
        total = torch.zeros(C * q, d, dtype=torch.float64, device=Q.device)
        for block in self.model.blocks(dtype=self.dtype):
            U = block.project(Q)
            weights = self.Y[:, None, block.start : block.stop].to(U.dtype)
            total += block.combine((weights * U).flatten(0, 1))
        return self._centred(total.view(C, q, d), self.mean[:, None, None] * Q)

    def __call__(self, Q: Tensor) -> Tensor:
        """Q sum_c M_c^2, (q, d)."""
        C, (q, d) = len(self.Y), Q.shape
        inner = self.of_outputs(Q)
        total = torch.zeros(q, d, dtype=torch.float64, device=Q.device)
        for block in self.model.blocks(dtype=self.dtype):
            U = block.project(inner.flatten(0, 1)).view(C, q, -1)
            weights = self.Y[:, None, block.start : block.stop].to(U.dtype)
            total += block.combine((weights * U).sum(0))
        return self._centred(total, torch.einsum("c,cqd->qd", self.mean, inner))

    def _centred(self, total: Tensor, meant: Tensor) -> Tensor:
        """What the mean of Y contributes, taken out; in the dtype of Y."""
        self.passes += 2
        self.model.sum_over_processes([total])
        return (total.to(meant.dtype) - meant @ self.gram) * (self.model.d / self.model.p)


def outlying_directions(
    model: FeatureMap,
    Y: Tensor,
    gram: WeightGram,
    *,
    most: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    """Eigenvectors of the second moment of Y beyond the edge, strongest first.

    Args:
        model: features with weights V.
        Y: (C, p) without its part in the span of V.
        gram: V^T V.
        most: at most so many.
        dtype: of the products with V.
        generator: source of the rows that are filtered.

    Returns:
        Unit vectors (k, d), 1 <= k <= most: one even if none is outlying. And how often V was read.
    """
    moment = SecondMoment(model, Y, gram, dtype=dtype)
    most = min(most, model.d)
    rows = min(ROWS, most)
    while True:
        Q = torch.randn(rows, model.d, generator=generator).to(Y)
        Q = torch.linalg.qr(Q.T)[0].T
        previous, filtered = Q, 2 / moment.edge * moment(Q) - Q
        for _ in range(DEGREE - 1):
            # Chebyshev's recurrence, with the spectrum of the noise mapped to [-1, 1].
            following = 2 * (2 / moment.edge * moment(filtered) - filtered) - previous
            previous, filtered = filtered, following
        Q = torch.linalg.qr(filtered.double().T)[0].T.to(Y)
        image = moment.of_outputs(Q).double()
        values, mixing = torch.linalg.eigh(torch.einsum("cid,cjd->ij", image, image))
        outlying = int((values > BEYOND**2 * moment.edge).sum())
        if outlying < rows or rows == most:
            break
        rows = min(2 * rows, most)
    strongest = mixing[:, -max(outlying, 1) :].flip(1)
    return strongest.T.to(Y) @ Q, moment.passes
