"""The losses that networks are trained with, and the labels that each of them takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from paperlib.checks import check_finite


@dataclass(frozen=True)
class Loss:
    """A loss of outputs f (n, C) against targets (n, C), a mean over samples.

    Attributes:
        name: "squared", "logistic" or "cross-entropy".
        value: (f, targets) -> scalar, computed in float64: near its minimum a loss of 1e-7 is the
            size of float32's rounding.
        targets: labels -> targets (n, C), after checking them.
    """

    name: str
    value: Callable[[Tensor, Tensor], Tensor]
    targets: Callable[[Tensor, int], Tensor]


def _squared(f: Tensor, y: Tensor) -> Tensor:
    """Mean of (f - y)^2 over samples and outputs."""
    return (f.double() - y).square().mean()


def _logistic(f: Tensor, y: Tensor) -> Tensor:
    """Mean of log(1 + exp(-y f)) over samples and outputs."""
    return F.softplus(-y * f.double()).mean()


def _cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    """Mean over samples of -sum_c y_c log softmax(f)_c.

    Written with differences to the right output, so that log(1 + tiny) keeps its digits.
    """
    f = f.double()
    right = (f * y).sum(1, keepdim=True)
    others = (f - right).masked_fill(y > 0, -torch.inf)
    return F.softplus(torch.logsumexp(others, dim=1)).mean()


def _real_targets(y: Tensor, C: int) -> Tensor:
    if y.ndim == 1:
        y = y[:, None]
    if y.ndim != 2 or y.shape[1] != C:
        raise ValueError(f"y must have shape (n, {C}) for {C} outputs, got {tuple(y.shape)}")
    return check_finite("y", y.double())


def _sign_targets(y: Tensor, C: int) -> Tensor:
    y = _real_targets(y, C)
    if not bool((y.abs() == 1).all()):
        raise ValueError(f"logistic loss takes labels -1 and +1, got {_some(y)}")
    return y


def _class_targets(y: Tensor, C: int) -> Tensor:
    if C < 2:
        raise ValueError(
            "cross-entropy needs at least 2 outputs, got 1: use the logistic loss for two classes"
        )
    if y.ndim == 1 and not y.dtype.is_floating_point:
        if int(y.min()) < 0 or int(y.max()) >= C:
            raise ValueError(f"classes must be 0 to {C - 1}, got {_some(y)}")
        return F.one_hot(y.long(), C).double()
    y = _real_targets(y, C)
    if not bool((((y == 0) | (y == 1)).all(1) & (y.sum(1) == 1)).all()):
        raise ValueError(
            f"cross-entropy takes one-hot labels (n, {C}) or classes (n,) of a whole-number "
            f"dtype, got {_some(y)}"
        )
    return y


def _some(y: Tensor) -> str:
    return f"values {y.flatten()[:6].tolist()}.."


_LOSSES = {
    loss.name: loss
    for loss in (
        Loss("squared", _squared, _real_targets),
        Loss("logistic", _logistic, _sign_targets),
        Loss("cross-entropy", _cross_entropy, _class_targets),
    )
}


def loss_named(name: str | Loss) -> Loss:
    """The loss of that name; a `Loss` is returned as it is.

    Raises:
        ValueError: if the name is not known.
    """
    if isinstance(name, Loss):
        return name
    if name not in _LOSSES:
        raise ValueError(f"unknown loss {name!r}: expected one of {', '.join(_LOSSES)}")
    return _LOSSES[name]
