"""A product with the normal matrix of a Gauss-Newton step, tile by tile of the weights V.

For steps (dX, da, dw) of candidates, coefficients and linear part, and features act(v_k . x_i) with
slopes s_ik = act'(v_k . x_i), a tile changes the residual by

    T = sum_i alpha_i (s_i * (V dx_i))^T + da^T Phi + dw V^T    (C, h),

and adds sum_k s_ik (alpha_i . T_k) v_k to row i of the product, Phi T^T to that of da and T V to
that of dw. A tile of V is read once: the rows of dw ride along with those of dX, and one buffer
holds what goes through V and what comes back. Scales, of 8 bits and of alpha where there is one
output, are multiplied in where the arrays are smallest: an operation on (n, h) takes 2 to 4% of a
product. On matrix units all of it is one call (`one_reading.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib import between_products, one_reading
from paperlib.between_products import Given, TwoSlopes
from paperlib.int8 import Int8Rows
from paperlib.random_feature_block import RandomFeatureBlock


class NormalProduct:
    """The sums over the tiles of one product."""

    def __init__(
        self, alpha: Tensor, dX: Tensor, da: Tensor, dw: Tensor | None, *, dtype: torch.dtype
    ):
        """Take a step and make it ready for V.

        Args:
            alpha: (n, C) coefficients.
            dX: (n, d) step of the candidates.
            da: (n, C) step of the coefficients.
            dw: (C, d) step of the linear part, None without a lift.
            dtype: that V is multiplied in; float32 where it is in 8 bits.
        """
        self.n, self.outputs = alpha.shape
        self.alpha, self.da = alpha.to(dtype), da.to(dtype)
        self.sent = dX.to(dtype) if dw is None else torch.cat([dX, dw]).to(dtype)
        self.rounded: Int8Rows | None = None  # the same in 8 bits
        # Row after row, as kernels add to them: `zeros_like` would follow the strides of the step.
        self.HX = torch.zeros(self.sent.shape, dtype=dX.dtype, device=dX.device)
        self.Ha = torch.zeros(da.shape, dtype=da.dtype, device=da.device)

    def add(self, block: RandomFeatureBlock, activations: Given | TwoSlopes) -> None:
        """Add a tile, given its features and slopes, or what both follow from."""
        n, V = self.n, block.stored
        if block.in_int8 and self.rounded is None:
            self.rounded = Int8Rows.of(self.sent)
        sent = self.rounded if block.in_int8 else self.sent
        if one_reading.takes(sent, V, activations, self.outputs):
            alpha, da, linear = self._numbers(block)
            one_reading.add_product(
                sent, V, activations, alpha, da, self.HX, self.Ha, linear=linear
            )
            return
        U = V.whole_project(sent) if block.in_int8 else block.project(sent)
        if between_products.takes(U, activations, self.outputs):
            return self._add_at_once(block, U, activations)
        if isinstance(activations, TwoSlopes):
            activations = activations.written_out(U.dtype)
        features, state = activations

        if block.in_int8:
            rows = self.rounded.scale[:, None]
            T = (self.alpha * rows[:n]).T @ U[:n].mul_(state)
            if len(U) > n:
                T += rows[n:] * U[n:]
            T *= V.scale
        else:
            T = self.alpha.T @ U[:n].mul_(state)
            if len(U) > n:
                T += U[n:]
        T.addmm_(self.da.T, features)
        self.Ha += (features @ T.T).to(self.Ha.dtype)

        # Back through V, in the same buffer.
        back = T * V.scale if block.in_int8 else T
        if self.outputs == 1:
            torch.mul(state, back, out=U[:n])  # times alpha in the end
        else:
            torch.mm(self.alpha, back, out=U[:n])
            U[:n].mul_(state)
        if len(U) > n:
            U[n:] = back
        self.HX += V.whole_combine(U) if block.in_int8 else block.combine(U)

    def _add_at_once(
        self, block: RandomFeatureBlock, U: Tensor, activations: Given | TwoSlopes
    ) -> None:
        """The same from U on, by the kernel for one output."""
        V = block.stored
        alpha, da, linear = self._numbers(block)
        scales = V.scale if block.in_int8 else None
        W, Ha = between_products.turn(U, activations, alpha, da, linear=linear, scales=scales)
        self.Ha += Ha[:, None]
        self.HX += V.combine_rounded(W) if block.in_int8 else block.combine(W)

    def _numbers(self, block: RandomFeatureBlock) -> tuple[Tensor, Tensor, float]:
        """Coefficients, their step and a factor of the linear part, for one output."""
        alpha, da, linear = self.alpha[:, 0], self.da[:, 0], 1.0
        if block.in_int8:  # the scales of the step
            scale = self.rounded.scale
            alpha = alpha * scale[: self.n]
            linear = float(scale[self.n]) if len(scale) > self.n else 0.0
        return alpha, da, linear

    @property
    def total(self) -> tuple[Tensor, Tensor]:
        """The products with (dX, dw), (n or n + C, d), and with da, (n, C), of the tiles so far."""
        HX = self.HX
        if self.outputs == 1:
            HX = torch.cat([HX[: self.n] * self.alpha.to(HX.dtype), HX[self.n :]])
        return HX, self.Ha
