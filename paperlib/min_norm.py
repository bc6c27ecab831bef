"""Minimum-norm regression on a feature map: the training that the paper's theorems assume."""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.checks import check_finite, check_on_sphere, check_range, check_rows
from paperlib.feature_map import FeatureMap
from paperlib.projection import pseudo_inverse


def fit_min_norm(
    model: FeatureMap,
    X: Tensor,
    y: Tensor,
    *,
    ridge: float = 0.0,
    theta_0: Tensor | None = None,
) -> Tensor:
    """Theta - theta_0 of minimum-norm (or ridge) regression, (C, p) in the model's dtype.

    theta = theta_0 + Phi^+ (y - Phi theta_0), the limit of gradient descent from theta_0 on the
    square loss. What is returned is theta - theta_0 = sum_i alpha_i phi(x_i): what an attacker
    who knows theta and theta_0 has. The n x n Gram system is solved in float64.

    Args:
        model: the feature map phi.
        X: (n, d) training inputs, rows of norm sqrt(d).
        y: (n,) labels for one output or (n, C) for C outputs.
        ridge: lambda >= 0 in (Phi Phi^T + n lambda I) alpha = y - Phi theta_0.
        theta_0: (C, p) parameters at initialisation; zero if not given.

    Raises:
        ValueError: for wrong shapes, values that are not finite, rows of X off the sphere, fewer
            features than samples (p < n: no interpolation, and nothing to read back), labels that
            are all zero, or a negative ridge.
        TypeError: for values that are not tensors, or dtypes that differ from the model's.
    """
    check_on_sphere("X", check_finite("X", check_rows("X", X, model)))
    n = len(X)
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a torch tensor, got {type(y).__name__}")
    if y.ndim not in (1, 2) or len(y) != n:
        raise ValueError(f"y must have shape ({n},) or ({n}, C), got {tuple(y.shape)}")
    check_range("ridge", ridge, least=0)
    if model.p < n:
        raise ValueError(
            f"p must be at least n: {model.p} parameters cannot interpolate {n} samples"
        )
    targets = check_finite("y", y.double().reshape(n, -1)).to(model.device)
    if theta_0 is None:
        _check_something_to_learn(targets)
    else:
        check_rows("theta_0", theta_0, model, rows=targets.shape[1], columns=model.p)
        theta_0 = theta_0.detach()
        check_finite("theta_0", theta_0)
    gram = torch.zeros(n, n, dtype=torch.float64, device=model.device)
    initial = torch.zeros_like(targets)
    for block in model.blocks():
        features = block.linearize(X)[0].double()
        gram += features @ features.T
        if theta_0 is not None:
            initial += features @ theta_0[:, block.start : block.stop].double().T
    model.sum_over_processes([gram, initial])
    targets = targets - initial
    _check_something_to_learn(targets)
    gram = gram + n * ridge * torch.eye(n, dtype=gram.dtype, device=gram.device)
    alpha = pseudo_inverse(gram, cutoff=1e-14) @ targets
    theta = torch.zeros(targets.shape[1], model.p, dtype=model.dtype, device=model.device)
    for block in model.blocks():
        features = block.linearize(X)[0].double()
        theta[:, block.start : block.stop] = (alpha.T @ features).to(model.dtype)
    model.sum_over_processes([theta])
    return theta


def _check_something_to_learn(targets: Tensor) -> None:
    if not bool((targets != 0).any()):
        raise ValueError("all labels are zero: theta would be zero and hold nothing")
