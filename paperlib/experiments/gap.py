"""One cell of closing the gap: which way of starting finds the data, at one p / (d n)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from paperlib.activations import activation as activation_named
from paperlib.activations import activation_names
from paperlib.checks import check_count, check_named, check_positive
from paperlib.compare import compare
from paperlib.data import DataSet, photographs, sphere
from paperlib.lift import LIFT_SHARE, room_for_lift, spent_by_lift
from paperlib.message_passing import MessagePassing, whiten
from paperlib.min_norm import fit_min_norm
from paperlib.progress import Progress
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import TOLERANCE, reconstruct
from paperlib.sample_count import descend
from paperlib.second_order import candidates_of
from paperlib.signs import settle_signs
from paperlib.spectral_start import SpectralStart, second_moment_coefficient
from paperlib.sphere import to_sphere
from paperlib.streams import stream

METHODS = (
    "published",
    "random starts",
    "spectral start",
    "subspace search",
    "one round of messages",
    "default",
)
# Those that begin at the spectral start, which has d directions at most.
SPECTRAL = ("spectral start", "subspace search", "one round of messages")
DATA = ("sphere", "photographs")


def run_gap_cell(
    n: int,
    d: int,
    p_over_dn: float,
    activation: str = "relu",
    method: str = "default",
    data: str = "sphere",
    seed: int = 0,
    restarts: int = 5,
    max_steps: int = 200,
    published_steps: int = 2000,
) -> dict[str, float | int | bool]:
    """Trains random features by least squares and reads the data back in one of several ways.

    Args:
        n: number of training samples.
        d: their dimension (for photographs the number of pixels, a square).
        p_over_dn: parameters per number in the data.
        activation: one of `activation_names()`.
        method: "published", the paper's gradient descent; "random starts" of the second-order
            solver; "spectral start", one descent from the eigenvectors of the second moment;
            "subspace search", one start from searches in their span and descents, in turn; "one
            round of messages", message passing alone with no descent after it; "default",
            `reconstruct` as it comes.
        data: "sphere" or "photographs".
        seed: of data, features and starts.
        restarts: most starts of "random starts" and "default".
        max_steps: most steps of one descent.
        published_steps: most steps of the published procedure, from one start.

    Returns:
        `p`; `recovered`, samples with a signed error of at most 0.05 in units of sqrt(d);
        `near`, samples that a candidate meets with a |cosine| above 0.9; `whole`, whether all
        were recovered; `projection_loss`, for "one round of messages" what the beliefs leave
        unexplained; `explained`, whether that is at most 1e-10, for "published" too, which stops
        at 1e-7; `restarts_used`; `passes`.
    """
    samples = load(data, n, d, seed=seed)
    model = RandomFeatures(d, round(p_over_dn * d * n), activation, seed=seed)
    theta = fit_min_norm(model, samples.X, samples.y)
    theta = theta.reshape(-1, model.p)
    if method == "published":
        options: dict[str, Any] = {"solver": "published", "max_steps": published_steps}
    else:
        start = {"random starts": "random", "subspace search": "subspace"}.get(method, "auto")
        starts = 1 if method == "subspace search" else restarts
        options = {"restarts": starts, "start": start, "max_steps": max_steps}
    if method == "spectral start":
        found = from_spectral_start(model, theta, n, max_steps=max_steps)
    elif method == "one round of messages":
        beliefs = MessagePassing(model, theta, n, generator=stream("candidates", seed)).run(300)
        found = {
            "samples": beliefs.X,
            "loss": beliefs.unexplained,
            "passes": 2 * beliefs.iterations,
        }
    else:
        record = reconstruct(model, theta, n, seed=seed, progress=False, **options)
        found = {"samples": record.samples, "loss": record.loss, "passes": record.passes}
        found["restarts"] = 1 + max((stage["restart"] for stage in record.stages), default=0)
    X = found["samples"].to(samples.X)
    recovered = compare(samples.X, X).recovered()
    unit = torch.nn.functional.normalize
    cosines = (unit(X) @ unit(samples.X).T).abs().amax(0)
    return {
        "p": model.p,
        "recovered": recovered,
        "near": int((cosines > 0.9).sum()),
        "whole": recovered == n,
        "projection_loss": found["loss"],
        "explained": found["loss"] <= TOLERANCE[torch.float32],
        "restarts_used": found.get("restarts", 1),
        "passes": found["passes"],
    }


def load(data: str, n: int, d: int, *, seed: int) -> DataSet:
    """The data set of that name with n samples of dimension d."""
    if data == "sphere":
        return sphere(n, d, seed=seed)
    return photographs(n, size=round(d**0.5), grey=True, seed=seed)


def from_spectral_start(
    model: RandomFeatures, theta: Tensor, n: int, *, max_steps: int
) -> dict[str, Any]:
    """Levenberg-Marquardt from the n strongest eigenvectors of the second moment.

    The search for eigenvectors begins at the same random vectors whatever the seed of the cell.
    """
    spectral = SpectralStart(model, second_moment_coefficient(model), dtype=model.dtype)
    directions, _, _ = spectral.directions(theta, n, generator=stream("candidates", 0))
    X = settle_signs(model, theta, to_sphere(directions))
    run = descend(
        model,
        theta,
        X,
        None,
        target=TOLERANCE[model.dtype],
        max_steps=max_steps,
        watch=Progress(False),
    )
    return {"samples": run.point.X, "loss": run.point.loss, "passes": run.passes}


def captured_by_span(model: RandomFeatures, theta: Tensor, X: Tensor) -> Tensor:
    """The share of each sample's square inside the top-n eigenspace of the second moment, (n,)."""
    spectral = SpectralStart(model, second_moment_coefficient(model), dtype=model.dtype)
    generator = stream("candidates", 0)
    U, _, _ = spectral.directions(whiten(theta), len(X), generator=generator)
    return (X @ U.T).square().sum(1) / X.square().sum(1)


def check_gap_cell(
    n: int,
    d: int,
    p_over_dn: float,
    activation: str,
    method: str,
    data: str,
    seed: int,
    restarts: int,
    max_steps: int,
    published_steps: int,
) -> None:
    """Refuses values that `run_gap_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, too few parameters, a number of pixels that is no square,
            an unknown name, or an activation that the method cannot search with.
    """
    counts = {"n": n, "restarts": restarts, "max_steps": max_steps}
    for name, value in {**counts, "published_steps": published_steps}.items():
        check_count(name, value)
    check_count("d", d, least=2)
    check_count("seed", seed, least=0)
    check_positive("p_over_dn", p_over_dn)
    p = round(p_over_dn * d * n)
    if p < max(n, d):
        raise ValueError(f"p must be at least n and d, got {p}")
    for name, value, known in (
        ("activation", activation, activation_names()),
        ("method", method, METHODS),
        ("data", data, DATA),
    ):
        check_named(name, value, known)
    if data == "photographs" and (d < 16 or math.isqrt(d) ** 2 != d):
        raise ValueError(f"d must be the square of a side of at least 4 pixels, got {d}")
    if method in SPECTRAL:
        if not activation_named(activation).hermite_coefficients(2)[2]:
            raise ValueError(f"{method} needs a second moment, which {activation} has not")
        if n > d:
            raise ValueError(f"{method} needs n of at most d = {d}, got {n}")
    if method == "subspace search":
        # The search needs the linear part lifted.
        candidates = candidates_of(n, p)
        least = math.ceil(spent_by_lift(d, candidates) / (1 - LIFT_SHARE))
        if not room_for_lift(p, d, candidates):
            raise ValueError(f"subspace search needs p of at least {least}, got {p}")
