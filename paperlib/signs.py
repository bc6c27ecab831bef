"""The signs of the candidates, once their directions are known up to sign.

The lifted loss does not tell x from -x where the rest of the activation is even (ReLU, GELU).
The parameters do. With even and odd parts f+-_i = (phi(x^_i) +- phi(-x^_i)) / 2,

    Theta = sum_i alpha_i (f+_i + s_i f-_i),

and regressing Theta on all 2n parts gives alpha; a least-squares problem gives the signs s_i.
For a ReLU the odd parts are linear in x, which is C d equations for n signs: up to about n = C d
they are enough, up to about 1.5 C d with -1 <= s_i <= 1 beside them. Those that come out clearly
are settled, and the others follow from them. In the end single signs are flipped while that lowers
the loss. All of this needs one Gram matrix. Message passing, which knows the linear part and its
noise, turns points round while that makes it likelier. For an odd activation phi(-x) = -phi(x), and
no attack can tell the two apart.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import lsq_linear
from torch import Tensor

from paperlib.feature_map import FeatureMap
from paperlib.projection import significant_eigenpairs, solve_gram

# Flips are tried for this many candidates, those whose signs are least certain.
MOST_FLIPS = 64

# A sign is clear where the number that stands for it is at least this far from 0.
CLEAR = 0.5


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
    soft = soft_signs(gram, rhs)
    flipped = flip_while_better(gram, rhs, soft < 0, soft.abs().argsort()[:MOST_FLIPS])
    return torch.where(flipped[:, None], -X, X)


def soft_signs(gram: Tensor, rhs: Tensor) -> Tensor:
    """Numbers in -1 .. 1, (n,), that explain theta best in the place of signs.

    Args:
        gram: (2n, 2n) Gram matrix of the features at X and -X.
        rhs: (2n, C) their products with theta.
    """
    n = len(gram) // 2
    one = torch.eye(n, dtype=gram.dtype, device=gram.device)
    parts = 0.5 * torch.cat([torch.cat([one, one], 1), torch.cat([one, -one], 1)])
    gram, rhs = parts @ gram @ parts.T, parts @ rhs  # of even, then odd parts
    alpha = solve_gram(gram, rhs)[:n]
    normal = gram[n:, n:] * (alpha @ alpha.T)
    right = ((rhs[n:] - gram[n:, :n] @ alpha) * alpha).sum(1)
    values, vectors = significant_eigenpairs(normal)
    root = values.sqrt()
    A, b = root[:, None] * vectors.T, (vectors.T @ right) / root
    return torch.from_numpy(within_box(A.cpu().numpy(), b.cpu().numpy())).to(gram)


def within_box(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Numbers t in -1 .. 1, (n,), whose signs s have A s = b, as certain as |t| is near 1.

    Rounding the clear ones leaves more equations than unknowns for the rest.

    Args:
        A: (r, n), where r may be less than n.
        b: (r,).
    """
    n = A.shape[1]
    soft, free = np.zeros(n), np.arange(n)
    while len(free):
        signs = np.sign(soft)
        most = 10 * len(free)
        found = lsq_linear(A[:, free], b - A @ signs, (-1, 1), method="bvls", max_iter=most).x
        sure = np.abs(found) >= min(CLEAR, np.abs(found).max())
        soft[free[sure]] = np.where(found[sure] < 0, -1, 1) * np.maximum(np.abs(found[sure]), 1e-9)
        free = free[~sure]
    return soft


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


def turned_round(
    X: Tensor, weights: Tensor, observed: Tensor, covariance: Tensor, *, least: float
) -> Tensor:
    """Which rows of X explain a linear part better the other way round, (n,).

    What is observed, less sum_i weights_i X_i, is Gaussian. One row after another is turned while
    that raises the log-likelihood, the one that raises it most first.

    Args:
        X: (n, d).
        weights: (n, C).
        observed: (C, d), the linear part.
        covariance: (C, C), of what the rows leave of it, in each coordinate.
        least: by how much a turn has to raise the log-likelihood.
    """
    X, weights, covariance = X.double(), weights.double(), covariance.double()
    whitened = torch.linalg.solve(covariance, weights.T).T
    missing = observed.double() - weights.T @ X
    squares = (whitened * weights).sum(1) * X.square().sum(1)
    sign = X.new_ones(len(X))
    for _ in range(2 * len(X)):
        gains = -2 * (sign * ((whitened @ missing) * X).sum(1) + squares)
        i = int(gains.argmax())
        if not gains[i] > least:
            break
        missing = missing + 2 * sign[i] * torch.outer(weights[i], X[i])
        sign[i] = -sign[i]
    return sign < 0
