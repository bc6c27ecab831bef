"""One cell of several releases: T heads on the same features and data, attacked together."""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.activations import activation_names
from paperlib.checks import check_count, check_named, check_positive
from paperlib.compare import compare
from paperlib.data import sphere
from paperlib.law import unknowns
from paperlib.lift import spent_by_lift
from paperlib.min_norm import fit_min_norm
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import reconstruct
from paperlib.releases import (
    combine_releases,
    differences,
    gradient_descent_checkpoints,
    release_spectrum,
)
from paperlib.second_order import candidates_of
from paperlib.streams import stream

KINDS = ("labels", "unknown start", "ridge", "checkpoints")
COMBINATIONS = ("orthonormal", "as released")


def run_release_cell(
    n: int,
    d: int,
    p_over_dn: float,
    releases: int,
    activation: str = "relu+tanh",
    kind: str = "labels",
    combination: str = "orthonormal",
    lift: bool | None = None,
    start: str = "auto",
    seed: int = 0,
    restarts: int = 3,
    max_steps: int = 200,
    dtype: str = "float32",
) -> dict[str, float | int | bool]:
    """Trains several heads on one set of features, and reads the data back from all of them.

    Args:
        n: number of training samples, uniform on the sphere.
        d: their dimension.
        p_over_dn: parameters of one release per number in the data.
        releases: T, how many vectors are released.
        activation: one of `activation_names()`.
        kind: what differs between releases. "labels": independent N(0, 1) labels; "unknown
            start": the same, from a random theta_0 that the attacker does not know, so that only
            T - 1 differences can be used; "ridge": one set of labels, ridge parameters a factor
            of 10 apart; "checkpoints": one run of gradient descent, saved after 1, 4, 16, ...
            steps.
        combination: "orthonormal" rows by `combine_releases`, or the stack "as released".
        lift: the option of `reconstruct`.
        start: the option of `reconstruct`: "auto", or "random" for descent from random candidates.
        seed: of data, labels, features and candidates.
        restarts: most starts.
        max_steps: most steps of one stage of one restart.
        dtype: "float32" or "float64", of features and parameters.

    Returns:
        `p`; `numbers`, T p with T the vectors that are used; `unknowns`, n (d - 1) + n min(T, n);
        `rank`, vectors kept; `weakest`, the smallest relative singular value of the releases;
        `recovered` and `signed_error` of `compare`; `projection_loss`; `lifted`; `passes`;
        `attack_seconds`.
    """
    precision = getattr(torch, dtype)
    data = sphere(n, d, seed=seed, dtype=precision)
    model = RandomFeatures(d, round(p_over_dn * d * n), activation, seed=seed, dtype=precision)
    thetas = train_releases(model, data.X, releases, kind, seed=seed)
    weakest = float(release_spectrum(thetas)[-1])
    combined = combine_releases(thetas)
    theta = combined if combination == "orthonormal" else torch.cat(thetas)
    record = reconstruct(
        model,
        theta,
        n,
        seed=seed,
        restarts=restarts,
        start=start,
        max_steps=max_steps,
        lift=lift,
        progress=False,
    )
    errors = compare(data.X, record.samples)
    used = min(len(theta), n)
    return {
        "p": model.p,
        "numbers": used * model.p,
        "unknowns": unknowns(n, d, used),
        "rank": len(combined),
        "weakest": weakest,
        "recovered": errors.recovered(),
        "signed_error": errors.signed_error,
        "projection_loss": record.loss,
        "lifted": any(stage["stage"] == "lift" for stage in record.stages),
        "passes": record.passes,
        "attack_seconds": record.seconds,
    }


def train_releases(
    model: RandomFeatures, X: Tensor, releases: int, kind: str, *, seed: int
) -> list[Tensor]:
    """The parameters an attacker holds: vectors in the span of phi(X), each (1, p).

    The arguments are those of `run_release_cell`.

    Raises:
        ValueError: for a kind that is not among `KINDS`.
    """
    labels = torch.randn(len(X), releases, generator=stream("labels", seed), dtype=torch.float64)
    labels = labels.to(X)
    if kind == "labels":
        return list(fit_min_norm(model, X, labels).split(1))
    if kind == "unknown start":
        start = torch.randn(1, model.p, generator=stream("start", seed), dtype=torch.float64)
        start = start.to(X) / model.p**0.5
        moves = fit_min_norm(model, X, labels, theta_0=start.expand(releases, -1))
        return differences(list((start + moves).split(1)))
    if kind == "ridge":
        ridges = [0.0] + [model.p / len(X) * 10.0 ** (k - 2) for k in range(releases - 1)]
        return [fit_min_norm(model, X, labels[:, 0], ridge=ridge) for ridge in ridges]
    if kind == "checkpoints":
        steps = [4**k for k in range(releases)]
        return gradient_descent_checkpoints(model.features(X), labels[:, 0], steps)
    raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")


def check_release_cell(
    n: int,
    d: int,
    p_over_dn: float,
    releases: int,
    activation: str,
    kind: str,
    combination: str,
    lift: bool | None,
    start: str,
    seed: int,
    restarts: int,
    max_steps: int,
    dtype: str,
) -> None:
    """Refuses values that `run_release_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, too few parameters, or an unknown name.
    """
    counts = {"n": n, "releases": releases, "restarts": restarts, "max_steps": max_steps}
    for name, value in counts.items():
        check_count(name, value)
    check_count("d", d, least=2)
    check_count("seed", seed, least=0)
    check_positive("p_over_dn", p_over_dn)
    p = round(p_over_dn * d * n)
    if p < n:
        raise ValueError(f"p must be at least n = {n}, got {p}")
    spent = spent_by_lift(d, candidates_of(n, p))
    if lift and p <= spent:
        raise ValueError(f"lift=True needs p above d and the candidates, {spent}, got {p}")
    if kind == "unknown start" and releases < 2:
        raise ValueError("without theta_0 at least 2 releases are needed, got 1")
    for name, value, known in (
        ("activation", activation, activation_names()),
        ("kind", kind, KINDS),
        ("combination", combination, COMBINATIONS),
        ("lift", lift, (None, True, False)),
        ("start", start, ("auto", "random")),
        ("dtype", dtype, ("float32", "float64")),
    ):
        check_named(name, value, known)
