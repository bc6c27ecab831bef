"""One defence of a random-features model of digits: what it costs in accuracy, what it hides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from paperlib.activations import activation_names
from paperlib.checks import check_count, check_named, check_positive, check_range
from paperlib.compare import Comparison, compare
from paperlib.data import DataSet, digits
from paperlib.data.digits import PIXELS
from paperlib.feature_map import FeatureMap
from paperlib.given_features import GivenFeatures
from paperlib.identifiability import coefficients, parameter_jacobian
from paperlib.min_norm import fit_min_norm
from paperlib.privacy import private_ridge
from paperlib.projection import projection_loss
from paperlib.quantise import quantise
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import reconstruct
from paperlib.record import Reconstruction
from paperlib.releases import gradient_descent_checkpoints
from paperlib.sphere import random_on_sphere
from paperlib.streams import stream

# What `strength` is for each: "none" ignores it.
DEFENCES = {
    "none": "",
    "noise": "standard deviation over the root mean square of theta",
    "ridge": "lambda n over the mean eigenvalue of Phi Phi^T",
    "early stopping": "steps of gradient descent",
    "checkpoint average": "how many checkpoints, after 1, 4, 16, ... steps",
    "model average": "how many models of n samples each, on the same features",
    "pruning": "share of the features that are removed, those with the smallest weights",
    "quantisation": "bits",
    "private": "epsilon, at delta = 1e-5",
}


FORMATS = {16.0: "float16", 8.0: "int8", 4.0: "int4", 1.0: "sign"}

# Of output perturbation, in units in which the features of a sample have a mean square norm of 1.
PRIVATE_RIDGE = 1.0


@dataclass(frozen=True)
class Defended:
    """A model that was defended, and what the attack read back.

    Attributes:
        data: the training data, then the test data.
        n: how many of them were trained on.
        model: the feature map that the attack uses.
        theta: (C, p), released.
        spoilt: ||theta - minimum-norm theta|| / ||minimum-norm theta||, before pruned features are
            left out.
        accuracy: on the test data.
        residual_at_truth: projection loss at the training data.
        coefficients: (n,) norms of alpha_i, relative to their largest.
        record: of the attack.
        errors: the training data compared with what was read back.
    """

    data: DataSet
    n: int
    model: FeatureMap
    theta: Tensor
    spoilt: float
    accuracy: float
    residual_at_truth: float
    coefficients: Tensor
    record: Reconstruction
    errors: Comparison


def defend_and_attack(
    defence: str = "none",
    strength: float = 0.0,
    *,
    n: int = 20,
    p_over_dn: float = 5.0,
    activation: str = "relu+tanh",
    labels: str = "one-hot",
    test: int = 1000,
    seed: int = 0,
    restarts: int = 3,
    max_steps: int = 100,
    tolerance: float = 1e-9,
) -> Defended:
    """Trains a model on n digits, defends what is released, and attacks it.

    The attack knows the features and which of them were pruned, but not what the defence removed.

    Args:
        defence: a name of `DEFENCES`.
        strength: of it, in the units said there.
        n: training samples, the first of `digits`.
        p_over_dn: parameters C p per number in the data.
        activation: one of `activation_names()`.
        labels: "one-hot", ten outputs, or "binary", one output, even against odd.
        test: samples held out, from the same choice of digits.
        seed: of data, features, noise and candidates.
        restarts: most starts of the attack.
        max_steps: most steps of one stage of one start.
        tolerance: projection loss that counts as zero.
    """
    models = models_averaged(defence, strength)
    count = n * models
    data = digits(count + test, labels=labels, seed=seed)
    X, Y = data.X[:count], data.y[:count].reshape(count, -1)
    outputs, d = Y.shape[1], data.d
    p = count_features(n, p_over_dn, models=models, d=d, outputs=outputs)
    model = RandomFeatures(d, p, activation, seed=seed)
    plain = fit_min_norm(model, X, Y)
    theta = released(defence, strength, model, X, Y, plain, seed=seed)
    attacked: FeatureMap = model
    spoilt = float((theta - plain).norm() / plain.norm())
    held_out = model.features(data.X[count:])
    accuracy = accuracy_of(theta, held_out, data.class_index[count:])
    if defence == "pruning":
        # Zeros show which features were pruned; the others are as they were.
        kept = (theta != 0).any(0)
        attacked = GivenFeatures(model.V[kept], activation)
        theta = theta[:, kept]
    # Message passing costs more than everything else here, and most of these theta are explained by
    # no data, so that no start ends early.
    record = reconstruct(
        attacked,
        theta,
        count,
        start="random",
        seed=seed,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
        progress=False,
    )
    alpha = coefficients(attacked, theta, X).norm(dim=1)
    return Defended(
        data=data,
        n=count,
        model=attacked,
        theta=theta,
        spoilt=spoilt,
        accuracy=accuracy,
        residual_at_truth=float(projection_loss(attacked, theta, X)),
        coefficients=alpha / alpha.max(),
        record=record,
        errors=compare(X, record.samples),
    )


def models_averaged(defence: str, strength: float) -> int:
    """How many models, of n samples each, are released as one."""
    return round(strength) if defence == "model average" else 1


def count_features(n: int, p_over_dn: float, *, models: int = 1, d: int, outputs: int) -> int:
    """p, for n samples and not all that are averaged: averaging does not change the model."""
    return max(n * models, round(p_over_dn * d * n / outputs))


def released(
    defence: str,
    strength: float,
    model: FeatureMap,
    X: Tensor,
    Y: Tensor,
    plain: Tensor,
    *,
    seed: int,
) -> Tensor:
    """What is released in place of the minimum-norm `plain`, (C, p)."""
    if defence == "none":
        return plain
    if defence == "noise":
        noise = torch.randn(plain.shape, generator=stream("noise", seed), dtype=torch.float64)
        return plain + strength * plain.norm() / math.sqrt(plain.numel()) * noise.to(plain)
    if defence == "quantisation":
        return quantise(plain, FORMATS[float(strength)])
    if defence == "pruning":
        sizes = plain.norm(dim=0)
        gone = sizes.argsort()[: round(strength * len(sizes))]
        theta = plain.clone()
        theta[:, gone] = 0
        return theta
    Phi = model.features(X)
    mean_square = float(Phi.double().square().sum() / len(X))
    if defence == "ridge":
        return fit_min_norm(model, X, Y, ridge=strength * mean_square / len(X))
    if defence == "early stopping":
        return gradient_descent_checkpoints(Phi, Y, [round(strength)])[0]
    if defence == "checkpoint average":
        steps = [4**k for k in range(round(strength))]
        return torch.stack(gradient_descent_checkpoints(Phi, Y, steps)).mean(0)
    if defence == "model average":
        parts = zip(X.chunk(round(strength)), Y.chunk(round(strength)), strict=True)
        return torch.stack([fit_min_norm(model, x, y) for x, y in parts]).mean(0)
    if defence == "private":
        return private_ridge(
            model, X, Y, epsilon=strength, seed=seed, **private_options(model)
        ).theta
    raise ValueError(f"defence must be one of {', '.join(DEFENCES)}, got {defence!r}")


def private_options(model: FeatureMap) -> dict[str, float]:
    """Bound and ridge of `private_ridge`, from the features of random points, not of the data.

    phi(x) of a point on the sphere has a mean square norm of p E[act(g)^2], the same for all.
    """
    points = random_on_sphere(256, model.d, generator=stream("bound", 0))
    features = model.features(points.to(model.device, model.dtype)).double()
    mean_square = float(features.square().sum() / len(points))
    return {"bound": math.sqrt(mean_square), "ridge": PRIVATE_RIDGE * mean_square}


def accuracy_of(theta: Tensor, features: Tensor, classes: Tensor) -> float:
    """Share of samples given their class: by the largest output, or the sign of the only one."""
    outputs = features @ theta.T
    guesses = outputs.argmax(1) if len(theta) > 1 else (outputs[:, 0] > 0).long()
    return float((guesses == classes).double().mean())


def predicted_errors(model: FeatureMap, theta: Tensor, X: Tensor, sigma: float) -> Tensor:
    """Errors that noise of size sigma on theta must cause, (n,), relative to sqrt(d).

    The Cramer-Rao bound: with J the Jacobian of (X, alpha) -> theta, no unbiased estimate of
    (X, alpha) from theta + N(0, sigma^2 I) has a smaller covariance than sigma^2 (J^T J)^-1, and
    least squares, which the attack is, reaches it as sigma goes to 0. What is returned is the root
    of the trace of each sample's block over d. It grows as sigma / |alpha_i|, and means nothing
    once it is of order 1, where the sphere is no longer flat.

    Args:
        model: the feature map, of dtype float64.
        theta: (C, p), without noise.
        X: (n, d), the training data.
        sigma: standard deviation of the noise of each parameter.
    """
    n, d = X.shape
    J = parameter_jacobian(model, X, coefficients(model, theta, X))
    covariance = torch.linalg.inv(J.T @ J).diagonal()[: n * (d - 1)].reshape(n, d - 1)
    return sigma * (covariance.sum(1) / d).sqrt()


def run_defence_cell(
    defence: str = "none",
    strength: float = 0.0,
    n: int = 20,
    p_over_dn: float = 5.0,
    activation: str = "relu+tanh",
    labels: str = "one-hot",
    test: int = 1000,
    seed: int = 0,
    restarts: int = 3,
    max_steps: int = 100,
    tolerance: float = 1e-9,
) -> dict[str, object]:
    """One cell of a sweep over `defend_and_attack`, whose arguments it takes.

    Returns:
        `samples` (n, or n times the models that are averaged), `p` (features attacked),
        `parameters` (C p), `spoilt`, `accuracy`, `residual_at_truth`, `projection_loss`,
        `signed_error`, `recovered` (error at most 0.05), `visible` (error at most 0.5),
        `errors` and `coefficients` (lists, one entry a sample).
    """
    run = defend_and_attack(
        defence,
        strength,
        n=n,
        p_over_dn=p_over_dn,
        activation=activation,
        labels=labels,
        test=test,
        seed=seed,
        restarts=restarts,
        max_steps=max_steps,
        tolerance=tolerance,
    )
    return {
        "samples": run.n,
        "p": run.model.p,
        "parameters": run.theta.numel(),
        "spoilt": run.spoilt,
        "accuracy": run.accuracy,
        "residual_at_truth": run.residual_at_truth,
        "projection_loss": run.record.loss,
        "signed_error": run.errors.signed_error,
        "recovered": run.errors.recovered(),
        "visible": run.errors.recovered(0.5),
        "errors": run.errors.signed.tolist(),
        "coefficients": run.coefficients.tolist(),
    }


def check_defence_cell(
    defence: str,
    strength: float,
    n: int,
    p_over_dn: float,
    activation: str,
    labels: str,
    test: int,
    seed: int,
    restarts: int,
    max_steps: int,
    tolerance: float,
) -> None:
    """Refuses values that `run_defence_cell` cannot compute with, for `sweep(..., check=...)`.

    Raises:
        ValueError: for a count below 1, an unknown name, or a strength without sense.
    """
    counts = {"n": n, "test": test, "restarts": restarts, "max_steps": max_steps}
    for name, value in counts.items():
        check_count(name, value)
    check_count("seed", seed, least=0)
    check_positive("p_over_dn", p_over_dn)
    check_positive("tolerance", tolerance, below=1.0)
    for name, value, known in (
        ("defence", defence, tuple(DEFENCES)),
        ("activation", activation, activation_names()),
        ("labels", labels, ("one-hot", "binary")),
    ):
        check_named(name, value, known)
    if defence == "quantisation" and strength not in FORMATS:
        raise ValueError(f"bits must be one of {', '.join(map(str, FORMATS))}, got {strength}")
    if defence == "pruning":
        check_positive("strength of pruning", strength, below=1.0)
        outputs = 10 if labels == "one-hot" else 1
        p = count_features(n, p_over_dn, d=PIXELS, outputs=outputs)
        if p - round(strength * p) < n:
            raise ValueError(f"pruning must leave n = {n} features, got {strength} of {p} removed")
    elif defence in ("early stopping", "checkpoint average", "model average"):
        if check_range(f"strength of {defence}", strength, least=1) != round(strength):
            raise ValueError(f"strength of {defence} must be a whole number, got {strength}")
    elif defence != "none":
        check_positive(f"strength of {defence}", strength)
    models = models_averaged(defence, strength)
    digits(n * models + test, labels=labels, seed=seed)  # whether there are as many
