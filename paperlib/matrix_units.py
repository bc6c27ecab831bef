"""Whether the matrix units of the processor (AMX) can be used, by the kernels of this package.

They multiply bfloat16 some ten times as fast as vector instructions do, and whole numbers of 8 bits
twenty times: for up to a hundred candidates, about as fast as the memory gives V. `few_rows.py` has
products with V by them, `one_reading.py` whole passes, `symmetric_product.py` V^T V.

In float32 they multiply parts: a number is the sum of three of bfloat16, and six products of those
are the one of float32, for which vector instructions take about twice as long. A number of float16
is the sum of two. It has eleven digits, so the sixteen that three products give are enough.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from paperlib.compiled import has, library
from paperlib.instructions import matrix_units

SOURCE, PARTS_SOURCE = "matrix_units.cpp", "float32_parts.cpp"

FORMATS = torch.bfloat16, torch.int8


def multiply(dtype: torch.dtype) -> bool:
    """Whether kernels by such units multiply numbers of that dtype here."""
    return dtype in FORMATS and available()


@lru_cache
def available() -> bool:
    """Whether this processor has such units, the system lets us use them and a compiler can."""
    units = matrix_units(torch.device("cpu")) and has(SOURCE, "allowed")
    return units and library(SOURCE).allowed() == 1 and has(PARTS_SOURCE, "project_float32")
