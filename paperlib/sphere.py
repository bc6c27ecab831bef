"""The sphere of radius sqrt(d), on which the paper's data and all candidates lie."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def to_sphere(X: Tensor) -> Tensor:
    """Rows of X (n, d) scaled to norm sqrt(d); those that are not finite stay so.

    Raises:
        ValueError: if a row is zero.
    """
    norms = torch.linalg.vector_norm(X, dim=1, keepdim=True)
    if bool((norms == 0).any()):
        raise ValueError("a row of zeros has no direction and cannot be put on the sphere")
    return X * (math.sqrt(X.shape[1]) / norms)


def to_tangent(X: Tensor, dX: Tensor) -> Tensor:
    """Rows of dX without their component along the rows of X: steps that stay on the sphere."""
    along = (X * dX).sum(1, keepdim=True) / X.square().sum(1, keepdim=True)
    return torch.addcmul(dX, along, X, value=-1)


def random_on_sphere(n: int, d: int, *, generator: torch.Generator) -> Tensor:
    """N uniform points on the sphere of radius sqrt(d), (n, d) float64 on the CPU."""
    return to_sphere(torch.randn(n, d, generator=generator, dtype=torch.float64))
