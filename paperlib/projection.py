"""The projection loss, and its Gauss-Newton model at a set of candidates.

For parameters Theta (C, p) and candidates X^ (n, d) with features Phi = phi(X^) (n, p), the loss is

    L(X^) = || Theta P_perp ||^2 / || Theta ||^2,

P_perp projecting off the span of the rows of Phi (Section 4 of the paper). By variable projection
(Golub and Pereyra 1973) alpha = (Phi Phi^T)^-1 Phi Theta^T (n, C) and E = Theta - alpha^T Phi give
L = ||E||^2 / ||Theta||^2 and dL/dx_i = -2 J_i^T (E^T alpha_i) / ||Theta||^2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paperlib import one_reading
from paperlib.between_products import Given, TwoSlopes
from paperlib.checks import check_finite, check_rows, check_theta
from paperlib.expected_normal_matrix import expectation_pays
from paperlib.feature_map import FeatureBlock, FeatureMap
from paperlib.kept_activations import KeptActivations
from paperlib.lift import Lift
from paperlib.long_sum import LongSum
from paperlib.memory import NOTHING, PRODUCTS
from paperlib.normal_product import NormalProduct
from paperlib.precision import arithmetic
from paperlib.random_feature_block import RandomFeatureBlock

# Relative size below which a direction of the Gram matrix counts as absent: two candidates at the
# same point (or features in a common span) then share their coefficient instead of dividing by 0.
GRAM_CUTOFF = 1e-10


def projection_loss(model: FeatureMap, theta: Tensor, candidates: Tensor) -> Tensor:
    """The loss L of the paper at the candidates, a scalar, differentiable once.

    Args:
        model: the feature map phi.
        theta: trained minus initial parameters, (C, p), or (p,) for one output.
        candidates: (n, d), in the model's dtype. Rows need not lie on the sphere.

    Raises:
        ValueError: for wrong shapes, values that are not finite, or theta of zeros.
        TypeError: for dtypes that differ from the model's.
    """
    theta = check_theta(theta, model)
    check_rows("candidates", candidates, model)
    check_finite("candidates", candidates)
    return _ProjectionLoss.apply(candidates, model, theta)


class _ProjectionLoss(torch.autograd.Function):
    """Autograd through the closed-form gradient: nothing of size n x p is kept by autograd."""

    @staticmethod
    def forward(ctx, X: Tensor, model: FeatureMap, theta: Tensor) -> Tensor:
        point = Linearization(model, theta, X.detach())
        ctx.save_for_backward(point.loss_gradient)
        return X.new_tensor(point.loss)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None


def solve_gram(gram: Tensor, rhs: Tensor, *, cutoff: float = GRAM_CUTOFF) -> Tensor:
    """gram^-1 rhs in float64, with directions below `cutoff` of the largest left out."""
    return pseudo_inverse(gram, cutoff=cutoff) @ rhs.double()


def pseudo_inverse(gram: Tensor, *, cutoff: float = GRAM_CUTOFF) -> Tensor:
    """The inverse of a positive semi-definite matrix in float64, small directions left out."""
    values, vectors = significant_eigenpairs(gram.double(), cutoff=cutoff)
    return (vectors / values) @ vectors.T


def significant_eigenpairs(gram: Tensor, *, cutoff: float = GRAM_CUTOFF) -> tuple[Tensor, Tensor]:
    """Eigenvalues (k,) of (n, n) above `cutoff` of the largest, and their vectors (n, k)."""
    values, vectors = torch.linalg.eigh(gram)
    kept = values > cutoff * values[-1]
    return values[kept], vectors[:, kept]


class Linearization:
    """The loss at X, its gradient, and the products of its Gauss-Newton operator.

    The Gauss-Newton model of the residual over steps (dX, da, dw) of candidates, coefficients and
    (if lifted) the linear part is E - T with

        T = sum_i alpha_i (J_i dx_i)^T + da^T Phi + dw^T V^T    (C, p).

    One product with its normal matrix takes one reading of V: T of a block is pushed back before
    the next block is touched. Eliminating (da, dw) exactly would give Kaufman's operator
    A dX = P_perp sum_i alpha_i (J_i dx_i)^T, which needs two readings, since P_perp has to wait
    for T of all blocks; the preconditioner below inverts the (da, dw) block exactly instead.

    Attributes:
        X: (n, d) candidates.
        alpha: (n, C) coefficients, float64.
        loss: L, a float.
        gradient: -(1/2) ||Theta||^2 dL/dX = J_i^T E^T alpha_i, (n, d).
        slope_gram: tr(J_i^T J_j) / d, (n, n) float64; zeros where the preconditioner takes its
            expectation instead.
        gram: Phi P_perp(V) Phi^T, (n, n) float64.
        gram_cutoff: relative size below which a direction of it counts as absent.
        gram_inverse: its pseudo-inverse, (n, n) float64.
        residual: E, (C, p).
    """

    def __init__(
        self,
        model: FeatureMap,
        theta: Tensor,
        X: Tensor,
        *,
        lift: Lift | None = None,
        dtype: torch.dtype | None = None,
        curvature_dtype: torch.dtype | None = None,
        curvature: bool = False,
        keep: str = PRODUCTS,
    ):
        """Evaluate the loss and its gradient at X in two passes over the features.

        Args:
            model: the feature map.
            theta: (C, p), already without the span of V if `lift` is given.
            X: (n, d).
            lift: the projection off the columns of V, if the linear part is lifted.
            dtype: dtype of the features, default the model's.
            curvature_dtype: dtype of the features in `product`, default `dtype`.
            curvature: keep what `product` needs.
            keep: what stays of a block between passes, (n, h) each: "features and slopes", the
                "inputs" X V^T that both follow from, or "nothing", at the price of another
                product with V. A module keeps its features and linearised chunks in any case.
        """
        self.model, self.theta, self.X, self.lift = model, theta, X, lift
        self.dtype = model.dtype if dtype is None else dtype
        self.curvature_dtype = self.dtype if curvature_dtype is None else curvature_dtype
        self.keep = keep
        self.product_passes = 3 if keep == NOTHING else 2
        self.passes = 0
        self._forward(curvature)
        self._backward(curvature)

    def _forward(self, curvature: bool) -> None:
        """Gram matrix, right side and (if asked) preconditioner: features of all blocks."""
        model, lift = self.model, self.lift
        n, C = len(self.X), len(self.theta)
        new = lambda *shape: torch.zeros(shape, dtype=torch.float64, device=self.X.device)  # noqa: E731
        gram, rhs, slope_gram = new(n, n), new(n, C), new(n, n)
        cross = LongSum(n, model.d, device=self.X.device) if lift else None
        exact = torch.float64 if self.dtype != torch.bfloat16 else torch.float32
        measured = curvature and not expectation_pays(model, n)
        self._kept = KeptActivations(model, n, self.keep)
        low = self.X.to(self.dtype)
        for block in model.blocks(dtype=self.dtype):
            slopes = None if measured or self.keep == PRODUCTS else self._slopes(block, low)
            if slopes:
                inputs, features, through = one_reading.forward(low, block.stored, *slopes)
                state = None  # neither measured nor kept
                cross.add(through, block.stop - block.start)
            else:
                inputs, features, state = self._open(block)
                if lift:
                    cross.add(block.combine(features), block.stop - block.start)
            wide = features.to(exact)
            gram += wide @ wide.T
            rhs += wide @ self.theta[:, block.start : block.stop].T.to(exact)
            if measured:
                slope_gram += block.slope_gram(state)
            self._kept.put(block, inputs, features, state)
        self.passes += 2 if lift else 1
        cross = cross.total if lift else None
        model.sum_over_processes([gram, rhs, slope_gram] + ([cross] if lift else []))
        if lift:
            # (d, n); multiplied the other way round it takes up to nine times as long.
            self.cross_solved = (cross @ lift.inverse).T
            gram = gram - cross @ self.cross_solved
            gram = 0.5 * (gram + gram.T)
        self.gram, self.rhs = gram, rhs
        self.gram_cutoff = GRAM_CUTOFF if exact is torch.float64 else 1e-6
        self.gram_inverse = pseudo_inverse(gram, cutoff=self.gram_cutoff)
        self.alpha = self.gram_inverse @ rhs
        self.slope_gram = slope_gram
        self.linear = -(self.cross_solved @ self.alpha) if lift else None  # w, (d, C)

    def _open(self, block: FeatureBlock) -> tuple[Tensor | None, Tensor, Any]:
        """Inputs of a block, where there are any, features and the state of its Jacobian."""
        lifted = self.lift is not None
        inputs = block.inputs(self.X)
        if inputs is None:
            return None, *block.linearize(self.X, lifted=lifted)
        return inputs, *block.activate(inputs, lifted=lifted)

    def _slopes(self, block: FeatureBlock, X: Tensor) -> tuple[float, float] | None:
        """The two slopes of the activation if kernels read V once for both products of a pass.

        Args:
            block: of the features.
            X: the candidates in the format of the features.
        """
        if self.lift is None or len(self.theta) > 1:
            return None
        if self.theta.dtype != torch.float32 or not one_reading.takes_pass(X, block.stored):
            return None
        return block.two_slopes(lifted=True)

    def _backward(self, curvature: bool) -> None:
        """Residual, loss and gradient, and the blocks as `product` needs them."""
        model = self.model
        wide = self.theta.dtype
        alpha = self.alpha.to(wide)
        gradient = LongSum(*self.X.shape, device=self.X.device)
        square = torch.zeros(2, dtype=torch.float64, device=self.X.device)
        low = self.X.to(self.dtype)
        linear = self.linear.T.to(self.dtype) if self.lift else None
        # Zero where another process holds the features.
        residual = torch.zeros_like(self.theta)
        for block in model.blocks(dtype=self.dtype):
            part = slice(block.start, block.stop)
            slopes = self._slopes(block, low)
            inputs = self._kept.inputs(block, self.X) if slopes else None
            if inputs is not None:
                E, back = one_reading.backward(
                    linear,
                    block.stored,
                    TwoSlopes(inputs, *slopes),
                    self.theta[0, part],
                    alpha[:, 0],
                )
                E = E[None]
            else:
                features, state = self._kept.open(block, self.X, lifted=self.lift is not None)
                E = self.theta[:, part] - alpha.T @ features.to(wide)
                if self.lift:
                    E = E - block.project(self.linear.T).to(wide)
                # With one output, alpha is left for the end.
                back = block.vjp(state, E.expand(len(alpha), -1) if len(E) == 1 else alpha @ E)
            gradient.add(back, block.stop - block.start)
            residual[:, part] = E
            square[0] += E.double().square().sum()
            square[1] += self.theta[:, part].double().square().sum()
        self.passes += 1 if self.keep != NOTHING else 2
        gradient = gradient.total * self.alpha if len(self.theta) == 1 else gradient.total
        model.sum_over_processes([gradient, square])
        if curvature:
            self._kept.lower(self.curvature_dtype)
        else:
            self._kept.forget()
        self.residual = residual
        self.residual_square, self.total_square = square.tolist()
        self.gradient = gradient.to(self.X.dtype)
        self.loss = self.residual_square / self.total_square

    def forget_curvature(self) -> None:
        """Give up what only `product` needs: all that is as large as the features."""
        self._kept.forget()

    @property
    def loss_gradient(self) -> Tensor:
        """dL/dX, (n, d)."""
        return (-2 / self.total_square) * self.gradient

    def product(self, dX: Tensor, da: Tensor, dw: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The undamped normal matrix times a step (dX, da, dw): one reading of V.

        Args:
            dX: (n, d) step of the candidates.
            da: (n, C) step of the coefficients.
            dw: (C, d) step of the linear part, None without a lift.
        """
        n, dtype = len(self.X), arithmetic(self.curvature_dtype)
        blocks = self.model.blocks(dtype=self.curvature_dtype)
        if self.model.has_weights:
            product = NormalProduct(self.alpha, dX, da, dw, dtype=dtype)
            for block in blocks:
                product.add(block, self._activations(block))
            HX, Ha = product.total
        else:
            alpha, low, da_low = self.alpha.to(dtype), dX.to(dtype), da.to(dtype)
            HX, Ha = torch.zeros_like(dX), torch.zeros_like(da)
            for block in blocks:
                features, state = self._kept.open(block, self.X, lifted=False)
                T = alpha.T @ block.jvp(state, low) + da_low.T @ features
                HX += block.vjp(state, alpha @ T)
                Ha += (features @ T.T).to(da.dtype)
        self.passes += self.product_passes
        self.model.sum_over_processes([HX, Ha])
        return HX[:n], Ha, (None if dw is None else HX[n:])

    def _activations(self, block: RandomFeatureBlock) -> Given | TwoSlopes:
        """Features and slopes of a block at X, or the inputs that tell them at once."""
        lifted = self.lift is not None
        slopes = block.two_slopes(lifted=lifted)
        inputs = self._kept.inputs(block, self.X) if slopes else None
        if inputs is None:
            return Given(*self._kept.open(block, self.X, lifted=lifted))
        return TwoSlopes(inputs, *slopes)
