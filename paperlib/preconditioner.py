"""The preconditioner of the Gauss-Newton step: block diagonal in candidates and coefficients.

For the candidates, the Gauss-Newton matrix is close to M (x) I_d, with

    M_ij = (alpha_i . alpha_j) tr(J_i^T J_j) / d    (n, n),

so that samples with a small |alpha_i|, which starve under gradient descent, get steps of the same
size as the others. The coefficients and the linear part are solved for exactly.

Where the weights are random and the work is large, more is known: see
`expected_normal_matrix.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.projection import Linearization
from paperlib.sphere import to_tangent

# Keeps the damping of a candidate with alpha_i = 0 away from zero, relative to the mean.
DAMPING_FLOOR = 1e-3


class Preconditioner:
    """(M + mu D)^-1 (x) I_d on the candidates, D = diag(M) + floor; exact on the coefficients."""

    def __init__(self, point: Linearization, damping: float):
        """Factor the n x n matrix of the candidates.

        Args:
            point: the Gauss-Newton model, with curvature.
            damping: mu >= 0.
        """
        M = (point.alpha @ point.alpha.T) * point.slope_gram
        diagonal = M.diagonal()
        D = diagonal + DAMPING_FLOOR * diagonal.mean()
        eye = torch.diag(D)
        # A little above zero at mu = 0, where M of two equal candidates is singular.
        factor = torch.linalg.cholesky(M + max(damping, 1e-8) * eye)
        self.inverse = torch.cholesky_inverse(factor).to(point.X.dtype)
        self.damping = (damping * D)[:, None].to(point.X.dtype)
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
        t = (lift.inverse32.to(rw.dtype) @ rw.T).double()  # (d, C)
        za = point.gram_inverse @ (ra64 - point.cross_solved.T @ (rw.double().T))
        zw = t - point.cross_solved @ za
        return zX, za.to(ra.dtype), zw.T.to(rw.dtype)
