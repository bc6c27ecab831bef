"""Preconditioned conjugate gradients for the damped Gauss-Newton step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearSolution:
    """What `conjugate_gradients` found.

    Attributes:
        x: the solution, a vector.
        iterations: products with the operator.
        relative_residual: ||r|| / ||b|| in the norm of the preconditioner, at the end.
    """

    x: Tensor
    iterations: int
    relative_residual: float


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    b: Tensor,
    preconditioner: Callable[[Tensor], Tensor],
    *,
    tolerance: float,
    max_iterations: int,
) -> LinearSolution:
    """Solve A x = b for a positive definite A given by its product.

    Args:
        operator: v -> A v.
        b: right side, a vector.
        preconditioner: v -> P^-1 v, symmetric positive definite.
        tolerance: stop at sqrt(r . P^-1 r) <= tolerance * sqrt(b . P^-1 b).
        max_iterations: stop after this many products at the latest.

    Directions of no or negative curvature, which rounding can produce in low precision, end the
    iteration with what was reached before them.
    """
    x = torch.zeros_like(b)
    r = b
    z = preconditioner(r)
    direction = z
    rz = start = float(r @ z)
    if not start > 0:  # b = 0 is solved; with a preconditioner that is not positive nothing is
        return LinearSolution(x, 0, 0.0 if start == 0 else 1.0)
    iterations = 0
    while iterations < max_iterations and rz > tolerance**2 * start:
        Ad = operator(direction)
        iterations += 1
        curvature = float(direction @ Ad)
        if curvature <= 0:
            break
        step = rz / curvature
        x.add_(direction, alpha=step)
        r = torch.sub(r, Ad, alpha=step)
        z = preconditioner(r)
        rz, before = float(r @ z), rz
        if rz <= 0:
            rz = 0.0
            break
        direction = torch.add(z, direction, alpha=rz / before)
    return LinearSolution(x, iterations, (rz / start) ** 0.5)
