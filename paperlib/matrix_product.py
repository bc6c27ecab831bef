"""The two products of a pass with a tile of V: A V^T and W V, where A and W have few rows.

On processors with AVX-512 or AVX2 the kernels of `few_rows.py` take them, where there is a
compiler. Otherwise torch has two libraries for them on x86 processors. `A @ B` in float32 calls
MKL, which copies the right factor, here V, into another order first: with few rows on its left,
that takes longer than the product. oneDNN, which torch calls from compiled modules, makes a kernel
for the very shapes and reads V as it lies. With AVX-512 it takes from two thirds to half of MKL's
time for 14 to 30 rows of d = 3,072, and less for a hundred; with older instructions it is no
faster, and it has no fast kernel for a left factor whose rows are not contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from paperlib import few_rows
from paperlib.instructions import fast_kernels
from paperlib.precision import arithmetic

# Multiplications from which on oneDNN's kernel makes good for what calling it takes.
WORTHWHILE = 8_000_000

# Without oneDNN, V on the left is up to twice as fast as on the right for so many rows, from this
# dimension on, transposing the result included.
FEW_ROWS, FEW_ROWS_DIMENSION = range(8, 64), 512


def project(A: Tensor, V: Tensor) -> Tensor:
    """A V^T, (m, h), for A of shape (m, d) and V of shape (h, d), of one dtype.

    Or V is in float16, and A in float32.
    """
    if few_rows.takes(A, V):
        return few_rows.project(A, V)
    V = V.to(arithmetic(V.dtype))
    linear = _kernel(A, V)
    if linear:
        return linear(A, V)
    few = len(A) in FEW_ROWS and V.shape[1] >= FEW_ROWS_DIMENSION
    if few and V.device.type == "cpu" and V.dtype != torch.bfloat16:
        return (V @ A.T).T.contiguous()
    return A @ V.T


def combine(W: Tensor, V: Tensor) -> Tensor:
    """W V, (m, d), for W of shape (m, h) and V of shape (h, d), with dtypes as above.

    Sums over features in bfloat16 come in float32, to be added to those of other tiles.
    """
    if few_rows.takes(W, V):
        return few_rows.combine(W, V)
    V = V.to(arithmetic(V.dtype))
    linear = _kernel(W, V)
    product = linear(W, V.T) if linear else W @ V
    return product.float() if product.dtype == torch.bfloat16 else product


def _kernel(A: Tensor, V: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The x, w -> x w^T of oneDNN where it is there and pays."""
    if len(A) * V.numel() < WORTHWHILE or not V.dtype == A.dtype == torch.float32:
        return None
    if not V.is_contiguous() or A.stride(1) != 1 or A.stride(0) < A.shape[1]:
        return None
    if torch.is_grad_enabled() and (A.requires_grad or V.requires_grad):
        return None  # it has no derivative
    if not fast_kernels(V.device) or not torch.backends.mkldnn.enabled:
        return None
    return _onednn_linear()


@lru_cache
def _onednn_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """The linear layer of oneDNN, None where this build of torch has none that works."""
    try:
        layer = torch.ops.mkldnn._linear_pointwise
        numbers = torch.arange(12, dtype=torch.float32, device="cpu")
        x, w = numbers[:6].view(2, 3), numbers.view(4, 3)
        if not torch.equal(layer(x, w, None, "none", [], ""), x @ w.T):
            return None
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return lambda x, w: layer(x, w, None, "none", [], "")
