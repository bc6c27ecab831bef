"""What some of the candidates leave unexplained, in one reading of the features.

The Gram matrix of some candidates is a part of that of all, so their coefficients are known without
any feature; neither the loss at them nor its gradient is asked for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from paperlib.projection import Linearization, pseudo_inverse


class Remainder(NamedTuple):
    """What is left of the parameters.

    Attributes:
        residual: (C, p).
        linear: the linear part w that the candidates are completed with, (d, C), None without a
            lift.
    """

    residual: Tensor
    linear: Tensor | None


def left_by(point: Linearization, rows: Tensor) -> Remainder:
    """What some of the candidates leave, as the loss at them alone would.

    Args:
        point: the loss at all candidates.
        rows: which of them: a mask (n,) or indices.
    """
    X, theta = point.X[rows], point.theta
    gram = point.gram[rows][:, rows]
    alpha = pseudo_inverse(gram, cutoff=point.gram_cutoff) @ point.rhs[rows]
    linear = None if point.lift is None else -(point.cross_solved[:, rows] @ alpha)
    weights = alpha.T.to(theta)
    # The linear part goes through V with the candidates.
    sent = X if linear is None else torch.cat([X, linear.T.to(X)])
    residual = torch.zeros_like(theta)  # zero where another process holds the features
    for block in point.model.blocks(dtype=point.dtype):
        part = slice(block.start, block.stop)
        if linear is None:
            features, _ = block.linearize(X)
        else:
            U = block.project(sent)
            features, _ = block.activate(U[: len(X)], lifted=True)
        residual[:, part] = theta[:, part] - weights @ features.to(theta)
        if linear is not None:
            residual[:, part] -= U[len(X) :].to(theta)
    return Remainder(residual, linear)
