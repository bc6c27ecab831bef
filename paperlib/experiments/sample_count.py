"""A wrong guess of the number of samples: what comes back, and how well n can be estimated."""

from __future__ import annotations

import pandas as pd
import torch
from torch import Tensor

from paperlib.activations import activation_names
from paperlib.checks import check_count, check_named, check_positive
from paperlib.compare import compare
from paperlib.data import sphere
from paperlib.min_norm import fit_min_norm
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import reconstruct
from paperlib.sample_count import estimate_sample_count


def describe_candidates(X: Tensor, samples: Tensor, *, found: float = 0.05) -> pd.DataFrame:
    """Which training sample each candidate resembles, and which candidates say the same.

    Args:
        X: (n, d) training samples on the sphere.
        samples: (m, d) candidates on the sphere.
        found: largest error, relative to sqrt(d), of a candidate that is its sample.

    Returns:
        A row for each candidate: `sample`, the index of the most similar training sample by
        |cosine|; `cosine` with it; `error`, ||x - x^|| / sqrt(d) to it; `kind`, "sample" for the
        best candidate within `found` of a sample, "duplicate" for a further one, "other" for
        one that is no sample; `weight`, `mixed_with` and `mixed_weight`: in the combination of
        training samples nearest to the candidate, the weight of `sample`, and which other sample
        has the largest weight (by magnitude) and how much; with n = 1 -1 and 0.
    """
    X, samples = X.double().cpu(), samples.double().cpu()
    cosines = torch.nn.functional.normalize(samples) @ torch.nn.functional.normalize(X).T
    owner = cosines.abs().argmax(1)
    errors = (samples - X[owner]).norm(dim=1) / X.shape[1] ** 0.5
    kinds = ["other"] * len(samples)
    taken = set()
    for j in errors.argsort().tolist():
        if errors[j] <= found:
            kinds[j] = "duplicate" if int(owner[j]) in taken else "sample"
            taken.add(int(owner[j]))
    rows = range(len(samples))
    weights = torch.linalg.lstsq(X.T, samples.T, driver="gelsd").solution.T
    others = weights.clone()
    others[list(rows), owner] = 0
    second = others.abs().argmax(1)
    alone = len(X) == 1
    return pd.DataFrame(
        {
            "sample": owner.tolist(),
            "cosine": [float(cosines[j, owner[j]]) for j in rows],
            "error": errors.tolist(),
            "kind": kinds,
            "weight": [float(weights[j, owner[j]]) for j in rows],
            "mixed_with": [-1 if alone else int(second[j]) for j in rows],
            "mixed_weight": [float(others[j, second[j]]) for j in rows],
        }
    )


def run_guess_cell(
    n: int,
    guess: int,
    d: int = 40,
    p_over_dn: float = 5.0,
    activation: str = "relu+tanh",
    seed: int = 0,
    max_steps: int = 100,
) -> dict[str, float | int | bool]:
    """Train on n samples, attack with another number of candidates.

    Args:
        n: number of training samples.
        guess: number of candidates n^.
        d: dimension.
        p_over_dn: parameters per number in the data.
        activation: one of `activation_names()`.
        seed: of data, features and candidates.
        max_steps: most steps in one stage of the solver.

    Returns:
        `recovered` samples, `duplicates` and `others` among the candidates, the mean
        `signed_error` over the samples, `projection_loss`, `explained`.
    """
    data = sphere(n, d, seed=seed)
    model = RandomFeatures(d, round(p_over_dn * d * n), activation, seed=seed)
    theta = fit_min_norm(model, data.X, data.y)
    record = reconstruct(model, theta, guess, seed=seed, max_steps=max_steps, start="random")
    kinds = describe_candidates(data.X, record.samples).kind
    return {
        "recovered": int((kinds == "sample").sum()),
        "duplicates": int((kinds == "duplicate").sum()),
        "others": int((kinds == "other").sum()),
        "signed_error": compare(data.X, record.samples).signed_error,
        "projection_loss": record.loss,
        "explained": record.explained,
    }


def check_guess_cell(
    n: int, guess: int, d: int, p_over_dn: float, activation: str, seed: int, max_steps: int
) -> None:
    """Refuses values that `run_guess_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, fewer parameters than samples or candidates, or an
            unknown name.
    """
    for name, value in (("n", n), ("guess", guess), ("max_steps", max_steps)):
        check_count(name, value)
    check_count("d", d, least=2)
    check_count("seed", seed, least=0)
    check_positive("p_over_dn", p_over_dn)
    if round(p_over_dn * d * n) < max(n, guess):
        raise ValueError(
            f"p must be at least n = {n} and the candidates, {guess}, got p_over_dn = {p_over_dn}"
        )
    check_named("activation", activation, activation_names())


def run_estimate_cell(
    n: int,
    most: int,
    d: int = 40,
    p_over_dn: float = 5.0,
    activation: str = "relu+tanh",
    seed: int = 0,
    max_steps: int = 100,
) -> dict[str, float | int | bool]:
    """Train on n samples, and estimate n from the parameters.

    Args:
        n: number of training samples.
        most: number of candidates that the estimate starts with.
        d: dimension.
        p_over_dn: parameters per number in the data, for the true n.
        activation: one of `activation_names()`.
        seed: of data, features and candidates.
        max_steps: most steps in one stage of the solver.

    Returns:
        `estimate`, `right` (whether it is n), `jump`, `explained`, `recovered` samples.
    """
    data = sphere(n, d, seed=seed)
    model = RandomFeatures(d, round(p_over_dn * d * n), activation, seed=seed)
    theta = fit_min_norm(model, data.X, data.y)
    count = estimate_sample_count(model, theta, most=most, seed=seed, max_steps=max_steps)
    return {
        "estimate": count.n,
        "right": count.n == n,
        "jump": count.jump,
        "explained": count.explained,
        "recovered": compare(data.X, count.samples).recovered(),
    }


def check_estimate_cell(
    n: int, most: int, d: int, p_over_dn: float, activation: str, seed: int, max_steps: int
) -> None:
    """Refuses values that `run_estimate_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: as `check_guess_cell`, whose guess is the number of candidates to start with.
    """
    check_count("most", most)
    check_guess_cell(n, most, d, p_over_dn, activation, seed, max_steps)
