"""A range of features act(v_k . x): their values, slopes and the two products with V."""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.activations import Activation
from paperlib.feature_map import FeatureBlock
from paperlib.int8 import Int8Rows
from paperlib.matrix_product import combine, project
from paperlib.precision import arithmetic


class RandomFeatureBlock(FeatureBlock):
    """The features act(v_k . x) of a range of rows v_k.

    Attributes:
        start: the first feature.
        stop: one after the last.
        stored: V as it is kept, (h, d). Kernels multiply float16 as it is.
    """

    def __init__(
        self, start: int, weights: Tensor | Int8Rows, activation: Activation, linear: float
    ):
        """Hold rows start, .. of V, shape (h, d)."""
        self.start = start
        self.stop = start + len(weights)
        self.stored = weights
        self.activation = activation
        self.linear = linear

    def linearize(self, X: Tensor, *, lifted: bool = False) -> tuple[Tensor, Tensor]:
        """Features (n, h) and the slopes act'(u), (n, h), as state."""
        return self.activate(self.inputs(X), lifted=lifted)

    def inputs(self, X: Tensor) -> Tensor:
        """U = X V^T, (n, h)."""
        return self.project(X)

    def project(self, A: Tensor) -> Tensor:
        """A V^T, (m, h), for A of shape (m, d)."""
        V = self.stored
        A = A.to(arithmetic(V.dtype))
        return V.project(A) if self.in_int8 else project(A, V)

    def combine(self, W: Tensor) -> Tensor:
        """W V, (m, d), for W of shape (m, h)."""
        return self.stored.combine(W) if self.in_int8 else combine(W, self.stored)

    @property
    def weights(self) -> Tensor | Int8Rows:
        """V in the format of the arithmetic: a copy, where it is stored in float16."""
        return self.stored if self.in_int8 else self.stored.to(arithmetic(self.stored.dtype))

    @property
    def in_int8(self) -> bool:
        """Whether the rows of V are rounded to 8 bits."""
        return isinstance(self.stored, Int8Rows)

    def activate(self, inputs: Tensor, *, lifted: bool = False) -> tuple[Tensor, Tensor]:
        """Features act(u), (n, h), and the slopes act'(u), (n, h), as state."""
        U = inputs.to(arithmetic(self.stored.dtype))
        features, slope = self.activation.value(U), self.activation.slope(U)
        if lifted:
            features = torch.sub(features, U, alpha=self.linear)
            slope = slope - self.linear
        return features, slope

    def two_slopes(self, *, lifted: bool = False) -> tuple[float, float] | None:
        """The slopes left and right of 0 where those are all that there are, see `Activation`."""
        if self.activation.two_slopes is None:
            return None
        left, right = (slope - lifted * self.linear for slope in self.activation.two_slopes)
        return left, right

    def jvp(self, state: Tensor, dX: Tensor) -> Tensor:
        """Slopes * (dX V^T), (n, h)."""
        return state * self.project(dX)

    def vjp(self, state: Tensor, W: Tensor) -> Tensor:
        """(slopes * W) V, (n, d)."""
        return self.combine(state * W.to(state.dtype))

    def slope_gram(self, state: Tensor) -> Tensor:
        """sum_k act'(u_ik) act'(u_jk) ||v_k||^2 / d, with ||v_k||^2 at its mean, 1."""
        S = state if state.dtype == torch.float64 else state.float()
        return S @ S.T / self.stored.shape[1]
