"""Samples that come back as their negatives: how many, by activation and solver."""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.activations import activation_names
from paperlib.checks import check_count, check_named, check_positive
from paperlib.compare import compare
from paperlib.data import sphere
from paperlib.feature_map import FeatureMap
from paperlib.min_norm import fit_min_norm
from paperlib.projection import projection_loss
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import SOLVERS, reconstruct

# A candidate within this error, up to sign, stands for its sample, if roughly: random candidates
# are at about 1.2. Local minima at a wrong sign are displaced, so the bound is not tight.
FOUND = 0.35


def count_signs(X: Tensor, samples: Tensor, *, found: float = FOUND) -> dict[str, int]:
    """How many samples came back with the right sign, with the wrong one, and not at all.

    Args:
        X: (n, d) training samples.
        samples: (m, d) candidates.
        found: largest error up to sign, relative to sqrt(d), of a sample that came back.

    Returns:
        `right`, `wrong` and `missed`, which sum to n.
    """
    errors = compare(X, samples)
    partner = samples[torch.as_tensor(errors.matching_up_to_sign, device=samples.device)]
    there = (errors.up_to_sign <= found) & (errors.matching_up_to_sign >= 0)
    positive = ((X * partner).sum(1) > 0).cpu().numpy()
    right, wrong = int((there & positive).sum()), int((there & ~positive).sum())
    return {"right": right, "wrong": wrong, "missed": len(X) - right - wrong}


def run_sign_cell(
    activation: str,
    solver: str = "levenberg-marquardt",
    n: int = 20,
    d: int = 20,
    p_over_dn: float = 5.0,
    seed: int = 0,
    max_steps: int = 200,
    learning_rate: float | None = None,
) -> dict[str, float | int]:
    """Train random features on sphere data, attack, and count the signs.

    Args:
        activation: one of `activation_names()`.
        solver: "levenberg-marquardt" or "published".
        n: number of training samples.
        d: their dimension.
        p_over_dn: parameters per number in the data.
        seed: of data, features and candidates.
        max_steps: most steps of the solver.
        learning_rate: of the published solver; its own default if None.

    Returns:
        `right`, `wrong` and `missed` samples, `projection_loss`, the mean `signed_error`,
        `up_to_sign_error` and `published_error`.
    """
    data = sphere(n, d, seed=seed)
    model = RandomFeatures(d, round(p_over_dn * d * n), activation, seed=seed)
    theta = fit_min_norm(model, data.X, data.y)
    options = {} if learning_rate is None else {"learning_rate": learning_rate}
    if solver != "published":
        options["start"] = "random"
    record = reconstruct(model, theta, n, solver=solver, seed=seed, max_steps=max_steps, **options)
    errors = compare(data.X, record.samples)
    return {
        **count_signs(data.X, record.samples),
        "projection_loss": record.loss,
        "signed_error": errors.signed_error,
        "up_to_sign_error": errors.up_to_sign_error,
        "published_error": errors.published_error,
    }


def check_sign_cell(
    activation: str,
    solver: str,
    n: int,
    d: int,
    p_over_dn: float,
    seed: int,
    max_steps: int,
    learning_rate: float | None,
) -> None:
    """Refuses values that `run_sign_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, fewer parameters than samples, or an unknown name.
    """
    check_named("activation", activation, activation_names())
    check_named("solver", solver, SOLVERS)
    for name, value in (("n", n), ("max_steps", max_steps)):
        check_count(name, value)
    check_count("d", d, least=2)
    check_count("seed", seed, least=0)
    check_positive("p_over_dn", p_over_dn)
    if learning_rate is not None:
        check_positive("learning_rate", learning_rate)
        if solver != "published":
            raise ValueError(f"learning_rate belongs to the published solver, got {solver!r}")
    if round(p_over_dn * d * n) < n:
        raise ValueError(f"p must be at least n = {n}, got p_over_dn = {p_over_dn} at d = {d}")


def flipped_losses(model: FeatureMap, theta: Tensor, X: Tensor) -> list[float]:
    """The projection loss at the training data with the signs of the first k samples flipped.

    Args:
        model: the feature map.
        theta: (C, p) parameters.
        X: (n, d) training samples.

    Returns:
        n + 1 losses, for k = 0 .. n.
    """
    losses = []
    for k in range(len(X) + 1):
        flipped = torch.cat([-X[:k], X[k:]])
        losses.append(float(projection_loss(model, theta, flipped)))
    return losses
