"""V^T V of the feature weights, and its inverse: what projecting on the columns of V needs."""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.feature_map import FeatureMap
from paperlib.symmetric_product import SymmetricSum


class WeightGram:
    """V^T V of a model with weights V, formed in one pass with d columns.

    Attributes:
        gram: V^T V, (d, d) float64.
        inverse: its inverse, (d, d) float64.
        dtype: of the products with V.
        beside: Y V, (C, d) float64, if a Y was given.
    """

    def __init__(self, model: FeatureMap, *, dtype: torch.dtype, beside: Tensor | None = None):
        """Form and invert it.

        Args:
            model: a feature map with weights V.
            dtype: of the products with V.
            beside: Y (C, p), whose product with V is formed in the same pass.
        """
        self.model, self.dtype = model, dtype
        total = SymmetricSum(model.d, device=model.device)
        outputs = 0 if beside is None else len(beside)
        self.beside = torch.zeros(outputs, model.d, dtype=torch.float64, device=model.device)
        for block in model.blocks(dtype=dtype):
            V = block.weights
            total.add(V, V)
            if outputs:
                self.beside += beside[:, block.start : block.stop].to(V.dtype) @ V
        gram = total.total
        model.sum_over_processes([gram, self.beside])
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
