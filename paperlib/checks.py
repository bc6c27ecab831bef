"""Checks of what a caller hands in, at the boundary and before any long work.

Every check returns the value it checked and raises an error that says what was expected and what
came.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from paperlib.feature_map import FeatureMap


def check_count(name: str, value: object, *, least: int = 1) -> int:
    """A whole number of at least `least`."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole:
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_positive(name: str, value: object, *, below: float = math.inf) -> float:
    """A finite number above 0 and below `below`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (0 < value < below) or not math.isfinite(value):
        upper = "" if below == math.inf else f" and below {below}"
        raise ValueError(f"{name} must be above 0{upper}, got {value}")
    return float(value)


def check_range(name: str, value: object, *, least: float, below: float = math.inf) -> float:
    """A finite number of at least `least` and below `below`."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (least <= value < below):
        upper = " and finite" if below == math.inf else f" and below {below}"
        raise ValueError(f"{name} must be at least {least}{upper}, got {value}")
    return float(value)


def check_named(name: str, value: object, known: Iterable[object]) -> None:
    """One of the known values."""
    known = tuple(known)
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {value!r}")


def check_device(device: str | torch.device | None) -> torch.device:
    """A device that is there and has float64, as tensors name it; the CPU for None.

    Tensors on "cuda" say that they are on "cuda:0", and the two do not compare as equal.
    """
    try:
        device = torch.device("cpu" if device is None else device)
        probe = torch.empty(1, dtype=torch.float64, device=device)
        probe.cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        there = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        raise ValueError(
            f"device {device!s} is not there, or has no float64: expected one of {there}"
        ) from error
    return probe.device


def check_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """float32 or float64; float32 for None."""
    if dtype is None:
        return torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    return dtype


def check_finite(name: str, value: Tensor) -> Tensor:
    """No NaN and no infinity."""
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} entries that are NaN or infinite")
    return value


def check_rows(
    name: str,
    value: Tensor,
    model: FeatureMap,
    *,
    rows: int | None = None,
    columns: int | None = None,
) -> Tensor:
    """A matrix of rows for `model`: right shape, same dtype and device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(value).__name__}")
    columns = model.d if columns is None else columns
    expected = f"({'n' if rows is None else rows}, {columns})"
    right = value.ndim == 2 and value.shape[1] == columns and len(value) == (rows or len(value))
    if not right or len(value) == 0:
        raise ValueError(f"{name} must have shape {expected}, got {tuple(value.shape)}")
    if value.dtype != model.dtype:
        raise TypeError(
            f"{name} must have the model's dtype {model.dtype}, got {value.dtype}: "
            "dtypes are not mixed"
        )
    if value.device != model.device:
        raise ValueError(f"{name} must be on the model's device {model.device}, got {value.device}")
    return value


def check_on_sphere(name: str, X: Tensor, *, tolerance: float = 1e-2) -> Tensor:
    """Rows of norm sqrt(d), the setting of the paper."""
    norms = torch.linalg.vector_norm(X.double(), dim=1)
    radius = math.sqrt(X.shape[1])
    off = float((norms / radius - 1).abs().max())
    if not off <= tolerance:
        raise ValueError(
            f"rows of {name} must lie on the sphere of radius sqrt(d) = {radius:.4g}, got norms "
            f"from {float(norms.min()):.4g} to {float(norms.max()):.4g}: "
            "scale them with paperlib.to_sphere"
        )
    return X


def check_theta(theta: Tensor, model: FeatureMap) -> Tensor:
    """Parameters as (C, p), finite, and not zero; (p,) is read as one output.

    They come back without the graph that `layer.weight - before` has, which nothing here needs.
    """
    if not isinstance(theta, Tensor):
        raise TypeError(f"theta must be a torch tensor, got {type(theta).__name__}")
    theta = theta.detach()
    if theta.ndim == 1:
        theta = theta[None]
    if theta.ndim != 2 or theta.shape[1] != model.p or len(theta) == 0:
        raise ValueError(f"theta must have shape (C, {model.p}), got {tuple(theta.shape)}")
    if theta.dtype != model.dtype:
        raise TypeError(
            f"theta must have the model's dtype {model.dtype}, got {theta.dtype}: "
            "dtypes are not mixed, convert it with theta.to(model.dtype)"
        )
    if theta.device != model.device:
        raise ValueError(f"theta must be on the model's device {model.device}, got {theta.device}")
    check_finite("theta", theta)
    if not bool((theta != 0).any()):
        raise ValueError("theta is zero: nothing was learned, so there is nothing to read back")
    return theta
