"""Whether the matrix units of the processor (AMX) can be used, by the kernels of this package.

They multiply bfloat16 some ten times as fast as vector instructions do, and whole numbers of 8 bits
twenty times: for up to a hundred candidates, about as fast as the memory gives V. `few_rows.py` has
products with V by them, `one_reading.py` a whole Gauss-Newton product.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from paperlib.compiled import library
from paperlib.instructions import matrix_units

SOURCE = "matrix_units.cpp"

NAMES = {torch.bfloat16: "bfloat16", torch.int8: "int8"}


@lru_cache
def available() -> bool:
    """Whether this processor has such units, the system lets us use them and a compiler can."""
    if not matrix_units(torch.device("cpu")):
        return False
    compiled = library(SOURCE)
    return compiled is not None and hasattr(compiled, "allowed") and compiled.allowed() == 1
