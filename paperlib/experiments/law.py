"""One point of the law of data reconstruction: train on sphere data, attack, measure."""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.activations import activation_names
from paperlib.checks import check_count, check_named, check_positive
from paperlib.compare import compare
from paperlib.data import sphere
from paperlib.experiments.device_name import check_device_name
from paperlib.feature_map import FeatureMap
from paperlib.min_norm import fit_min_norm
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import SOLVERS, reconstruct

# What a cell with fewer parameters than samples cannot have: there is nothing to read back.
ATTACK_RESULTS = (
    "signed_error",
    "up_to_sign_error",
    "published_error",
    "recovered",
    "projection_loss",
    "explained",
    "passes",
    "attack_seconds",
)


def run_law_cell(
    n: int,
    d: int,
    p_over_dn: float,
    activation: str = "relu",
    solver: str = "levenberg-marquardt",
    seed: int = 0,
    max_steps: int = 200,
    restarts: int = 1,
    device: str = "cpu",
) -> dict[str, float | int | bool | None]:
    """Trains random features with p = p_over_dn d n parameters, and reads the data back.

    The setting of the paper's synthetic experiments (section 4 of arXiv 2509.22214): n points on
    the sphere of radius sqrt(d), labels linear in them plus noise, V with N(0, 1/d) entries,
    theta by least squares, of minimum norm where p >= n. Random numbers of data, features and
    candidates are independent streams of the one seed.

    Args:
        n: number of training samples.
        d: their dimension.
        p_over_dn: parameters per number in the data; p is rounded to a whole number, at least 1.
        activation: one of `activation_names()`.
        solver: "levenberg-marquardt" or "published", both as `reconstruct` knows them.
        seed: of data, features and candidates.
        max_steps: most steps of the solver: of one stage of one restart for the default solver,
            of one restart for the published one.
        restarts: most starts, each from new random candidates.
        device: where to compute, such as "cpu" or "cuda".

    Returns:
        `p`; `training_loss`, mean (f(x_i) - y_i)^2 / mean y_i^2, which is 1 for a model that says
        nothing; then, None where p < n, `signed_error`, `up_to_sign_error`, `published_error`
        (means of `compare`), `recovered` (samples with a signed error of at most 0.05),
        `projection_loss`, `explained`, `passes` over the features and `attack_seconds`.
    """
    data = sphere(n, d, seed=seed)
    X, y = data.X.to(device), data.y.to(device)
    p = max(1, round(p_over_dn * d * n))
    model = RandomFeatures(d, p, activation, seed=seed, device=device)
    if p < n:
        attack = dict.fromkeys(ATTACK_RESULTS)
        return {"p": p, "training_loss": least_squares_loss(model, X, y), **attack}
    theta = fit_min_norm(model, X, y)
    # Starts by message passing are the subject of chapter 11.
    options = {} if solver == "published" else {"start": "random"}
    record = reconstruct(
        model, theta, n, solver=solver, seed=seed, max_steps=max_steps, restarts=restarts, **options
    )
    errors = compare(X, record.samples)
    return {
        "p": p,
        "training_loss": training_loss(model, theta, X, y),
        "signed_error": errors.signed_error,
        "up_to_sign_error": errors.up_to_sign_error,
        "published_error": errors.published_error,
        "recovered": errors.recovered(),
        "projection_loss": record.loss,
        "explained": record.explained,
        "passes": record.passes,
        "attack_seconds": record.seconds,
    }


def check_law_cell(
    n: int,
    d: int,
    p_over_dn: float,
    activation: str,
    solver: str,
    seed: int,
    max_steps: int,
    restarts: int,
    device: str,
) -> None:
    """Refuses values that `run_law_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, d below 2, a ratio that is not positive, an unknown name
            or device.
    """
    counts = {"n": n, "max_steps": max_steps, "restarts": restarts}
    for name, value in counts.items():
        check_count(name, value)
    check_count("d", d, least=2)
    check_count("seed", seed, least=0)
    check_positive("p_over_dn", p_over_dn)
    for name, value, known in (
        ("activation", activation, activation_names()),
        ("solver", solver, tuple(SOLVERS)),
    ):
        check_named(name, value, known)
    check_device_name(device)


def training_loss(model: FeatureMap, theta: Tensor, X: Tensor, y: Tensor) -> float:
    """Mean squared residual of f(x) = phi(x) . theta over the mean square of the labels."""
    target = y.double()
    residual = (model.features(X).double() @ theta.double().T).squeeze(1) - target
    return float(residual.square().mean() / target.square().mean())


def least_squares_loss(model: FeatureMap, X: Tensor, y: Tensor) -> float:
    """The training loss of least squares with fewer parameters than samples, p < n."""
    features = model.features(X).double().cpu()
    target = y.double().cpu()[:, None]
    # By singular values: some features may be zero on all samples, so that Phi has no full rank.
    theta = torch.linalg.lstsq(features, target, driver="gelsd").solution
    return training_loss(model, theta.T.to(X.device), X, y)
