"""The attacks of Haim et al. (2022) and Buzaglo et al. (2023): KKT conditions of the margin.

Gradient flow on the logistic loss, once it has separated the data, brings the direction of a
homogeneous network's parameters to a KKT point of the maximum margin (Lyu and Li 2020; Ji and
Telgarsky 2020). There

    theta = sum_i lambda_i y_i d f(x_i; theta) / d theta,   lambda_i >= 0,   labels y_i = -1, +1,

and with C classes and the cross-entropy

    theta = sum_i sum_{c != y_i} lambda_ic d (f_{y_i}(x_i) - f_c(x_i)) / d theta,  lambda_ic >= 0.

theta_0 has been forgotten, so the attack needs no more than the trained parameters. It takes more
candidates than samples, gives them labels, and descends on the squared residual of these equations
plus two priors: lambda above a least value (a candidate with lambda = 0 explains nothing), and
entries of the samples in a box. The slope of the ReLU is replaced by that of a sigmoid
(arXiv 2206.07758 for two classes, 2307.01827 for several).
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional as F

from paperlib.checks import check_count, check_positive, check_range
from paperlib.gradient_features import GradientFeatures
from paperlib.gradient_matching import (
    TOLERANCE,
    MatchedGradients,
    check_problem,
    match_gradients,
    record_of,
)
from paperlib.progress import Progress
from paperlib.streams import stream


def kkt_attack(
    features: GradientFeatures,
    theta: Tensor,
    n: int,
    *,
    labels: Tensor | None = None,
    candidates: int | None = None,
    steps: int = 10_000,
    learning_rate: float = 0.02,
    multiplier_rate: float = 0.01,
    optimizer: str = "adam",
    least_multiplier: float = 0.05,
    multiplier_weight: float = 1.0,
    multiplier_unit: float | None = None,
    sharpness: tuple[float, float] | None = (10.0, 10.0),
    box: tuple[float, float] | None = None,
    box_weight: float = 0.01,
    restarts: int = 1,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    progress: bool | None = None,
) -> MatchedGradients:
    """Candidates and multipliers that meet the KKT conditions at the trained parameters.

    Multipliers are measured in `multiplier_unit`, so that one least value serves networks of
    every scale: with a homogeneous network they grow with the parameters without bound.

    Args:
        features: gradients at the trained parameters.
        theta: (1, p), the trained parameters themselves, `features.flatten(network)`.
        n: number of training samples, or a guess of it.
        labels: (m,) of -1 / +1 for one output, classes 0 .. C - 1 of a whole-number dtype for
            several; if None, as evenly as m allows.
        candidates: m; 2 n if None, as published.
        steps: of each start.
        learning_rate: of the candidates.
        multiplier_rate: of the multipliers, in their unit.
        optimizer: "adam", or "sgd" with momentum 0.9 (published).
        least_multiplier: lambda_min, in units of `multiplier_unit`.
        multiplier_weight: factor of the penalty sum_i max(lambda_min - lambda_i, 0).
        multiplier_unit: if None, the multiplier with which one random candidate's gradient has
            the length of theta.
        sharpness: first and last sharpness of the ReLU's sigmoid slope (published: constant);
            None for the true slope.
        box: least and largest value of an entry of a sample, as a penalty; None for no prior.
        box_weight: its factor.
        restarts: most starts, until one reaches the tolerance; the best by loss is returned.
        tolerance: relative loss that counts as explained.
        seed: of candidates and multipliers.
        progress: draw a progress bar; if None, unless PAPERLIB_PROGRESS=0 is set.

    Returns:
        The samples, (m, d), with their coefficients A: lambda_i y_i, or for C outputs sum_c
        lambda_ic in the column of the label and -lambda_ic in the others.

    Raises:
        TypeError: if the features are no `GradientFeatures`.
        ValueError: for theta of another shape, labels that do not fit, options out of range.
    """
    theta, settings = check_problem(
        features,
        theta,
        steps=steps,
        learning_rate=learning_rate,
        coefficient_rate=multiplier_rate,
        optimizer=optimizer,
        sharpness=sharpness,
        box=box,
        box_weight=box_weight,
    )
    n = check_count("n", n)
    m = 2 * n if candidates is None else check_count("candidates", candidates)
    labels = candidate_labels(labels, m, features.outputs).to(features.device)
    check_range("least_multiplier", least_multiplier, least=0)
    check_range("multiplier_weight", multiplier_weight, least=0)
    check_count("restarts", restarts)
    check_positive("tolerance", tolerance, below=1.0)
    generator = stream("kkt attack", check_count("seed", seed, least=0))
    others = features.outputs if features.outputs > 1 else 1
    begun, found, unit = time.perf_counter(), [], multiplier_unit

    def coefficients(free: Tensor) -> Tensor:
        return unit * signed_coefficients(free, labels, features.outputs)

    def penalty(free: Tensor) -> Tensor:
        return (
            multiplier_weight
            * allowed((least_multiplier - free).clamp_min(0), labels, features.outputs).sum()
        )

    with Progress(progress) as watch:
        for restart in range(restarts):
            watch.stage(f"start {restart + 1}")
            X = torch.randn(m, features.d, generator=generator, dtype=torch.float64).to(theta)
            free = torch.rand(m, others, generator=generator, dtype=torch.float64).to(theta)
            if unit is None:
                one = signed_coefficients(torch.ones_like(free), labels, features.outputs)
                lengths = [features.combine(X[i : i + 1], one[i : i + 1]).norm() for i in range(m)]
                unit = float((theta.norm() / torch.stack(lengths).mean()).detach())
            check_positive("multiplier_unit", unit)
            found.append(
                match_gradients(features, theta, X, free, coefficients, penalty, settings, watch)
            )
            if found[-1].loss <= tolerance:
                break
    options = {
        "attack": "kkt",
        "n": n,
        "candidates": m,
        "least_multiplier": least_multiplier,
        "multiplier_weight": multiplier_weight,
        "multiplier_unit": unit,
        "labels": labels.tolist(),
        "restarts": restarts,
        "seed": seed,
        "tolerance": tolerance,
    }
    return record_of(features, theta, n, found, options, settings, time.perf_counter() - begun)


def candidate_labels(labels: Tensor | None, m: int, outputs: int) -> Tensor:
    """(m,) labels, given or spread evenly.

    Raises:
        ValueError: for another number of labels, or labels of another kind.
    """
    if labels is None:
        index = torch.arange(m)
        return index % outputs if outputs > 1 else 1 - 2 * (index % 2)
    labels = torch.as_tensor(labels)
    if labels.shape != (m,):
        raise ValueError(f"labels must have shape ({m},), got {tuple(labels.shape)}")
    if outputs == 1 and not bool((labels.abs() == 1).all()):
        raise ValueError(f"labels must be -1 or +1 for one output, got {labels[:6].tolist()}..")
    if outputs > 1 and (
        labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= outputs
    ):
        raise ValueError(f"labels must be classes 0 to {outputs - 1}, got {labels[:6].tolist()}..")
    return labels.long() if outputs > 1 else labels


def signed_coefficients(multipliers: Tensor, labels: Tensor, outputs: int) -> Tensor:
    """A (m, C) of multipliers (m, 1) for one output, or (m, C), the label's own ignored."""
    if outputs == 1:
        return multipliers * labels[:, None].to(multipliers)
    others = allowed(multipliers, labels, outputs)
    own = F.one_hot(labels, outputs).to(multipliers)
    return own * others.sum(1, keepdim=True) - others


def allowed(multipliers: Tensor, labels: Tensor, outputs: int) -> Tensor:
    """The multipliers without those of each candidate's own class."""
    if outputs == 1:
        return multipliers
    return multipliers * (1 - F.one_hot(labels, outputs).to(multipliers))
