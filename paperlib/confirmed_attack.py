"""An attack made twice, where once does not tell which samples to believe.

Samples that explain parameters that hold more numbers than the data need no witness, unless some
of them are superfluous. In every other case an independent attack is one: a sample is confirmed if
both found it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from paperlib.elimination import removal_costs
from paperlib.module_features import ModuleFeatures
from paperlib.progress import Progress
from paperlib.projection import Linearization
from paperlib.reconstruct import reconstruct
from paperlib.record import Reconstruction
from paperlib.sample_count import descend

# Two attacks found the same sample when their candidates are this close, relative to their norm.
SAME = 0.2

# A candidate without which the loss rises by less may be superfluous.
NEEDED = 1e-4

# Steps from the rounding of stored weights down to where nothing more is gained.
FINISH_STEPS = 30


def attack_twice(
    features: ModuleFeatures,
    theta: Tensor,
    n: int | None,
    readable: int,
    target: float,
    search: dict[str, Any],
) -> dict[str, Any]:
    """The better of two independent attacks, and which of its samples are confirmed.

    Args:
        features: what is attacked.
        theta: (C, p).
        n: number of samples; None if it is not known.
        readable: the most that theta can determine; more are not attacked.
        target: the loss down to which samples are moved, once they are found.
        search: options of `reconstruct`, `tolerance` and `seed` among them.

    Returns:
        `record`, `confirmed` (n,), `shares` (n,) and `samples`, which the caller fills in; all of
        them None where nothing was attacked.
    """
    nothing = dict.fromkeys(("record", "samples", "confirmed", "shares"))
    if n is None or n > readable:
        return nothing

    def attempt(seed: int) -> Reconstruction:
        record = reconstruct(features, theta, n, **search | {"seed": seed})
        return _finish(features, theta, record, target)

    record = attempt(search["seed"])
    shares = _shares(features, theta, record)
    confirmed = torch.ones(n, dtype=torch.bool)
    if _in_doubt(record, shares):
        other = attempt(search["seed"] + 1)
        if other.loss < record.loss and not read_back(record):
            record, other = other, record
            shares = _shares(features, theta, record)
        if _in_doubt(record, shares):
            confirmed = close_rows(record.samples, other.samples)
    return nothing | {"record": record, "confirmed": confirmed, "shares": shares}


def _in_doubt(record: Reconstruction, shares: Tensor) -> bool:
    """Whether samples need a witness."""
    return not read_back(record) or float(shares.min()) < NEEDED


def _finish(
    features: ModuleFeatures, theta: Tensor, record: Reconstruction, target: float
) -> Reconstruction:
    """Samples that explain the parameters up to rounding, moved to where the loss is least."""
    if not target < record.loss <= record.options["tolerance"]:
        return record
    with Progress(False) as watch:
        options = {"target": target, "max_steps": FINISH_STEPS, "watch": watch}
        run = descend(features, theta, record.samples, None, **options)
    passes = record.passes + run.passes
    return replace(record, samples=run.point.X, loss=run.point.loss, passes=passes)


def _shares(features: ModuleFeatures, theta: Tensor, record: Reconstruction) -> Tensor:
    """How much the loss rises without each of the samples."""
    point = Linearization(features, theta, record.samples)
    return removal_costs(point.gram_inverse, point.alpha) / point.total_square


def read_back(record: Reconstruction) -> bool:
    """Whether the samples explain the parameters, and no others would."""
    return record.explained and record.identifiable


def close_rows(A: Tensor, B: Tensor) -> Tensor:
    """Which rows of A have a row of B within `SAME` of their norm, (n,) of bool."""
    distances = torch.cdist(A.double(), B.double()).amin(1)
    return (distances <= SAME * torch.linalg.vector_norm(A.double(), dim=1)).cpu()
