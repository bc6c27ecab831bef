"""The lift: projecting the linear part of the features off, with all else on the columns of V.

Write act(u) = mu_1 u + rest(u). The linear part of theta = sum_i alpha_i act(V x_i) lies in the
span of the d columns of V, whatever the x_i. Adding that span to the candidates' own,

    min over alpha, w of || theta - sum_i alpha_i rest(V x^_i) - V w ||^2,

takes the linear part out of the loss. For ReLU, rest(u) = |u| / 2 is even: x and -x become one
point, and the local minima at wrong signs are gone. `signs.py` settles the signs afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.feature_map import FeatureMap

REFINEMENTS = 6


class Lift:
    """The projection off the columns of V.

    Attributes:
        gram: V^T V, (d, d) float64.
        inverse: its inverse, (d, d), float64 (float32 beside it for the preconditioner).
        theta: the parameters without their part in the span of V, (C, p).
    """

    def __init__(self, model: FeatureMap, theta: Tensor, *, dtype: torch.dtype):
        """Form V^T V in `dtype` and take V's part out of theta.

        Two passes over V with d columns, and a few with C columns: rounding V to `dtype` makes
        the projection inexact, which `REFINEMENTS` steps of iterative refinement mend in theta.
        """
        gram = torch.zeros(model.d, model.d, dtype=torch.float64, device=theta.device)
        for block in model.blocks(dtype=dtype):
            gram += block.weights.T @ block.weights
        model.sum_over_processes([gram])
        gram = 0.5 * (gram + gram.T)
        self.gram, self.dtype = gram, dtype
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        self.inverse32 = self.inverse.float()
        self.theta = theta.clone()
        for _ in range(REFINEMENTS if dtype is torch.bfloat16 else 2):
            w = self.inverse @ self._linear_part(model, dtype)
            for block in model.blocks(dtype=dtype):
                part = slice(block.start, block.stop)
                V = block.weights
                self.theta[:, part] -= (w.T.to(V.dtype) @ V.T).to(theta.dtype)

    def _linear_part(self, model: FeatureMap, dtype: torch.dtype) -> Tensor:
        product = torch.zeros(
            model.d, len(self.theta), dtype=torch.float64, device=self.theta.device
        )
        for block in model.blocks(dtype=dtype):
            V = block.weights
            product += (self.theta[:, block.start : block.stop].to(V.dtype) @ V).T
        model.sum_over_processes([product])
        return product
