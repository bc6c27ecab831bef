"""Sums of many products, one a tile of V, without float64 arithmetic on every tile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

# Products of about this many features are added up in their own format before they go into float64.
GROUP = 8192


class LongSum:
    """sum_k A_k B_k in float64, the A_k and B_k being in the format of the products.

    A product of a tile is as large as the sum itself, while a tile has only some hundred features:
    widening each of them to float64 would take as long as the products. So neighbours are added up
    as they are (bfloat16 in float32), which costs no more digits than a longer product would.
    """

    def __init__(self, *shape: int, device: torch.device):
        """Start at zero."""
        self._total = torch.zeros(shape, dtype=torch.float64, device=device)
        self._part: Tensor | None = None
        self._features = 0

    def add_product(self, A: Tensor, B: Tensor) -> None:
        """Add A B; the columns of A are the features of a tile."""
        part = self._open(A.dtype)
        if part.dtype == A.dtype:
            part.addmm_(A, B)
        else:
            part += A @ B
        self._close(A.shape[1])

    def add(self, product: Tensor, features: int) -> None:
        """Add a product over so many features."""
        self._open(product.dtype).add_(product)
        self._close(features)

    @contextmanager
    def adding(self, features: int, dtype: torch.dtype) -> Iterator[Tensor]:
        """A tensor of that dtype to add a product over so many features to, in place."""
        yield self._open(dtype)
        self._close(features)

    def _open(self, dtype: torch.dtype) -> Tensor:
        """The sum of this group."""
        if self._part is None:
            wide = torch.float32 if dtype == torch.bfloat16 else dtype
            self._part = self._total.new_zeros(self._total.shape, dtype=wide)
        return self._part

    def _close(self, features: int) -> None:
        self._features += features
        if self._features >= GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._features:
            self._total += self._part
            self._part.zero_()
            self._features = 0

    @property
    def total(self) -> Tensor:
        """The sum so far, float64."""
        self._flush()
        return self._total
