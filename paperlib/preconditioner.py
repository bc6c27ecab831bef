"""The preconditioner of the Gauss-Newton step: block diagonal in candidates and coefficients.

For the candidates, the Gauss-Newton matrix is close to M (x) I_d, with

    M_ij = (alpha_i . alpha_j) tr(J_i^T J_j) / d    (n, n),

so that samples with a small |alpha_i|, which starve under gradient descent, get steps of the same
size as the others. The coefficients and the linear part are solved for exactly.

Where the weights are random and the work is large, more is known: see
`expected_normal_matrix.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paperlib.sphere import to_tangent

if TYPE_CHECKING:
    from paperlib.projection import Linearization

# Keeps the damping of a candidate with alpha_i = 0 away from zero, relative to the mean.
DAMPING_FLOOR = 1e-3

# Least mu in what is inverted: M of two equal candidates is singular.
RIDGE = 1e-8


def damped(M: Tensor, mu: float, *, floor: float) -> tuple[Tensor, Tensor]:
    """M + mu D and the diagonal of mu D, D = diag(M) + floor times its mean.

    Args:
        M: (n, n), positive semi-definite.
        mu: damping, at least `RIDGE` in the matrix.
        floor: relative to the mean of the diagonal.
    """
    mean = M.diagonal().mean()
    # Where no feature is active at any candidate, M is zero; so is the gradient, whatever D is.
    D = M.diagonal() + torch.where(mean > 0, floor * mean, 1.0)
    return M + max(mu, RIDGE) * torch.diag(D), mu * D


class Preconditioner:
    """(M + mu D)^-1 (x) I_d on the candidates, D = diag(M) + floor; exact on the coefficients."""

    def __init__(self, point: Linearization, damping: float):
        """Factor the n x n matrix of the candidates.

        Args:
            point: the Gauss-Newton model, with curvature.
            damping: mu >= 0.
        """
        M = (point.alpha @ point.alpha.T) * point.slope_gram
        M, diagonal = damped(M, damping, floor=DAMPING_FLOOR)
        factor = torch.linalg.cholesky(M)
        self.inverse = torch.cholesky_inverse(factor).to(point.X.dtype)
        self.damping = diagonal[:, None].to(point.X.dtype)
        self.point = point

    def apply(
        self, rX: Tensor, ra: Tensor, rw: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The preconditioner times a residual, in the shapes of `Linearization.product`."""
        point = self.point
        zX = to_tangent(point.X, self.inverse @ rX)
        ra64 = ra.double()
        if rw is None:
            return zX, (point.gram_inverse @ ra64).to(ra.dtype), None
        lift = point.lift
        # (d, C); with the few columns on the right it takes thirty times as long.
        t = (rw @ lift.inverse32.to(rw.dtype)).T.double()
        za = point.gram_inverse @ (ra64 - point.cross_solved.T @ (rw.double().T))
        zw = t - point.cross_solved @ za
        return zX, za.to(ra.dtype), zw.T.to(rw.dtype)
