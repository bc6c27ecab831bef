"""What lies between the two products of a pass, in one reading of its arrays.

With one output, slopes s_ik and features phi_ik, (n, h), of a tile, and what came through V,
u_ik = v_k . dx_i and u_nk = v_k . dw, it is

    T_k   = sum_i alpha_i s_ik u_ik + sum_i da_i phi_ik + u_nk
    Ha_i  = sum_k phi_ik T_k
    w_ik  = s_ik T_k,   w_nk = T_k.

With few rows, these few operations an entry, one after another in torch, take a fifth of the time
of a product: each reads and writes arrays of (n, h), and each has to be called. Where V is in 8
bits, its scales and those of dX are multiplied in here, and W is rounded to 8 bits. Where the
activation is linear on either side of 0, as a ReLU is with or without its linear part, slopes and
features are one comparison and one product away from its inputs, and are never written.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paperlib import few_rows
from paperlib.activations import step
from paperlib.compiled import call, has
from paperlib.instructions import vector_instructions
from paperlib.int8 import Int8Rows

SOURCE = "between_products.cpp"

# The formats of the inputs v_k . x_i from which slopes and features may follow, for each of U.
INPUT_FORMATS = {
    torch.float32: (torch.float32, torch.float16),
    torch.bfloat16: (torch.bfloat16,),
}


class Given(NamedTuple):
    """Features and slopes, (n, h) each."""

    features: Tensor
    slopes: Tensor


class TwoSlopes(NamedTuple):
    """Inputs (n, h) of an activation with act(u) = left u for u <= 0 and right u beyond."""

    inputs: Tensor
    left: float
    right: float

    def written_out(self, dtype: torch.dtype) -> Given:
        """Features and slopes."""
        u = self.inputs.to(dtype)
        slopes = step(u).mul_(self.right - self.left).add_(self.left)
        return Given(slopes * u, slopes)


class Turned(NamedTuple):
    """What goes back through V, (n or n + 1, h), and what goes to da, (n,) float32."""

    W: Tensor | Int8Rows
    Ha: Tensor


def takes(U: Tensor, activations: Given | TwoSlopes, outputs: int) -> bool:
    """Whether there is a kernel for these arrays."""
    if outputs != 1 or U.device.type != "cpu" or not U.is_contiguous():
        return False
    if not reads(activations, U.dtype) or U.dtype not in few_rows.NAMES:
        return False
    return vector_instructions(U.device) and has(SOURCE, f"turn_{few_rows.NAMES[U.dtype]}")


def reads(activations: Given | TwoSlopes, dtype: torch.dtype) -> bool:
    """Whether kernels on numbers of that format read these activations."""
    if isinstance(activations, TwoSlopes):
        arrays = [activations.inputs]
        known = activations.inputs.dtype in INPUT_FORMATS.get(dtype, ())
    else:
        arrays = list(activations)
        known = all(array.dtype == dtype for array in arrays)
    return known and all(array.stride(1) == 1 for array in arrays)


def arguments(format_name: str, activations: Given | TwoSlopes) -> tuple[str, tuple]:
    """The end of a kernel's name, and the activations as it takes them."""
    if isinstance(activations, TwoSlopes):
        inputs, left, right = activations
        kernel = f"two_slopes_{format_name}_{inputs.dtype}".replace("torch.", "")
        return kernel, (inputs, inputs.stride(0), float(left), float(right))
    features, slopes = activations
    return format_name, (slopes, slopes.stride(0), features, features.stride(0))


def turn(
    U: Tensor,
    activations: Given | TwoSlopes,
    alpha: Tensor,
    da: Tensor,
    *,
    linear: float = 1.0,
    scales: Tensor | None = None,
) -> Turned:
    """T, and all that follows from it.

    Args:
        U: (n, h), or (n + 1, h) with a row for the linear part; float32 or bfloat16.
        activations: features and slopes of the dtype of U, or the inputs that both follow from.
        alpha: (n,) coefficients; where V is in 8 bits, times the scales of dX.
        da: (n,) step of the coefficients.
        linear: what u_n is multiplied with: the scale of dw.
        scales: of the rows of V, (h,), where it is in 8 bits: W is rounded to them then.
    """
    rows, h = U.shape
    n = len(activations[0])
    in_int8 = scales is not None
    W = U.new_empty(rows, h, dtype=torch.int8 if in_int8 else U.dtype)
    W_scales, Ha = (U.new_empty(size, dtype=torch.float32) for size in (rows, n))
    name = "int8" if in_int8 else few_rows.NAMES[U.dtype]
    kernel, given = arguments(name, activations)
    numbers = alpha.float().contiguous(), da.float().contiguous(), float(linear), scales
    call(SOURCE, f"turn_{kernel}", U, *given, *numbers, n, rows, h, W, W_scales, Ha)
    return Turned(Int8Rows(W, W_scales) if in_int8 else W, Ha)
