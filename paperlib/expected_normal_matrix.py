"""The preconditioner of the Gauss-Newton step where V is random: the expected normal matrix.

For weights v_k ~ N(0, I / d) and candidates on the sphere, the blocks of the normal matrix of
(X, alpha) are known on average (by Stein's lemma; k is the dual kernel, rho_ij = x_i . x_j / d):

    J_i^T J_j     = (p / d) (k'(rho_ij) I + k''(rho_ij) x_j x_i^T / d)    on the tangent spaces,
    J_i^T phi_j   = (p / d) k'(rho_ij) x_j,
    phi_i . phi_j = p k(rho_ij),

and the linear part, once lifted, is on average orthogonal to all of them. Relative to this matrix,
the eigenvalues of the true one lie within Marchenko and Pastur's (1 +- sqrt(d n / p))^2, for any
candidates and any alpha: conjugate gradients need about as many products for pictures, which are
alike, as for random points. With k' alone (`preconditioner.py`) the directions in the span of the
candidates stay ill-conditioned, and the samples with a small |alpha_i| with them.

Off the span of the candidates the matrix is M (x) I and is inverted as it stands. In the span it
acts on n x n numbers; there it is inverted by conjugate gradients of its own, which read no
features.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from paperlib.conjugate_gradients import conjugate_gradients
from paperlib.dual_kernel import DualKernel
from paperlib.feature_map import FeatureMap
from paperlib.preconditioner import RIDGE, damped
from paperlib.sphere import to_tangent

if TYPE_CHECKING:
    from paperlib.projection import Linearization

# From so many multiplications a pass on, fewer passes are worth n x n products.
WORTHWHILE = 1e8

# How far the system in the span is solved: to this relative residual, in at most so many products.
INNER_TOLERANCE, MOST_INNER = 1e-2, 200

# Keeps the damping of a candidate with alpha_i = 0 away from zero, relative to the mean. A larger
# one holds samples with a tiny |alpha_i| where they are.
DAMPING_FLOOR = 1e-5


def expectation_pays(model: FeatureMap, n: int) -> bool:
    """Whether the expected normal matrix of n candidates is known and worth its work."""
    return model.gaussian_weights and n * model.p * model.d >= WORTHWHILE


class ExpectedNormalMatrix:
    """The damped expected normal matrix at a point, and its inverse.

    Attributes:
        damping: mu D, (n, 1), of the candidates.
    """

    def __init__(self, point: Linearization, damping: float):
        """Form what is n x n.

        Args:
            point: the Gauss-Newton model.
            damping: mu >= 0.
        """
        model, self.X, self.lift = point.model, point.X, point.lift
        n, d = self.X.shape
        X = self.X.double()
        kernel = DualKernel(model.activation, lifted=self.lift is not None)
        k, first, second = kernel((X @ X.T / d).clamp(-1, 1))
        scale = model.p / d
        self.alpha = point.alpha
        pairs = self.alpha @ self.alpha.T
        self.M, diagonal = damped(pairs * first * scale, damping, floor=DAMPING_FLOOR)
        self.damping = diagonal[:, None].to(self.X.dtype)
        self.curvature = pairs * second * (scale / d)
        self.coupling = first * scale
        eye = torch.eye(n, dtype=k.dtype, device=k.device)
        self.gram = model.p * (k + RIDGE * k.diagonal().max() * eye)
        self.M_inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.M))
        self.gram_inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.gram))
        # X = rows basis^T: the span of the candidates in coordinates.
        self.basis, rows = torch.linalg.qr(X.T)
        self.rows = rows.T.contiguous()
        self.directions = self.rows / torch.linalg.vector_norm(self.rows, dim=1, keepdim=True)

    def apply(
        self, rX: Tensor, ra: Tensor, rw: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Its inverse times a residual, in the shapes of `Linearization.product`."""
        basis = self.basis.to(rX.dtype)
        inside = rX @ basis
        zX = self.M_inverse.to(rX.dtype) @ (rX - inside @ basis.T)
        n, k = inside.shape
        solution = conjugate_gradients(
            self._product,
            torch.cat([inside.double().flatten(), ra.double().flatten()]),
            self._precondition,
            tolerance=INNER_TOLERANCE,
            max_iterations=MOST_INNER,
        )
        zX = zX + solution.x[: n * k].view(n, k).to(rX.dtype) @ basis.T
        za = solution.x[n * k :].view_as(ra).to(ra.dtype)
        zw = None if rw is None else rw @ self.lift.inverse32.to(rw.dtype)
        return to_tangent(self.X, zX), za, zw

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Steps of the candidates in the span, (n, k), and of alpha, (n, C)."""
        n, k = self.rows.shape
        return v[: n * k].view(n, k), v[n * k :].view(n, -1)

    def _product(self, v: Tensor) -> Tensor:
        """The matrix in the span times a step."""
        dX, da = self._split(v)
        along = dX @ self.rows.T  # dx_i . x_j
        weights = torch.addcmul(self.curvature * along.T, self.coupling, self.alpha @ da.T)
        HX = torch.addmm(self.M @ dX, weights, self.rows)
        Ha = torch.addmm(self.gram @ da, (self.coupling * along).T, self.alpha)
        return torch.cat([self._to_tangent(HX).flatten(), Ha.flatten()])

    def _precondition(self, v: Tensor) -> Tensor:
        """Its two diagonal blocks without k'', inverted."""
        rX, ra = self._split(v)
        zX = self._to_tangent(self.M_inverse @ rX)
        return torch.cat([zX.flatten(), (self.gram_inverse @ ra).flatten()])

    def _to_tangent(self, dX: Tensor) -> Tensor:
        """Steps in the span without their components along the candidates, see `to_tangent`."""
        along = (self.directions * dX).sum(1, keepdim=True)
        return torch.addcmul(dX, along, self.directions, value=-1)
