"""Several vectors of parameters trained on the same data with the same features.

Heads for other labels, other outputs, checkpoints of one run, fits with another ridge, models
before and after unlearning: as long as the features are the same, every such vector (minus its
start) lies in span{phi(x_1), .., phi(x_n)}. T independent ones are one matrix Theta (T, p) for
`reconstruct`. Since only their span counts, its rows are made orthonormal: the loss is then the
same whichever basis of the span was released, and a release that is nearly a combination of the
others counts as much as they do instead of being lost beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from paperlib.checks import check_count, check_finite, check_range


def combine_releases(thetas: Sequence[Tensor], *, least: float | None = None) -> Tensor:
    """An orthonormal basis of the span of all releases, (T, p), for `reconstruct`.

    Each row is scaled to length 1; of the singular value decomposition U S Q of the stack, the
    rows of Q with S above `least` times the largest are kept. A direction with singular value s
    carries the rounding of the releases magnified by 1 / s.

    Args:
        thetas: releases, each (p,) or (C, p), trained minus initial parameters.
        least: relative singular value below which a direction counts as dependent; the square
            root of the rounding unit of the coarsest dtype if not given (3e-4 in float32, 1.5e-8 in
            float64), which magnifies rounding to the same square root.

    Returns:
        (T, p) with orthonormal rows, T at most the number of vectors, in the dtype of the first.

    Raises:
        ValueError: for no release, shapes or devices that do not fit, values that are not finite,
            a vector of zeros, or `least` outside [0, 1).
        TypeError: for something that is not a tensor of floating-point numbers.
    """
    stack = _stack(thetas)
    dtype = thetas[0].dtype
    if least is None:
        least = math.sqrt(max(torch.finfo(theta.dtype).eps for theta in thetas))
    check_range("least", least, least=0, below=1)
    _, singular, rows = torch.linalg.svd(stack, full_matrices=False)
    rounding = max(stack.shape) * torch.finfo(torch.float64).eps
    return rows[singular > max(least, rounding) * singular[0]].to(dtype)


def release_spectrum(thetas: Sequence[Tensor]) -> Tensor:
    """Singular values of the releases scaled to length 1, relative to the largest, descending.

    Values near 0 say that releases are nearly dependent and give little new.

    Raises:
        ValueError: as `combine_releases`.
        TypeError: as `combine_releases`.
    """
    singular = torch.linalg.svdvals(_stack(thetas))
    return singular / singular[0]


def differences(thetas: Sequence[Tensor]) -> list[Tensor]:
    """Each release minus the last: what an attacker has who does not know where training began.

    If all started at the same theta_0, it cancels: T + 1 releases without theta_0 are worth T
    with it.

    Raises:
        ValueError: for fewer than two releases, or shapes that differ.
    """
    if len(thetas) < 2:
        raise ValueError(f"differences need at least two releases, got {len(thetas)}")
    shapes = [tuple(theta.shape) for theta in thetas]
    if len(set(shapes)) > 1:
        raise ValueError(f"releases must have one shape to be subtracted, got {shapes}")
    return [theta - thetas[-1] for theta in thetas[:-1]]


def gradient_descent_checkpoints(
    Phi: Tensor, y: Tensor, steps: Sequence[int], *, step_scale: float = 1.0
) -> list[Tensor]:
    """Parameters theta - theta_0 after the given numbers of gradient descent steps, each (C, p).

    Full-batch descent on the square loss of f = Phi theta moves theta within the span of the
    features, theta = Phi^T a, so that a alone has to be iterated:

        a <- a - (step_scale / lambda) (K a - y),   K = Phi Phi^T, lambda its largest eigenvalue.

    Args:
        Phi: (n, p) features of the training samples.
        y: (n,) or (n, C) labels (minus the outputs at theta_0).
        steps: after how many steps to save, each at least 1.
        step_scale: step size times lambda, above 0 and below 2.

    Raises:
        ValueError: for shapes that do not fit, no steps, or a step size that diverges.
    """
    check_range("step_scale", step_scale, least=1e-12, below=2)
    wanted = [check_count("steps", step) for step in steps]
    if not wanted:
        raise ValueError("steps must name at least one checkpoint")
    if Phi.ndim != 2 or len(y) != len(Phi):
        raise ValueError(
            f"Phi must be (n, p) and y (n,) or (n, C), got {tuple(Phi.shape)}, {tuple(y.shape)}"
        )
    wide, targets = Phi.double(), y.double().reshape(len(Phi), -1)
    values, vectors = torch.linalg.eigh(wide @ wide.T)
    rates = step_scale * (values / values[-1]).clamp(min=0)
    fitted = vectors.T @ targets
    saved = []
    for step in wanted:
        # a = K^-1 (1 - (1 - step_scale K / lambda)^step) y, eigenvalue by eigenvalue.
        learned = 1 - (1 - rates) ** step
        share = torch.where(values > 0, learned / values, 0)
        coefficients = vectors @ (share[:, None] * fitted)
        saved.append((coefficients.T @ wide).to(Phi.dtype))
    return saved


def _stack(thetas: Sequence[Tensor]) -> Tensor:
    """All vectors, scaled to length 1, one a row, in float64."""
    if isinstance(thetas, Tensor):
        raise TypeError("expected a list of releases, each a tensor (p,) or (C, p), got one tensor")
    if len(thetas) == 0:
        raise ValueError("expected at least one release, got none")
    rows = []
    for k, theta in enumerate(thetas):
        if not isinstance(theta, Tensor) or not theta.dtype.is_floating_point:
            raise TypeError(f"release {k} must be a tensor of floating-point numbers")
        if theta.ndim not in (1, 2) or theta.shape[-1] != thetas[0].shape[-1] or 0 in theta.shape:
            raise ValueError(
                f"release {k} must have shape (p,) or (C, p) with the p of release 0, got "
                f"{tuple(theta.shape)} after {tuple(thetas[0].shape)}"
            )
        if theta.device != thetas[0].device:
            raise ValueError(f"release {k} is on {theta.device}, release 0 on {thetas[0].device}")
        rows.append(check_finite(f"release {k}", theta).double().reshape(-1, theta.shape[-1]))
    stack = torch.cat(rows)
    lengths = torch.linalg.vector_norm(stack, dim=1, keepdim=True)
    if bool((lengths == 0).any()):
        row = int((lengths[:, 0] == 0).nonzero()[0])
        raise ValueError(f"vector {row} of the releases is zero: nothing was learned")
    return stack / lengths
