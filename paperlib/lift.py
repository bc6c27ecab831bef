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
from paperlib.weight_gram import WeightGram

REFINEMENTS = 6

# By default the lift is used while at least this share of the p equations is left beside it.
LIFT_SHARE = 0.5


def spent_by_lift(d: int, candidates: int) -> int:
    """Equations of p that are projected off: the columns of V, and the candidates' features."""
    return d + candidates


def room_for_lift(p: int, d: int, candidates: int) -> bool:
    """Whether enough of the p equations are left to lift by default."""
    return spent_by_lift(d, candidates) <= (1 - LIFT_SHARE) * p


class Lift:
    """The projection off the columns of V.

    Attributes:
        gram: V^T V, (d, d) float64.
        inverse: its inverse, (d, d), float64 (float32 beside it for the preconditioner).
        theta: the parameters without their part in the span of V, (C, p).
    """

    def __init__(self, model: FeatureMap, theta: Tensor, *, dtype: torch.dtype):
        """Form V^T V in `dtype` and take V's part out of theta.

        One pass over V with d columns, and a few with C columns: rounding V to `dtype` makes
        the projection inexact, which `REFINEMENTS` steps of iterative refinement mend in theta.
        """
        self.dtype = dtype
        self.weight_gram = WeightGram(model, dtype=dtype, beside=theta)
        self.gram, self.inverse = self.weight_gram.gram, self.weight_gram.inverse
        self.inverse32 = self.inverse.float()
        self.theta = theta.clone()
        left = self.weight_gram.beside
        for _ in range(REFINEMENTS if dtype is torch.bfloat16 else 2):
            left = self._take_out(model, left)

    def _take_out(self, model: FeatureMap, product: Tensor) -> Tensor:
        """Take the part out of theta that Theta V (C, d) tells of; Theta V of what is left."""
        w = product @ self.inverse
        left = torch.zeros_like(product)
        for block in model.blocks(dtype=self.dtype):
            part = slice(block.start, block.stop)
            V = block.weights
            self.theta[:, part] -= block.project(w).to(self.theta.dtype)
            left += self.theta[:, part].to(V.dtype) @ V
        model.sum_over_processes([left])
        return left
