"""The two theorems of the paper as experiments on random features.

Theorem 1: if the features of all training samples lie in the span of those of the candidates, each
candidate is close to a training sample. Theorem 2: for n = 2 both samples then have a candidate
of their own.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.spatial.distance import cdist
from torch import Tensor

from paperlib.activations import activation_names
from paperlib.checks import check_count, check_named, check_positive, check_range
from paperlib.compare import compare
from paperlib.data import sphere
from paperlib.feature_map import FeatureMap
from paperlib.min_norm import fit_min_norm
from paperlib.projection import solve_gram
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import reconstruct

# A candidate within this distance of a sample, relative to sqrt(d), counts as close to it. Random
# points are at a distance of about 1.4, the nearest of ten at about 1.2.
CLOSE = 0.2


def off_span(features: Tensor, spanning: Tensor) -> Tensor:
    """||P_perp phi_i|| / sqrt(p) for each row of `features`, (n,) float64.

    P_perp projects off the span of the rows of `spanning`; with rows phi(x_i) and phi(x^_j) this
    is the quantity of the paper's figure 3.

    Args:
        features: (n, p).
        spanning: (m, p).
    """
    rows, basis = features.double(), spanning.double()
    rest = rows - solve_gram(basis @ basis.T, basis @ rows.T, cutoff=1e-13).T @ basis
    return rest.norm(dim=1) / math.sqrt(rows.shape[1])


def count_merged(X: Tensor, samples: Tensor, *, close: float = CLOSE) -> dict[str, int]:
    """How many candidates are close to a sample, and how many of these share theirs.

    Args:
        X: (n, d) training samples.
        samples: (m, d) candidates.
        close: largest distance, relative to sqrt(d).

    Returns:
        `close_candidates`; `merged`, those in excess of the samples that have one; `missed`,
        samples that have none.
    """
    distance = cdist(samples.cpu().double(), X.cpu().double()) / math.sqrt(X.shape[1])
    owner, near = distance.argmin(1), distance.min(1) <= close
    found = len(np.unique(owner[near]))
    return {
        "close_candidates": int(near.sum()),
        "merged": int(near.sum()) - found,
        "missed": len(X) - found,
    }


def run_theorem_cell(
    n: int,
    d: int,
    p_over_dn: float,
    activation: str = "relu",
    seed: int = 0,
    max_steps: int = 100,
    restarts: int = 1,
    oversampling: float = 1.4,
) -> dict[str, float | int | bool]:
    """Train, attack, and measure the premise and the conclusion of Theorem 1.

    Args:
        n: number of training samples.
        d: their dimension.
        p_over_dn: parameters per number in the data.
        activation: one of `activation_names()`.
        seed: of data, features and candidates.
        max_steps: most steps in one stage of the solver.
        restarts: most starts of the solver.
        oversampling: candidates per sample in its first stage; at 1 nothing prevents two
            candidates from going to the same sample.

    Returns:
        `off_span`, the mean of ||P_perp phi(x_i)|| / sqrt(p) over the samples, and its largest
        value `off_span_most`; `distance`, the mean over the candidates of the distance to the
        nearest sample up to sign if the activation is odd, relative to sqrt(d); `signed_error`;
        `close_candidates`, `merged`, `missed`; `projection_loss`, `explained` and `p`.
    """
    data = sphere(n, d, seed=seed)
    p = round(p_over_dn * d * n)
    model = RandomFeatures(d, p, activation, seed=seed)
    theta = fit_min_norm(model, data.X, data.y)
    record = reconstruct(
        model,
        theta,
        n,
        seed=seed,
        max_steps=max_steps,
        restarts=restarts,
        start="random",
        oversampling=oversampling,
    )
    distances = off_span(model.features(data.X), model.features(record.samples))
    X = torch.cat([data.X, -data.X]) if model.odd else data.X
    nearest = cdist(record.samples.double(), X.double()).min(1) / math.sqrt(d)
    return {
        "p": p,
        "off_span": float(distances.mean()),
        "off_span_most": float(distances.max()),
        "distance": float(nearest.mean()),
        "signed_error": compare(data.X, record.samples).signed_error,
        **count_merged(data.X, record.samples),
        "projection_loss": record.loss,
        "explained": record.explained,
    }


def check_theorem_cell(
    n: int,
    d: int,
    p_over_dn: float,
    activation: str,
    seed: int,
    max_steps: int,
    restarts: int,
    oversampling: float,
) -> None:
    """Refuses values that `run_theorem_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, fewer parameters than samples, less than one candidate a
            sample, or an unknown name.
    """
    for name, value in (("n", n), ("max_steps", max_steps), ("restarts", restarts)):
        check_count(name, value)
    check_count("d", d, least=2)
    check_count("seed", seed, least=0)
    check_positive("p_over_dn", p_over_dn)
    if round(p_over_dn * d * n) < n:
        raise ValueError(f"p must be at least n = {n}, got p_over_dn = {p_over_dn} at d = {d}")
    check_named("activation", activation, activation_names())
    check_range("oversampling", oversampling, least=1)


def floor_without_own_candidate(model: FeatureMap, X: Tensor, missed: int) -> float:
    """How far phi(x_missed) stays off the span if no candidate is near that sample.

    If at most two candidates are close to each of the other samples, the span of their features
    tends to lie within span{phi(x_j), J_j u : j != missed, u in R^d} (two points that merge span
    their common feature and a derivative). The distance of phi(x_missed) / sqrt(p) to this larger
    space, of dimension (n - 1) (d + 1), is a lower bound: where it is positive, the premise of
    Theorem 1 cannot hold with two candidates at one sample and none at another. Theorem 2 proves
    this for n = 2 and large p / (d n); this computes it for any n.

    Args:
        model: the feature map, in float64.
        X: (n, d) training samples.
        missed: index of the sample without a candidate.
    """
    others = [j for j in range(len(X)) if j != missed]
    rows = [model.features(X[others])]
    directions = torch.eye(model.d, dtype=model.dtype, device=model.device)
    for j in others:
        rows.append(model.jvp(X[j].expand(model.d, -1), directions))
    return float(off_span(model.features(X[[missed]]), torch.cat(rows))[0])


def run_floor_cell(
    n: int, d: int, p_over_dn: float, activation: str = "relu", seed: int = 0
) -> dict[str, float]:
    """The least of `floor_without_own_candidate`, relative to ||phi(x)||, over three samples.

    One of the first three at a time is without a candidate; there may be fewer.

    Args:
        n: number of training samples.
        d: their dimension.
        p_over_dn: parameters per number in the data.
        activation: one of `activation_names()`.
        seed: of data and features.

    Returns:
        `floor`, between 0 (the span may hold the feature of the missed sample) and 1.
    """
    data = sphere(n, d, seed=seed, dtype=torch.float64)
    p = round(p_over_dn * d * n)
    model = RandomFeatures(d, p, activation, seed=seed, dtype=torch.float64)
    # A sample at which no feature is active is in every span.
    norms = model.features(data.X).norm(dim=1).clamp(min=1e-300) / math.sqrt(p)
    floors = [
        floor_without_own_candidate(model, data.X, i) / float(norms[i]) for i in range(min(n, 3))
    ]
    return {"floor": min(floors)}


def check_floor_cell(n: int, d: int, p_over_dn: float, activation: str, seed: int) -> None:
    """Refuses values that `run_floor_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for fewer than two samples or dimensions, no parameters, or an unknown name.
    """
    check_count("n", n, least=2)
    check_count("d", d, least=2)
    check_count("seed", seed, least=0)
    check_positive("p_over_dn", p_over_dn)
    check_count("p", round(p_over_dn * d * n))
    check_named("activation", activation, activation_names())
