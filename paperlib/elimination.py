"""Backward elimination: from more candidates than samples down to the right number.

Removing candidate j from the span raises ||E||^2 by |alpha_j|^2 / [(Phi Phi^T)^-1]_jj, summed over
outputs. The candidate that is missed least goes first. Both alpha and the inverse are updated
after each removal, so that no pass over the features is needed.

Candidates that have merged are linearly dependent: one of them costs nothing, which the formula,
made for independent features, does not see. Such candidates go first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paperlib.projection import Linearization

# Candidates that matter no more than this many times the residual are doubted.
DOUBT = 4.0

# The least part of a candidate in the directions that the pseudo-inverse leaves out, where it is
# one of dependent ones; of two that are equal each has a half.
DEPENDENT = 0.05


@dataclass(frozen=True)
class Elimination:
    """The order in which candidates go, and what it costs.

    Attributes:
        kept: indices of the candidates that stay, ascending.
        losses: losses[k] is L with k candidates kept, k = 0 .. n^, without moving any.
    """

    kept: Tensor
    losses: list[float]


def removal_costs(inverse: Tensor, alpha: Tensor) -> Tensor:
    """How much ||E||^2 rises if one of the independent candidates is removed, for each, (n,).

    Args:
        inverse: (Phi Phi^T)^-1, (n, n).
        alpha: (n, C) coefficients.
    """
    return alpha.square().sum(1) / inverse.diagonal()


def shares(point: Linearization) -> Tensor:
    """How much the loss rises if one of the candidates is removed, for each, (n,).

    A candidate that others can stand in for, such as one that is there twice, has a share of 0.
    """
    costs = removal_costs(point.gram_inverse, point.alpha) / point.total_square
    absent, left_out = _absent(point.gram, point.gram_inverse)
    if left_out:
        costs[absent > DEPENDENT] = 0.0
    return costs


def doubtful_candidates(point: Linearization) -> Tensor:
    """Which candidates matter little more than what is left unexplained, (n,); at least one does.

    Removing one of them costs at most `DOUBT` times the residual's square.
    """
    costs = removal_costs(point.gram_inverse, point.alpha)
    doubtful = costs <= DOUBT * point.residual_square
    doubtful[costs.argmin()] = True
    return doubtful


def least_useful(gram: Tensor, inverse: Tensor, alpha: Tensor) -> tuple[int, float, int]:
    """The candidate that is missed least, how much ||E||^2 rises without it, and the rank.

    Args:
        gram: Phi Phi^T, (n, n).
        inverse: its pseudo-inverse.
        alpha: (n, C) coefficients.
    """
    absent, left_out = _absent(gram, inverse)
    if left_out:
        return int(absent.argmax()), 0.0, len(gram) - left_out
    costs = removal_costs(inverse, alpha)
    j = int(costs.argmin())
    return j, float(costs[j]), len(gram)


def _absent(gram: Tensor, inverse: Tensor) -> tuple[Tensor, int]:
    """Of the projector on the directions that the pseudo-inverse left out: diagonal (n,), rank."""
    absent = 1 - (inverse * gram).sum(1)
    return absent, round(float(absent.sum()))


def inverse_of_rank(gram: Tensor, rank: int) -> Tensor:
    """The pseudo-inverse of a positive semi-definite matrix of that rank, in float64."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[len(gram) - rank :], vectors[:, len(gram) - rank :]
    return (vectors / values) @ vectors.T


def eliminate(point: Linearization, n: int) -> Elimination:
    """Remove candidates one at a time until n are left; the curve of losses goes on to 0.

    Args:
        point: the loss at the n^ >= n candidates.
        n: how many to keep.
    """
    total = point.total_square
    alive = list(range(len(point.X)))
    inverse, alpha = point.gram_inverse.clone(), point.alpha.clone()
    square = point.residual_square
    losses = {len(alive): square / total}
    kept = alive.copy()
    while alive:
        if len(alive) == n:
            kept = alive.copy()
        j, cost, rank = least_useful(point.gram[alive][:, alive], inverse, alpha)
        square += cost
        if rank < len(alive):
            del alive[j]
            inverse = inverse_of_rank(point.gram[alive][:, alive], rank)
            alpha = inverse @ point.rhs[alive]
        else:
            rest = [k for k in range(len(alive)) if k != j]
            column = inverse[:, j] / inverse[j, j]
            alpha = (alpha - column[:, None] * alpha[j])[rest]
            inverse = (inverse - column[:, None] * inverse[j])[rest][:, rest]
            del alive[j]
        losses[len(alive)] = square / total
    return Elimination(
        torch.tensor(sorted(kept), device=point.X.device),
        [losses[k] for k in range(len(point.X) + 1)],
    )
