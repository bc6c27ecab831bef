"""Which data the parameters determine: the Jacobian of (X, alpha) -> theta and its null space.

The parameters of C outputs are theta_c = sum_i alpha_ic phi(x_i), a map from

    N = n (d - 1) + n C

numbers (n directions on the sphere, n C coefficients; N = d n for one output) to C p numbers. Near
a point where its Jacobian has full column rank the map is one to one: no other data nearby give
the same parameters. Where the Jacobian has full row rank C p < N instead, the data that give the
same parameters form a smooth family of dimension N - C p (implicit function theorem), and
`walk.py` walks along it. `law.py` counts the numbers alone.

Everything here is dense, (C p) x N, and in float64: for sizes where a singular value
decomposition takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from paperlib.checks import check_finite, check_on_sphere, check_rows
from paperlib.feature_map import FeatureMap
from paperlib.projection import pseudo_inverse


def coefficients(model: FeatureMap, theta: Tensor, X: Tensor) -> Tensor:
    """Coefficients alpha (n, C) of least squares theta ~ alpha^T phi(X), in float64."""
    features = model.features(X).double()
    gram_inverse = pseudo_inverse(features @ features.T, cutoff=1e-14)
    return gram_inverse @ (features @ theta.double().T)


def tangent_bases(X: Tensor) -> Tensor:
    """For every row an orthonormal basis of the directions that stay on the sphere, (n, d - 1, d).

    The last d - 1 rows of the Householder reflection that takes x_i / ||x_i|| to the first axis.
    """
    n, d = X.shape
    u = X / torch.linalg.vector_norm(X, dim=1, keepdim=True)
    # Away from the axis on its own side, so that nothing cancels.
    w = u.clone()
    w[:, 0] += torch.where(u[:, 0] >= 0, 1.0, -1.0)
    scale = 2 / w.square().sum(1)
    reflection = torch.eye(d, dtype=X.dtype, device=X.device).repeat(n, 1, 1)
    reflection -= scale[:, None, None] * w[:, :, None] * w[:, None, :]
    return reflection[:, 1:]


def parameter_jacobian(
    model: FeatureMap, X: Tensor, alpha: Tensor, *, bases: Tensor | None = None
) -> Tensor:
    """The Jacobian of (X, alpha) -> theta, (C p, n (d - 1) + n C) in float64.

    Columns: d theta_c / d t = alpha_ic J_i t for the d - 1 tangent directions t of x_1, then of
    x_2, and so on; then phi(x_i) in the rows of output c, for (i, c) in row-major order.

    Args:
        model: the feature map, of dtype float64.
        X: (n, d) rows on the sphere.
        alpha: (n, C) coefficients.
        bases: (n, d - 1, d) bases of the tangent spaces, `tangent_bases(X)` if not given.

    Raises:
        ValueError: for wrong shapes, d = 1 (where no direction stays on the sphere), or rows off
            the sphere.
        TypeError: for a model that does not compute in float64, or alpha that is no tensor.
    """
    check_double(model)
    check_on_sphere("X", check_finite("X", check_rows("X", X, model)))
    n, d = X.shape
    if d < 2:
        raise ValueError(f"samples must have d = 2 numbers at least, got {d}")
    if not isinstance(alpha, Tensor):
        raise TypeError(f"alpha must be a torch tensor, got {type(alpha).__name__}")
    if alpha.ndim != 2 or len(alpha) != n:
        raise ValueError(f"alpha must have shape ({n}, C), got {tuple(alpha.shape)}")
    bases = tangent_bases(X) if bases is None else bases
    C, p = alpha.shape[1], model.p
    pushed = torch.stack([model.jvp(X, bases[:, k].contiguous()) for k in range(d - 1)], dim=1)
    directions = alpha.T[:, :, None, None] * pushed  # (C, n, d - 1, p)
    directions = directions.reshape(C, n * (d - 1), p).transpose(1, 2).reshape(C * p, -1)
    values = torch.zeros(C, p, n, C, dtype=torch.float64, device=X.device)
    features = model.features(X).T
    for c, block in enumerate(values):
        block[:, :, c] = features
    return torch.cat([directions, values.reshape(C * p, n * C)], dim=1)


@dataclass(frozen=True)
class Spectrum:
    """The singular values of the Jacobian with columns scaled to length 1.

    Unit columns make them pure numbers: neither the size of the coefficients (as long as none is
    0) nor that of the features enters for one output.

    Attributes:
        rows: C p, equations.
        columns: n (d - 1) + n C, unknowns.
        rank: singular values above rounding, max(rows, columns) eps times the largest.
        smallest: the smallest of the `columns` singular values; 0 where rows are fewer.
        dead_rows: rows that are zero: features that are inactive at all samples (ReLU), which
            hold no information.
        singular_values: all of them, descending, (min(rows, columns),).
    """

    rows: int
    columns: int
    rank: int
    smallest: float
    dead_rows: int
    singular_values: Tensor

    @property
    def identified(self) -> bool:
        """Whether all unknowns are determined locally: full column rank."""
        return self.rank == self.columns


def jacobian_spectrum(model: FeatureMap, X: Tensor, alpha: Tensor) -> Spectrum:
    """Rank and singular values of the Jacobian at (X, alpha); see `parameter_jacobian`.

    Raises:
        ValueError: as `parameter_jacobian`.
        TypeError: as `parameter_jacobian`.
    """
    J = parameter_jacobian(model, X, alpha)
    rows, columns = J.shape
    dead = int((J == 0).all(dim=1).sum())
    lengths = torch.linalg.vector_norm(J, dim=0)
    values = torch.linalg.svdvals(J / torch.where(lengths > 0, lengths, 1))
    cutoff = max(rows, columns) * torch.finfo(J.dtype).eps * values[0]
    rank = int((values > cutoff).sum())
    smallest = float(values[-1]) if rows >= columns else 0.0
    return Spectrum(rows, columns, rank, smallest, dead, values)


def check_double(model: FeatureMap) -> None:
    """Refuse a model that does not compute in float64.

    Raises:
        TypeError: for any other dtype.
    """
    if model.dtype != torch.float64:
        raise TypeError(
            f"ranks and null spaces need a model of dtype torch.float64, got {model.dtype}"
        )
