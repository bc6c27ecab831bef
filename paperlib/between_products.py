"""What lies between the two products of a pass, in one reading of its arrays.

With one output, slopes s_ik and features phi_ik, (n, h), of a tile, and what came through V,
u_ik = v_k . dx_i and u_nk = v_k . dw, it is

    T_k   = sum_i alpha_i s_ik u_ik + sum_i da_i phi_ik + u_nk
    Ha_i  = sum_k phi_ik T_k
    w_ik  = s_ik T_k,   w_nk = T_k.

With few rows, these few operations an entry, one after another in torch, take a fifth of the time
of a product: each reads and writes arrays of (n, h), and each has to be called. Where V is in 8
bits, its scales and those of dX are multiplied in here, and W is rounded to 8 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paperlib import few_rows
from paperlib.compiled import call, library
from paperlib.int8 import Int8Rows

SOURCE = "between_products.cpp"


class Turned(NamedTuple):
    """What goes back through V, (n or n + 1, h), and what goes to da, (n,) float32."""

    W: Tensor | Int8Rows
    Ha: Tensor


def takes(U: Tensor, features: Tensor, state: Tensor, outputs: int) -> bool:
    """Whether there is a kernel for these arrays."""
    if outputs != 1 or U.device.type != "cpu" or not U.is_contiguous():
        return False
    if not U.dtype == features.dtype == state.dtype or not few_rows.available(U.dtype):
        return False
    return features.stride(1) == state.stride(1) == 1 and library(SOURCE) is not None


def turn(
    U: Tensor,
    features: Tensor,
    state: Tensor,
    alpha: Tensor,
    da: Tensor,
    *,
    linear: float = 1.0,
    scales: Tensor | None = None,
) -> Turned:
    """T, and all that follows from it.

    Args:
        U: (n, h), or (n + 1, h) with a row for the linear part; float32 or bfloat16.
        features: (n, h), of the same dtype.
        state: the slopes, likewise.
        alpha: (n,) coefficients; where V is in 8 bits, times the scales of dX.
        da: (n,) step of the coefficients.
        linear: what u_n is multiplied with: the scale of dw.
        scales: of the rows of V, (h,), where it is in 8 bits: W is rounded to them then.
    """
    rows, h = U.shape
    n = len(features)
    in_int8 = scales is not None
    W = U.new_empty(rows, h, dtype=torch.int8 if in_int8 else U.dtype)
    W_scales, Ha = (U.new_empty(size, dtype=torch.float32) for size in (rows, n))
    alpha, da = alpha.float().contiguous(), da.float().contiguous()
    name = "int8" if in_int8 else few_rows.NAMES[U.dtype]
    arrays = U, state, state.stride(0), features, features.stride(0)
    numbers = alpha, da, float(linear), scales
    call(SOURCE, f"turn_{name}", *arrays, *numbers, n, rows, h, W, W_scales, Ha)
    return Turned(Int8Rows(W, W_scales) if in_int8 else W, Ha)
