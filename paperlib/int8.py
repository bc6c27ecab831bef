"""Rows of V in 8 bits, and the two products of a pass with them.

Conjugate gradients need few digits of their products: the loss and its gradient are evaluated in
more, and each linear solve mends what the last one missed, as in iterative refinement. Processors
with VNNI instructions multiply whole numbers of 8 bits several times as fast as floating-point
numbers, and V takes a quarter of its float32 memory.

Every row of V, and of what is multiplied with it, is s q with whole numbers q in -127 .. 127 and a
scale s = max |row| / 127 of its own. Products of whole numbers, and their sums in 32 bits, are
exact; what comes back is rounded to float32, which has 24. On matrix units each thread has a sum
of W V, and each is rounded before they are added: the last digits depend on the threads there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from paperlib import few_rows
from paperlib.instructions import fast_int8

LARGEST = 127

# So many products of two such numbers add up within 32 bits, whatever they are.
MOST_TERMS = (2**31 - 1) // LARGEST**2


class Int8Rows:
    """Rows of V, (h, d), rounded to 8 bits; what they are multiplied with is rounded alike.

    Attributes:
        dtype: the format of the products: float32.
        shape: (h, d).
    """

    dtype = torch.float32

    def __init__(self, values: Tensor, scale: Tensor):
        """Hold whole numbers (h, d), int8, and the scale of each row, (h,)."""
        self.values, self.scale, self.shape = values, scale, values.shape

    @classmethod
    def of(cls, V: Tensor) -> Int8Rows:
        """V (h, d), rounded."""
        values, scale = rounded(V.float())
        return cls(values, scale[:, 0])

    def __len__(self) -> int:
        """How many rows."""
        return len(self.values)

    def split(self, rows: int) -> Iterator[Int8Rows]:
        """Tiles of so many rows, views of this one."""
        for values, scale in zip(self.values.split(rows), self.scale.split(rows), strict=True):
            yield Int8Rows(values, scale)

    def float(self) -> Tensor:
        """The rows as they were rounded, (h, d) float32."""
        return self.values * self.scale[:, None]

    def project(self, A: Tensor) -> Tensor:
        """A V^T, (m, h), for A of shape (m, d)."""
        A = Int8Rows.of(A)
        return self.whole_project(A).mul_(A.scale[:, None]).mul_(self.scale)

    def combine(self, W: Tensor) -> Tensor:
        """W V, (m, d), for W of shape (m, h)."""
        return self.whole_combine(W * self.scale)

    def combine_sharp(self, W: Tensor) -> Tensor:
        """W V for a W (m, h) in 16 bits: what 8 leave of its rows goes through V beside them.

        The largest number of a row sets the step of all, which is coarse for rows whose numbers
        differ much.
        """
        W = W * self.scale
        most = Int8Rows.of(W)
        rest = Int8Rows.of(W - most.float())
        values = torch.cat([most.values, rest.values])
        both = self.combine_rounded(Int8Rows(values, torch.cat([most.scale, rest.scale])))
        return both[: len(W)] + both[len(W) :]

    def whole_project(self, A: Int8Rows) -> Tensor:
        """A V^T, (m, h), of the whole numbers: without the scales of the rows of either."""
        if few_rows.takes(A.values, self.values):
            return few_rows.project(A.values, self.values)
        return multiply(A.values, self.values.T)

    def whole_combine(self, W: Tensor) -> Tensor:
        """W V, (m, d), of the whole numbers of V: its scales are in W (m, h) already."""
        return self.combine_rounded(Int8Rows.of(W))

    def combine_rounded(self, W: Int8Rows) -> Tensor:
        """The same of a W that is rounded already."""
        takes = few_rows.takes(W.values, self.values)
        product = (few_rows.combine if takes else multiply)(W.values, self.values)
        return product.mul_(W.scale[:, None])


def rounded(A: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers q, int8 of the shape of A, and scales s, (m, 1), with A = s q to rounding."""
    largest = A.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest, 1) / LARGEST
    return (A / scale).round_().to(torch.int8), scale


def multiply(A: Tensor, B: Tensor) -> Tensor:
    """A B of whole numbers in 8 bits, (m, k) and (k, l), as float32.

    Where the processor has no instructions for it, or sums might not fit into 32 bits, float32
    multiplies the same numbers.
    """
    if fast_int8(A.device) and A.shape[1] <= MOST_TERMS:
        return torch._int_mm(A, B).float()
    return A.float() @ B.float()
