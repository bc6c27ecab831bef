"""An attack made twice, where once does not tell which samples to believe.

Samples that explain parameters that hold more numbers than the data need no witness, unless some
of them are superfluous. In every other case an independent attack is one: a sample is confirmed if
both found it, once for each candidate there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from paperlib.elimination import shares
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

    def shares_of(record: Reconstruction) -> Tensor:
        return shares(Linearization(features, theta, record.samples))

    record = attempt(search["seed"])
    each = shares_of(record)
    confirmed = torch.ones(n, dtype=torch.bool)
    if _in_doubt(record, each):
        other = attempt(search["seed"] + 1)
        if other.loss < record.loss and not read_back(record):
            record, other = other, record
            each = shares_of(record)
        if _in_doubt(record, each):
            again = repeated(record.samples) & (each < NEEDED).cpu()
            confirmed = witnessed(record.samples, other.samples) & ~again
    return nothing | {"record": record, "confirmed": confirmed, "shares": each}


def _in_doubt(record: Reconstruction, each: Tensor) -> bool:
    """Whether samples need a witness, by the share of each."""
    return not read_back(record) or float(each.min()) < NEEDED


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


def read_back(record: Reconstruction) -> bool:
    """Whether the samples explain the parameters, and no others would."""
    return record.explained and record.identifiable


def close_rows(A: Tensor, B: Tensor) -> Tensor:
    """Which rows of A have a row of B within `SAME` of their norm, (n,) of bool."""
    return (_distances(A, B) <= SAME).any(1)


def witnessed(A: Tensor, B: Tensor) -> Tensor:
    """Which rows of A have a row of B of their own within `SAME` of their norm, (n,) of bool."""
    distances = _distances(A, B)
    far = len(A) * SAME + 1  # that no sum of near ones reaches: as many as possible are matched
    rows, columns = linear_sum_assignment(torch.where(distances <= SAME, distances, far))
    found = torch.zeros(len(A), dtype=torch.bool)
    found[rows] = distances[rows, columns] <= SAME
    return found


def repeated(A: Tensor) -> Tensor:
    """Which rows of A lie within `SAME` of the norm of an earlier one, (n,) of bool."""
    return (_distances(A, A) <= SAME).tril(-1).any(1)


def _distances(A: Tensor, B: Tensor) -> Tensor:
    """Of the rows of A to those of B, in units of the norm of the former, on the CPU."""
    A, B = A.detach().double(), B.detach().double()
    return (torch.cdist(A, B) / torch.linalg.vector_norm(A, dim=1, keepdim=True)).cpu()
