"""V^T V of the feature weights, and its inverse: what projecting on the columns of V needs."""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.feature_map import FeatureMap
from paperlib.long_sum import LongSum

# Into so many bands the columns of V are cut for V^T V.
BANDS = 4


class WeightGram:
    """V^T V of a model with weights V, formed in one pass with d columns.

    Attributes:
        gram: V^T V, (d, d) float64.
        inverse: its inverse, (d, d) float64.
        dtype: of the products with V.
    """

    def __init__(self, model: FeatureMap, *, dtype: torch.dtype):
        """Form and invert it.

        Args:
            model: a feature map with weights V.
            dtype: of the products with V.
        """
        self.model, self.dtype = model, dtype
        # The blocks on and above the diagonal: nearly half of the work is saved by symmetry.
        width = -(-model.d // BANDS)
        starts = range(0, model.d, width)
        sums = {
            (i, j): LongSum(min(width, model.d - i), min(width, model.d - j), device=model.device)
            for i in starts
            for j in starts
            if i <= j
        }
        for block in model.blocks(dtype=dtype):
            for (i, j), part in sums.items():
                part.add_product(block.weights[:, i : i + width].T, block.weights[:, j : j + width])
        gram = torch.empty(model.d, model.d, dtype=torch.float64, device=model.device)
        for (i, j), part in sums.items():
            gram[i : i + width, j : j + width] = part.total
            gram[j : j + width, i : i + width] = part.total.T
        model.sum_over_processes([gram])
        self.gram = 0.5 * (gram + gram.T)
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(self.gram))

    def products(self, Y: Tensor) -> Tensor:
        """Y V, (C, d) float64, for Y of shape (C, p): one pass with C rows."""
        product = torch.zeros(len(Y), self.model.d, dtype=torch.float64, device=Y.device)
        for block in self.model.blocks(dtype=self.dtype):
            V = block.weights
            product += Y[:, block.start : block.stop].to(V.dtype) @ V
        self.model.sum_over_processes([product])
        return product
