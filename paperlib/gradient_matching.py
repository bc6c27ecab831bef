"""Gradient matching: theta as a weighted sum of gradients at candidates, by first-order descent.

The attacks of Haim et al. (2022), Buzaglo et al. (2023) and Loo et al. (2024) share one loss,

    S(X^, A) = || theta - sum_i sum_c A_ic d f_c(x^_i) / d theta ||^2 / || theta ||^2.

They differ in what theta is, at which parameters the gradient is taken, which coefficients A are
allowed, and which priors are added. The projection loss is the same sum with A solved for instead
of descended on. Here is the descent that `kkt_attack` and `ntk_attack` share.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paperlib.checks import check_count, check_positive, check_theta
from paperlib.gradient_features import GradientFeatures, SmoothReLU
from paperlib.law import parameters_told
from paperlib.progress import Progress
from paperlib.record import Reconstruction, conclude
from paperlib.sphere import to_sphere
from paperlib.stages import stage_record

OPTIMIZERS = ("adam", "sgd")

# Relative loss that counts as explained.
TOLERANCE = 1e-6

# Records of a descent are thinned to about this many.
MOST_RECORDS = 400

# Each step is one forward pass and one backward pass through the gradients of all candidates.
PASSES_PER_STEP = 2


@dataclass(frozen=True)
class MatchedGradients(Reconstruction):
    """A reconstruction with the coefficients that were found beside the samples.

    `loss` is S at the samples and coefficients, with the network's own activation.

    Attributes:
        coefficients: A, (m, C).
    """

    coefficients: Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """How a descent is run.

    Attributes:
        steps: number of steps.
        learning_rate: of the candidates.
        coefficient_rate: of the coefficients.
        optimizer: "adam", or "sgd" with momentum 0.9.
        sharpness: slope sigmoid(s u) of the ReLUs, s going geometrically from the first value to
            the second over the first nine tenths of the steps; None for the true slope.
        box: least and largest value of an entry of a sample, or None.
        box_weight: factor of the penalty for entries outside of the box.
    """

    steps: int
    learning_rate: float
    coefficient_rate: float
    optimizer: str
    sharpness: tuple[float, float] | None
    box: tuple[float, float] | None
    box_weight: float

    def __post_init__(self):
        """Check every value."""
        check_count("steps", self.steps)
        check_positive("learning_rate", self.learning_rate)
        check_positive("coefficient_rate", self.coefficient_rate)
        check_positive("box_weight", self.box_weight)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {OPTIMIZERS}, got {self.optimizer!r}")
        for name in ("sharpness", "box"):
            pair = getattr(self, name)
            if pair is not None and (not isinstance(pair, Sequence) or len(pair) != 2):
                raise ValueError(f"{name} must be None or two numbers, got {pair!r}")
        if self.sharpness is not None:
            for value in self.sharpness:
                check_positive("sharpness", value)
        if self.box is not None and not self.box[0] < self.box[1]:
            raise ValueError(f"box must be (least, largest), got {self.box}")


@dataclass
class Matched:
    """Where a descent ended: samples (m, d), coefficients (m, C), S, history, seconds, steps, why.

    It ends at the "step limit", or where it "diverged" to what is not finite: at what came before.
    """

    X: Tensor
    A: Tensor
    loss: float
    history: list[dict[str, Any]]
    seconds: float
    steps: int
    ended: str


def matching_loss(features: GradientFeatures, theta: Tensor, X: Tensor, A: Tensor) -> Tensor:
    """S(X, A), a differentiable scalar.

    Args:
        features: gradients at the parameters that the attack assumes.
        theta: (1, p).
        X: (m, d).
        A: (m, C).
    """
    return (theta[0] - features.combine(X, A)).square().sum() / theta.square().sum()


def match_gradients(
    features: GradientFeatures,
    theta: Tensor,
    X: Tensor,
    free: Tensor,
    coefficients: Callable[[Tensor], Tensor],
    penalty: Callable[[Tensor], Tensor] | None,
    settings: Settings,
    watch: Progress,
) -> Matched:
    """Descend on S plus penalties over candidates, kept on the sphere, and coefficients.

    Args:
        features: gradients at the parameters that the attack assumes.
        theta: (1, p).
        X: (m, d) start.
        free: what the coefficients are made of, (m, ..).
        coefficients: free -> A (m, C).
        penalty: free -> scalar to add, or None.
        settings: see there.
        watch: progress.
    """
    begun = time.perf_counter()
    smooth, relus = features, []
    if settings.sharpness is not None:
        smooth = features.smoothed(settings.sharpness[0])
        relus = [part for part in smooth.network.modules() if isinstance(part, SmoothReLU)]
    X, free = to_sphere(X).requires_grad_(), free.clone().requires_grad_()
    groups = [
        {"params": [X], "lr": settings.learning_rate},
        {"params": [free], "lr": settings.coefficient_rate},
    ]
    if settings.optimizer == "adam":
        optimizer = torch.optim.Adam(groups)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9)
    stride = max(1, settings.steps // MOST_RECORDS)
    history, ended = [], "step limit"
    last_finite = X.detach().clone(), free.detach().clone()
    for step in range(1, settings.steps + 1):
        for relu in relus:
            relu.sharpness = sharpness_at(settings.sharpness, (step - 1) / settings.steps)
        optimizer.zero_grad()
        match = matching_loss(smooth, theta, X, coefficients(free))
        total = match
        if penalty is not None:
            total = total + penalty(free)
        if settings.box is not None:
            total = total + settings.box_weight * outside(X, settings.box)
        total.backward()
        optimizer.step()
        with torch.no_grad():
            X.copy_(to_sphere(X))
        value = float(match.detach())
        if not math.isfinite(value) or not all(bool(t.isfinite().all()) for t in (X, free)):
            X, free = last_finite
            ended = "diverged"
            break
        last_finite = X.detach().clone(), free.detach().clone()
        if step % stride == 0 or step == settings.steps:
            seconds = time.perf_counter() - begun
            sharpness = relus[0].sharpness if relus else math.inf
            history.append(
                {"step": step, "loss": value, "sharpness": sharpness, "seconds": seconds}
            )
        watch.step(value, X.detach())
    X, A = X.detach(), coefficients(free.detach())
    loss = float(matching_loss(features, theta, X, A).detach())
    return Matched(X, A, loss, history, time.perf_counter() - begun, step, ended)


def sharpness_at(pair: tuple[float, float], share: float) -> float:
    """Geometric from the first to the second value over the first nine tenths."""
    first, last = pair
    return first * (last / first) ** min(1.0, share / 0.9)


def outside(X: Tensor, box: tuple[float, float]) -> Tensor:
    """Sum over entries of their distance to the box, over the number of candidates."""
    return ((X - box[1]).clamp_min(0) + (box[0] - X).clamp_min(0)).sum() / len(X)


def check_problem(features: GradientFeatures, theta: Tensor, **settings) -> tuple[Tensor, Settings]:
    """Theta as (1, p), and the settings, checked.

    Raises:
        TypeError: for features that are not `GradientFeatures`, or a setting that is unknown.
        ValueError: for theta of another shape, a setting without sense, or a sharpness where there
            is no ReLU to smooth.
    """
    if not isinstance(features, GradientFeatures):
        raise TypeError(f"features must be GradientFeatures, got {type(features).__name__}")
    theta = check_theta(theta, features)
    if len(theta) != 1:
        raise ValueError(f"theta must have shape (1, {features.p}), got {tuple(theta.shape)}")
    settings = Settings(**settings)
    if settings.sharpness is not None:
        features.smoothed(settings.sharpness[0])  # raises without a ReLU
    return theta, settings


def record_of(features, theta, n, found, options, settings, seconds) -> MatchedGradients:
    """The record of the best start by loss."""
    losses = [math.inf if math.isnan(run.loss) else run.loss for run in found]
    k = losses.index(min(losses))
    best = found[k]
    C = features.outputs
    identifiable = parameters_told(theta) > n * (features.d - 1 + C)
    return MatchedGradients(
        samples=best.X,
        loss=best.loss,
        status=conclude(best.loss, options["tolerance"], identifiable=identifiable),
        explained=best.loss <= options["tolerance"],
        identifiable=identifiable,
        history=[{"restart": i, **r} for i, run in enumerate(found) for r in run.history],
        stages=[
            stage_record(
                "descent",
                features.dtype,
                run.ended,
                run.loss,
                len(run.X),
                PASSES_PER_STEP * run.steps,
                run.seconds,
                i,
            )
            for i, run in enumerate(found)
        ],
        passes=PASSES_PER_STEP * sum(run.steps for run in found),
        seconds=seconds,
        restart=k,
        options=options | vars(settings) | {"model": features.describe()},
        coefficients=best.A,
    )
