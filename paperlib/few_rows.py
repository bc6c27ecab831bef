"""The two products of a pass, A V^T and W V, in kernels for an A and a W of few rows.

The libraries that torch comes with are made for large matrices. With few rows, most of their time
goes into bringing V, the large factor, into another order first, or into reading it in pieces too
small for the memory; so products with one to a hundred candidates run at a third to two thirds of
the rate of a large square product. The kernels of `few_rows.cpp` read V once, as it lies, and ask
for what comes next while they multiply. They need a C++ compiler and AVX-512, or for float32 AVX2.
Where a processor has matrix units, those of `matrix_units.cpp` multiply bfloat16 and 8 bits, and
those of `float32_parts.cpp` many rows of float32, as sums of three of bfloat16. These also multiply
an A and a W of float32 with a V of float16, the sum of two, as it is stored.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from paperlib import matrix_units
from paperlib.compiled import call, has
from paperlib.instructions import bfloat16_units, vector_instructions
from paperlib.precision import arithmetic

SOURCE = "few_rows.cpp"


class Bounds(NamedTuple):
    """What kernels are faster for."""

    least_dimension: int
    most_rows: int
    share: float  # of the dimension, that there may be rows


# Where kernels are faster than the libraries, by the file that has them.
BOUNDS = {
    SOURCE: Bounds(256, 256, 0.25),
    matrix_units.SOURCE: Bounds(64, 160, 0.5),
    matrix_units.PARTS_SOURCE: Bounds(64, 256, 0.5),
}
# They are from so many multiplications on.
WORTHWHILE = 1_000_000

# From so many rows on, a product in float32 is faster in parts on matrix units than by the vector
# instructions of `few_rows.cpp`. For fewer it is as fast while nothing else asks for the units, and
# takes up to 1.4 times as long while a neighbour on the same processor does.
PARTS_LEAST_ROWS = 112
# Where those are not for such sizes, a product in parts is faster than the libraries from so many
# rows on; for fewer, two products that follow one another are (`one_reading.py`).
PARTS_LEAST_ROWS_ELSEWHERE = 33

# So many products of a number in 0 .. 255 and one in -127 .. 127 add up within 32 bits.
MOST_SHIFTED_TERMS = (2**31 - 1) // (255 * 127)

NAMES = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
}


def takes(A: Tensor, V: Tensor) -> bool:
    """Whether the kernels multiply A, with rows as V has them or with a column a row of V."""
    if V.device.type != "cpu":
        return False
    if A.dtype != (torch.int8 if V.dtype == torch.int8 else arithmetic(V.dtype)):
        return False
    h, d = V.shape
    if not _within(BOUNDS[source(len(A), d, V.dtype)], len(A), d):
        return False
    if len(A) * h * d < WORTHWHILE:
        return False
    if not V.is_contiguous():
        return False
    if torch.is_grad_enabled() and (A.requires_grad or V.requires_grad):
        return False  # they have no derivative
    if V.dtype == torch.int8 and A.shape[1] > MOST_SHIFTED_TERMS:
        return False
    return available(V.dtype)


def source(rows: int, d: int, dtype: torch.dtype) -> str:
    """The file whose kernels multiply so many rows with a V of d columns, where there are any."""
    if dtype == torch.float16:
        return matrix_units.PARTS_SOURCE
    if dtype == torch.float32 and matrix_units.available():
        whole = _within(BOUNDS[SOURCE], rows, d)
        least = PARTS_LEAST_ROWS if whole else PARTS_LEAST_ROWS_ELSEWHERE
        return matrix_units.PARTS_SOURCE if rows >= least else SOURCE
    return matrix_units.SOURCE if matrix_units.multiply(dtype) else SOURCE


def _within(bounds: Bounds, rows: int, d: int) -> bool:
    return d >= bounds.least_dimension and rows <= min(bounds.most_rows, bounds.share * d)


def project(A: Tensor, V: Tensor) -> Tensor:
    """A V^T, (m, h), for A (m, d) and V (h, d); of int8 in float32, else in the dtype of A.

    Raises:
        ValueError: if A has not as many columns as V.
    """
    _check("A", A, V.shape[1])
    out = A.new_empty(len(A), len(V), dtype=torch.float32 if A.dtype == torch.int8 else A.dtype)
    return _call("project", A, V, out)


def combine(W: Tensor, V: Tensor) -> Tensor:
    """W V, (m, d), for W (m, h) and V (h, d), in float32.

    Raises:
        ValueError: if W has not a column for each row of V.
    """
    _check("W", W, len(V))
    return _call("combine", W, V, W.new_empty(len(W), V.shape[1], dtype=torch.float32))


def _check(name: str, factor: Tensor, inner: int) -> None:
    """Refuse a left factor of other columns: the kernels would read on beyond its end."""
    if factor.ndim != 2 or factor.shape[1] != inner:
        raise ValueError(f"expected {name} of shape (m, {inner}), got {tuple(factor.shape)}")


def _call(product: str, A: Tensor, V: Tensor, out: Tensor) -> Tensor:
    A = A.contiguous()
    name = f"{product}_{NAMES[V.dtype]}"
    call(source(len(A), V.shape[1], V.dtype), name, A, V, out, len(A), *V.shape)
    return out


@lru_cache
def available(dtype: torch.dtype) -> bool:
    """Whether this machine has kernels for the dtype that are worth using."""
    if dtype not in NAMES:
        return False
    cpu = torch.device("cpu")
    if dtype == torch.float16:
        return matrix_units.available()
    if dtype != torch.float32 and bfloat16_units(cpu):
        # Without a compiler that knows them, the libraries still do.
        return matrix_units.available()
    return vector_instructions(cpu) and has(SOURCE, f"project_{NAMES[dtype]}")
