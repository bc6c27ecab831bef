"""The signs of the candidates, once their directions are known up to sign.

The lifted loss does not tell x from -x where the rest of the activation is even (ReLU, GELU).
The parameters do: regress Theta on the 2n features {phi(x^_i), phi(-x^_i)} and keep, of each pair,
the one with the larger coefficients; then flip single signs while that lowers the loss. All of
this needs one Gram matrix. For an odd activation phi(-x) = -phi(x), and no attack can tell the two
apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.feature_map import FeatureMap
from paperlib.projection import solve_gram

# Flips are tried for this many candidates, those whose two coefficients differ least.
MOST_FLIPS = 64


def settle_signs(model: FeatureMap, theta: Tensor, X: Tensor) -> Tensor:
    """X with the sign of each row that explains theta best, (n, d): two passes.

    Args:
        model: the feature map.
        theta: (C, p), with its linear part.
        X: (n, d) candidates, right up to sign.
    """
    if model.odd:
        return X
    n = len(X)
    both = torch.cat([X, -X])
    gram = torch.zeros(2 * n, 2 * n, dtype=torch.float64, device=X.device)
    rhs = torch.zeros(2 * n, len(theta), dtype=torch.float64, device=X.device)
    for block in model.blocks():
        features = block.linearize(both)[0].double()
        gram += features @ features.T
        rhs += features @ theta[:, block.start : block.stop].double().T
    model.sum_over_processes([gram, rhs])
    weight = solve_gram(gram, rhs).square().sum(1)
    flipped = weight[n:] > weight[:n]
    certainty = (weight[n:].sqrt() - weight[:n].sqrt()).abs()
    flipped = flip_while_better(gram, rhs, flipped, certainty.argsort()[:MOST_FLIPS])
    return torch.where(flipped[:, None], -X, X)


def flip_while_better(gram: Tensor, rhs: Tensor, flipped: Tensor, doubtful: Tensor) -> Tensor:
    """Flip doubtful signs one at a time while the part of theta that is explained grows.

    Args:
        gram: (2n, 2n) Gram matrix of the features at X and -X.
        rhs: (2n, C) their products with theta.
        flipped: (n,) whether -x_i is chosen.
        doubtful: indices whose signs may change.
    """
    n = len(flipped)
    rows = torch.arange(n, device=gram.device)

    def explained(choice: Tensor) -> float:
        kept = rows + n * choice
        return float((rhs[kept] * solve_gram(gram[kept][:, kept], rhs[kept])).sum())

    best = explained(flipped)
    for _ in range(3):
        before = best
        for i in doubtful.tolist():
            trial = flipped.clone()
            trial[i] = ~trial[i]
            value = explained(trial)
            if value > best:
                flipped, best = trial, value
        if best == before:
            break
    return flipped
