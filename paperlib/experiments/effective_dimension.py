"""Attacks that know a subspace near which the data lie: one cell on made data, one on pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from paperlib.activations import activation_names
from paperlib.bases import cosine_basis, principal_basis
from paperlib.checks import check_count, check_named, check_positive, check_range
from paperlib.compare import Comparison, compare
from paperlib.data import DataSet, cifar10, photographs, sphere
from paperlib.data.cifar10 import CLASSES
from paperlib.min_norm import fit_min_norm
from paperlib.projection import projection_loss
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import reconstruct
from paperlib.record import Reconstruction
from paperlib.sphere import random_on_sphere
from paperlib.streams import stream
from paperlib.subspace import SubspaceFeatures

BASES = {
    "cosine": lambda data, X, k: cosine_basis(X, data.image_shape, k),
    "principal": lambda data, X, k: principal_basis(X, k),
}

# How many pictures of each scale the attacker has of the photographs that are not under attack.
KNOWN_PHOTOGRAPHS = {1: 400, 2: 150, 4: 30}
KNOWN_CIFAR10 = 1000
CIFAR10_PIXELS = 3 * 32**2


def subspace_data(
    n: int, d: int, k: int, *, left_out: float = 0.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Points near a random subspace of dimension k, exactly known how near.

    x = sqrt(1 - left_out) u + sqrt(left_out) w with u uniform on the sphere within the subspace and
    w uniform on the one within its complement.

    Args:
        n: number of points.
        d: dimension.
        k: dimension of the subspace, below d if left_out > 0.
        left_out: share of every point's squared norm that lies off the subspace.
        seed: of everything.

    Returns:
        X (n, d) float32, labels (n,), and the basis of the subspace (d, k).
    """
    generator = stream("subspace", seed)
    Q = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    inside = sphere(n, k, seed=seed, dtype=torch.float64)
    X = (d / k) ** 0.5 * inside.X @ Q[:, :k].T
    if left_out > 0:
        off = random_on_sphere(n, d - k, generator=generator)
        off = (d / (d - k)) ** 0.5 * off @ Q[:, k:].T
        X = (1 - left_out) ** 0.5 * X + left_out**0.5 * off
    return X.float(), inside.y.float(), Q[:, :k].float()


def run_subspace_cell(
    n: int,
    d: int,
    k: int,
    p_over_kn: float,
    left_out: float = 0.0,
    activation: str = "relu",
    seed: int = 0,
    restarts: int = 3,
    max_steps: int = 60,
) -> dict[str, float | int | bool]:
    """One attack that knows the subspace, on data that lie in it up to `left_out`.

    Args:
        n: number of training samples.
        d: their dimension.
        k: dimension of the subspace; d for an attacker who knows nothing.
        p_over_kn: parameters per unknown, p / (k n).
        left_out: share of the samples' squared norm off the subspace.
        activation: one of `activation_names()`.
        seed: of data, features and candidates.
        restarts: most starts.
        max_steps: most steps of one stage of one start.

    Returns:
        `p`; `p_over_dn`; `recovered` and `signed_error` of `compare`; `median_error`, of the
        samples; `found`, samples that
        come within 0.05 of the point of the subspace nearest to them; `floor`, the mean distance
        of the samples from those points; `projection_loss`, and `loss_at_nearest`, what it is at
        those points; `identifiable`.
    """
    X, y, basis = subspace_data(n, d, k, left_out=left_out, seed=seed)
    model = RandomFeatures(d, round(p_over_kn * k * n), activation, seed=seed)
    theta = fit_min_norm(model, X, y)
    attack = SubspaceFeatures(model, basis)
    record = reconstruct(
        attack,
        theta,
        n,
        seed=seed,
        restarts=restarts,
        max_steps=max_steps,
        progress=False,
    )
    nearest = attack.inputs(attack.coordinates(X))
    samples = attack.inputs(record.samples)
    errors = compare(X, samples)
    return {
        "p": model.p,
        "p_over_dn": model.p / (d * n),
        "recovered": errors.recovered(),
        "signed_error": errors.signed_error,
        "median_error": float(np.median(errors.signed)),
        "found": compare(nearest, samples).recovered(),
        "floor": compare(X, nearest).signed_error,
        "projection_loss": record.loss,
        "loss_at_nearest": float(projection_loss(model, theta, nearest)),
        "identifiable": record.identifiable,
    }


def check_subspace_cell(
    n: int,
    d: int,
    k: int,
    p_over_kn: float,
    left_out: float,
    activation: str,
    seed: int,
    restarts: int,
    max_steps: int,
) -> None:
    """Refuses values that `run_subspace_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, k below 2 or above d, a share outside [0, 1), p below n,
            or an unknown activation.
    """
    for name, value in {
        "n": n,
        "restarts": restarts,
        "max_steps": max_steps,
    }.items():
        check_count(name, value)
    for name, value in {"d": d, "k": k}.items():
        check_count(name, value, least=2)
    check_count("seed", seed, least=0)
    check_positive("p_over_kn", p_over_kn)
    check_range("left_out", left_out, least=0, below=1)
    if k > d or (k == d and left_out > 0):
        raise ValueError(
            f"k must be at most d = {d}, and below it if something is left out, got {k}"
        )
    if round(p_over_kn * k * n) < n:
        raise ValueError(f"p must be at least n = {n}, got {round(p_over_kn * k * n)}")
    check_named("activation", activation, activation_names())


@dataclass(frozen=True)
class Pictures:
    """Pictures under attack, and what was read back within a subspace.

    Attributes:
        data: the training data.
        nearest: (n, d) the points of the subspace nearest to the data.
        record: of the attack, in coordinates of the subspace.
        errors: samples against the data.
        to_nearest: samples against `nearest`.
        left_out: mean share of the data's squared norm off the subspace.
    """

    data: DataSet
    nearest: Tensor
    record: Reconstruction
    errors: Comparison
    to_nearest: Comparison
    left_out: float


@lru_cache(maxsize=4)
def other_pictures(dataset: str, n: int, *, size: int, seed: int) -> tuple[DataSet, Tensor]:
    """N pictures to attack, and the rows of pictures that the attacker has instead.

    For "photographs" the two come from different photographs; for "cifar10" the attacker has
    pictures of the eight classes that are not under attack.

    Raises:
        ValueError: for another data set.
    """
    if dataset == "photographs":
        data = photographs(n, split="other", size=size, seed=seed)
        known = [
            photographs(m, split="train", size=size, scale=scale, seed=seed).X
            for scale, m in KNOWN_PHOTOGRAPHS.items()
        ]
        return data, torch.cat(known)
    if dataset == "cifar10":
        data = cifar10(n, seed=seed)
        others = [name for name in CLASSES if name not in data.class_names]
        known = cifar10(KNOWN_CIFAR10, others, labels="one-hot", seed=seed)
        return data, known.X
    raise ValueError(f"dataset must be photographs or cifar10, got {dataset!r}")


def attack_pictures(
    n: int,
    k: int,
    p_over_dn: float,
    *,
    dataset: str = "photographs",
    basis: str = "cosine",
    size: int = 32,
    activation: str = "relu",
    seed: int = 0,
    data_seed: int = 0,
    restarts: int = 3,
    max_steps: int = 40,
) -> Pictures:
    """Trains random features on pictures and reads them back within a learned subspace.

    Args:
        n: number of pictures.
        k: dimension of the subspace, learned from other pictures; d for an attacker who knows
            nothing.
        p_over_dn: parameters per number in the data.
        dataset: "photographs" or "cifar10".
        basis: "cosine" or "principal".
        size: side of a photograph in pixels.
        activation: one of `activation_names()`.
        seed: of features and candidates.
        data_seed: of the choice of pictures.
        restarts: most starts.
        max_steps: most steps of one stage of one start.
    """
    data, others = other_pictures(dataset, n, size=size, seed=data_seed)
    model = RandomFeatures(data.d, round(p_over_dn * data.d * n), activation, seed=seed)
    theta = fit_min_norm(model, data.X, data.y)
    # The whole space needs no basis, and what it costs to change to one.
    attack = SubspaceFeatures(model, BASES[basis](data, others, k)) if k < data.d else None
    record = reconstruct(
        attack or model,
        theta,
        n,
        seed=seed,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=1e-6,
        progress=False,
    )
    nearest = attack.inputs(attack.coordinates(data.X)) if attack else data.X
    samples = attack.inputs(record.samples) if attack else record.samples
    return Pictures(
        data=data,
        nearest=nearest,
        record=record,
        errors=compare(data.X, samples),
        to_nearest=compare(nearest, samples),
        left_out=float(attack.left_out(data.X).mean()) if attack else 0.0,
    )


def run_picture_cell(
    n: int,
    k: int,
    p_over_dn: float,
    dataset: str = "photographs",
    basis: str = "cosine",
    size: int = 32,
    activation: str = "relu",
    seed: int = 0,
    data_seed: int = 0,
    restarts: int = 3,
    max_steps: int = 40,
) -> dict[str, float | int]:
    """One cell of a sweep over `attack_pictures`, whose arguments it takes.

    Returns:
        `d`, `p`, `p_over_kn`; `left_out`; `signed_error` and `largest_error` of the samples;
        `floor`, the mean error of the nearest points of the subspace; `boxed_error`, the
        error once every sample is cut to the range of pixels; `projection_loss`.
    """
    run = attack_pictures(
        n,
        k,
        p_over_dn,
        dataset=dataset,
        basis=basis,
        size=size,
        activation=activation,
        seed=seed,
        data_seed=data_seed,
        restarts=restarts,
        max_steps=max_steps,
    )
    d = run.data.d
    p = round(p_over_dn * d * n)
    return {
        "d": d,
        "p": p,
        "p_over_kn": p / (k * n),
        "left_out": run.left_out,
        "signed_error": run.errors.signed_error,
        "largest_error": float(run.errors.signed.max()),
        "floor": compare(run.data.X, run.nearest).signed_error,
        "boxed_error": boxed_error(run.data, run.errors.matched),
        "projection_loss": run.record.loss,
    }


def boxed_error(data: DataSet, matched: Tensor) -> float:
    """Mean signed error of matched samples once their pixels are cut to [0, 1].

    Cut with each picture's own contrast, which an attacker does not know: the most that the box
    could give at the end of an attack.

    Args:
        data: the training data.
        matched: (n, d), row i the sample matched to training sample i.
    """
    pixels = torch.from_numpy(data.images(matched, index=range(data.n)))
    rows = (pixels - torch.from_numpy(data.mean)) / torch.from_numpy(data.scale)
    rows = rows.reshape(data.n, -1) / torch.from_numpy(data.contrast)[:, None]
    distances = torch.linalg.vector_norm(rows - data.X.double(), dim=1)
    return float(distances.mean()) / data.d**0.5


def check_picture_cell(
    n: int,
    k: int,
    p_over_dn: float,
    dataset: str,
    basis: str,
    size: int,
    activation: str,
    seed: int,
    data_seed: int,
    restarts: int,
    max_steps: int,
) -> None:
    """Refuses values that `run_picture_cell` cannot compute with, for `sweep(..., check=...)`.

    Photographs are cut for it; CIFAR-10 need not be where the sweep is driven.

    Raises:
        ValueError: for a count below 1, k above d, a ratio that is not positive, p below n, an
            unknown name, photographs too large to be as many as are needed, or more principal
            directions than the attacker has pictures.
    """
    counts = {"n": n, "k": k, "restarts": restarts, "max_steps": max_steps}
    for name, value in counts.items():
        check_count(name, value)
    check_count("size", size, least=4)
    for name, value in {"seed": seed, "data_seed": data_seed}.items():
        check_count(name, value, least=0)
    check_positive("p_over_dn", p_over_dn)
    check_named("dataset", dataset, ("photographs", "cifar10"))
    check_named("basis", basis, tuple(BASES))
    check_named("activation", activation, activation_names())
    d, known = CIFAR10_PIXELS, KNOWN_CIFAR10
    if dataset == "photographs":
        d, known = 3 * size**2, sum(KNOWN_PHOTOGRAPHS.values())
        try:
            other_pictures(dataset, n, size=size, seed=data_seed)
        except ValueError as error:
            raise ValueError(f"too few photographs of size = {size}: {error}") from error
    if k > d:
        raise ValueError(f"k must be at most d = {d}, got {k}")
    if round(p_over_dn * d * n) < n:
        raise ValueError(f"p must be at least n = {n}, got {round(p_over_dn * d * n)}")
    if basis == "principal" and known < k < d:
        raise ValueError(f"k must be at most {known}, the pictures that are known, or d, got {k}")
