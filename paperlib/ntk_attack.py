"""The attack of Loo et al. (2024): the move of all parameters as a sum of tangent features.

In the regime of the neural tangent kernel, training on any loss moves the parameters by

    theta - theta_0 = sum_i alpha_i d f(x_i; theta_0) / d theta,

whatever the labels. The attack descends on || theta - theta_0 - sum_i alpha_i grad f(x^_i) ||^2
over candidates and coefficients with Adam, the ReLU smoothed at first (arXiv 2302.01428). It knows
theta_0, as the attack of the paper does; eliminating alpha gives the projection loss of all layers.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from paperlib.checks import check_count, check_positive
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


def ntk_attack(
    features: GradientFeatures,
    theta: Tensor,
    n: int,
    *,
    candidates: int | None = None,
    steps: int = 10_000,
    learning_rate: float = 0.02,
    coefficient_rate: float = 0.01,
    optimizer: str = "adam",
    sharpness: tuple[float, float] | None = (1.0, 100.0),
    box: tuple[float, float] | None = None,
    box_weight: float = 0.01,
    restarts: int = 1,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    progress: bool | None = None,
) -> MatchedGradients:
    """Candidates and coefficients whose tangent features add up to the move of the parameters.

    Candidates are kept on the sphere of radius sqrt(d), as in all attacks here; without biases a
    ReLU network could not tell their lengths from their coefficients.

    Args:
        features: gradients at theta_0.
        theta: (1, p), the parameters after minus before training.
        n: number of training samples, or a guess of it.
        candidates: m; n if None.
        steps: of each start.
        learning_rate: of the candidates.
        coefficient_rate: of the coefficients.
        optimizer: "adam" (published) or "sgd".
        sharpness: first and last sharpness of the smoothed ReLUs; None for the true slope, which
            a network without ReLUs needs.
        box: least and largest value of an entry of a sample, as a penalty; None for no prior.
        box_weight: its factor.
        restarts: most starts, until one reaches the tolerance; the best by loss is returned.
        tolerance: relative loss that counts as explained.
        seed: of candidates and coefficients.
        progress: draw a progress bar; if None, unless PAPERLIB_PROGRESS=0 is set.

    Returns:
        The samples, (m, d), with their coefficients.

    Raises:
        TypeError: if the features are no `GradientFeatures`.
        ValueError: for theta of another shape, or options out of their range.
    """
    theta, settings = check_problem(
        features,
        theta,
        steps=steps,
        learning_rate=learning_rate,
        coefficient_rate=coefficient_rate,
        optimizer=optimizer,
        sharpness=sharpness,
        box=box,
        box_weight=box_weight,
    )
    n = check_count("n", n)
    m = n if candidates is None else check_count("candidates", candidates)
    check_count("restarts", restarts)
    check_positive("tolerance", tolerance, below=1.0)
    generator = stream("ntk attack", check_count("seed", seed, least=0))
    begun, found = time.perf_counter(), []
    with Progress(progress) as watch:
        for restart in range(restarts):
            watch.stage(f"start {restart + 1}")
            X = torch.randn(m, features.d, generator=generator, dtype=torch.float64).to(theta)
            A = torch.randn(m, features.outputs, generator=generator, dtype=torch.float64)
            A = 0.1 * A.to(theta)
            found.append(
                match_gradients(features, theta, X, A, lambda free: free, None, settings, watch)
            )
            if found[-1].loss <= tolerance:
                break
    options = {
        "attack": "ntk",
        "n": n,
        "candidates": m,
        "restarts": restarts,
        "seed": seed,
        "tolerance": tolerance,
    }
    return record_of(features, theta, n, found, options, settings, time.perf_counter() - begun)
