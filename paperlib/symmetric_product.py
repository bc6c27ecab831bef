"""sum_k A_k^T B_k, symmetric, of tall A_k and B_k: only what is on and above the diagonal is made.

V^T V of the lift and the second moments of `spectral_start.py` are such sums, of d columns: as
much work as some hundred Gauss-Newton products, once or twice in an attack. On matrix units the
kernel of `symmetric_product.cpp` forms half of the entries, in bfloat16 or in float32 in parts
(`matrix_units.py`), in half the time of the libraries; elsewhere the columns are cut into bands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib import few_rows, matrix_units
from paperlib.compiled import call, has
from paperlib.long_sum import LongSum

SOURCE = "symmetric_product.cpp"

FORMATS = torch.float32, torch.bfloat16

# Into so many bands the columns are cut without the kernel.
BANDS = 4

# Columns from which on the kernel is faster, and in how many rows and columns it sums them.
LEAST_COLUMNS = 128
BLOCK, TILES, SIDE = 32, 2, 16


def takes(A: Tensor, B: Tensor) -> bool:
    """Whether the kernel multiplies A^T B, both (h, d)."""
    if A.device.type != "cpu" or B.device != A.device:
        return False
    if A.dtype != B.dtype or A.dtype not in FORMATS:
        return False
    if A.shape[1] < LEAST_COLUMNS or not (A.is_contiguous() and B.is_contiguous()):
        return False
    if torch.is_grad_enabled() and (A.requires_grad or B.requires_grad):
        return False  # it has no derivative
    return matrix_units.available() and has(SOURCE, _name(A.dtype))


def _name(dtype: torch.dtype) -> str:
    """The kernel for factors of that dtype."""
    return f"add_{few_rows.NAMES[dtype]}"


class SymmetricSum:
    """The sum over blocks of rows, in float64."""

    def __init__(self, d: int, *, device: torch.device):
        """Start at zero, (d, d)."""
        self.d, self.device = d, device
        self.parts: _Blocks | _Bands | None = None

    def add(self, A: Tensor, B: Tensor) -> None:
        """Add A^T B, both (h, d).

        Raises:
            ValueError: for factors of another shape, or that the kernel does not multiply though it
                has multiplied the first.
        """
        if A.ndim != 2 or A.shape != B.shape or A.shape[1] != self.d:
            raise ValueError(
                f"expected A and B of one shape (h, {self.d}), "
                f"got {tuple(A.shape)} and {tuple(B.shape)}"
            )
        if self.parts is None:
            kind = _Blocks if takes(A, B) else _Bands
            self.parts = kind(self.d, device=self.device)
        self.parts.add(A, B)

    @property
    def total(self) -> Tensor:
        """The sum so far, (d, d) float64."""
        if self.parts is None:
            return torch.zeros(self.d, self.d, dtype=torch.float64, device=self.device)
        return self.parts.total


class _Bands:
    """Blocks of bands of columns, by the libraries of torch."""

    def __init__(self, d: int, *, device: torch.device):
        self.d, self.width, self.device = d, -(-d // BANDS), device
        starts = range(0, d, self.width)
        self.sums = {
            (i, j): LongSum(min(self.width, d - i), min(self.width, d - j), device=device)
            for i in starts
            for j in starts
            if i <= j
        }

    def add(self, A: Tensor, B: Tensor) -> None:
        for (i, j), part in self.sums.items():
            part.add_product(A[:, i : i + self.width].T, B[:, j : j + self.width])

    @property
    def total(self) -> Tensor:
        gram = torch.empty(self.d, self.d, dtype=torch.float64, device=self.device)
        for (i, j), part in self.sums.items():
            gram[i : i + self.width, j : j + self.width] = part.total
            gram[j : j + self.width, i : i + self.width] = part.total.T
        return gram


class _Blocks:
    """Blocks of 32 by 32 entries, as the kernel has them: in tiles of 16 by 16."""

    def __init__(self, d: int, *, device: torch.device):
        self.d, self.blocks = d, -(-d // BLOCK)
        self.rows, self.columns = torch.triu_indices(self.blocks, self.blocks, device=device)
        self.sum = LongSum(len(self.rows), TILES, TILES, SIDE, SIDE, device=device)

    def add(self, A: Tensor, B: Tensor) -> None:
        A, B = A.contiguous(), B.contiguous()
        if not takes(A, B):
            raise ValueError(
                "expected A and B that the kernel multiplies, as it did the first: both float32 "
                f"or both bfloat16, on the cpu, without derivatives; got {A.dtype} on {A.device} "
                f"and {B.dtype} on {B.device}, of which {A.requires_grad + B.requires_grad} "
                "require derivatives"
            )
        with self.sum.adding(len(A), torch.float32) as out:
            call(SOURCE, _name(A.dtype), A, B, out, *A.shape)

    @property
    def total(self) -> Tensor:
        found = self.sum.total
        tiles = found.new_zeros(self.blocks, self.blocks, *found.shape[1:])
        tiles[self.rows, self.columns] = found
        width = self.blocks * BLOCK
        gram = tiles.permute(0, 2, 4, 1, 3, 5).reshape(width, width)[: self.d, : self.d]
        return gram.triu() + gram.triu(1).T
