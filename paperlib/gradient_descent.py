"""Full-batch gradient descent whose step size is measured, not guessed.

Gradient descent on a quadratic with largest curvature lambda is stable for steps below 2 / lambda.
lambda, the largest eigenvalue of the Hessian, is found by power iteration on Hessian-vector
products; the step is 1 / lambda. It is measured again when the loss has halved (for logistic loss
and cross-entropy lambda falls with the loss, and a fixed step would take 1 / target steps) and
after every hundred steps. A step that raises the loss is taken back and halved.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paperlib.progress import DELAY_SECONDS, progress_bar
from paperlib.streams import stream

# Power iterations at the start, and afterwards from the previous eigenvector.
FIRST_ITERATIONS = 20
LATER_ITERATIONS = 4

# The curvature is measured again after this many steps at most, and at least.
MEASURE_AT_MOST = 100
MEASURE_AT_LEAST = 10

# A step this much smaller than the curvature suggests means that rounding rules.
SMALLEST_TRUST = 1e-6


@dataclass
class DescentTrace:
    """Where gradient descent ended.

    Attributes:
        loss: the final loss.
        steps: accepted steps.
        status: "converged", "step limit" or "stalled".
        history: a dict for the first hundred steps, every hundredth after, and whenever the loss
            fell by a tenth: step, loss, step_size, curvature, seconds.
        seconds: wall time.
    """

    loss: float
    steps: int
    status: str
    history: list[dict] = field(default_factory=list)
    seconds: float = 0.0


def gradient_descent(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    *,
    target: float,
    max_steps: int,
    momentum: float = 0.0,
    step_scale: float = 1.0,
    progress: bool | None = None,
) -> DescentTrace:
    """Minimise loss() over the parameters, in place.

    With momentum, v <- momentum v - step grad, w <- w + v (Polyak's heavy ball), v being dropped
    whenever the loss would rise. Either way the last layer's move stays a combination of the
    features that the samples had on the way.

    Args:
        loss: evaluates the loss at the present parameters, twice differentiable.
        parameters: leaves that require a gradient.
        target: stop at this loss.
        max_steps: most steps.
        momentum: 0 for plain gradient descent, below 1.
        step_scale: step size times the largest curvature, below 2.
        progress: draw a bar on long work; if None, unless PAPERLIB_PROGRESS=0 is set.

    Raises:
        ValueError: if the loss is not finite at the start.
    """
    begun = time.perf_counter()
    parameters = list(parameters)
    velocity = [torch.zeros_like(p) for p in parameters]
    value, gradient = _evaluate(loss, parameters)
    if not value < float("inf"):
        raise ValueError(f"the loss must be finite at the start, got {value}")
    trace = DescentTrace(value, 0, "step limit")
    direction, curvature, trust = None, 0.0, 1.0
    measured_at, measured_loss, logged = None, value, float("inf")
    bar = progress_bar(progress, desc="train", unit=" steps", delay=DELAY_SECONDS, leave=False)
    with bar:
        while trace.steps < max_steps:
            if value <= target:
                break
            age = None if measured_at is None else trace.steps - measured_at
            if (
                age is None
                or age >= MEASURE_AT_MOST
                or (age >= MEASURE_AT_LEAST and value < 0.5 * measured_loss)
            ):
                iterations = FIRST_ITERATIONS if age is None else LATER_ITERATIONS
                curvature, direction = top_curvature(
                    loss, parameters, direction, iterations=iterations
                )
                measured_at, measured_loss = trace.steps, value
                # Trust that was lost comes back slowly.
                trust = min(1.0, 1.1 * trust)
            step_size = trust * step_scale / curvature if curvature > 0 else trust
            before = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, v, g in zip(parameters, velocity, gradient, strict=True):
                    v.mul_(momentum).sub_(step_size * g)
                    p.add_(v)
            new_value, new_gradient = _evaluate(loss, parameters)
            if not new_value <= value:  # NaN counts as a rise
                with torch.no_grad():
                    for p, old in zip(parameters, before, strict=True):
                        p.copy_(old)
                fast = momentum > 0 and any(
                    bool((v + step_size * g).abs().max() > 0)
                    for v, g in zip(velocity, gradient, strict=True)
                )
                velocity = [torch.zeros_like(p) for p in parameters]
                if not (fast and new_value < float("inf")):
                    trust *= 0.5
                if trust < SMALLEST_TRUST:
                    trace.status = "stalled"
                    break
                continue
            value, gradient = new_value, new_gradient
            trace.steps += 1
            if trace.steps <= 100 or trace.steps % 100 == 0 or value < 0.9 * logged:
                logged = value
                trace.history.append(
                    {
                        "step": trace.steps,
                        "loss": value,
                        "step_size": step_size,
                        "curvature": curvature,
                        "seconds": time.perf_counter() - begun,
                    }
                )
            bar.set_postfix_str(f"loss {value:.1e}, target {target:.0e}", refresh=False)
            bar.update()
    if value <= target:
        trace.status = "converged"
    trace.loss = value
    trace.seconds = time.perf_counter() - begun
    return trace


def _evaluate(
    loss: Callable[[], Tensor], parameters: Sequence[Tensor]
) -> tuple[float, tuple[Tensor, ...]]:
    with torch.enable_grad():
        value = loss()
        gradient = torch.autograd.grad(value, parameters)
    return float(value.detach()), gradient


def top_curvature(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    direction: list[Tensor] | None = None,
    *,
    iterations: int = FIRST_ITERATIONS,
) -> tuple[float, list[Tensor]]:
    """The Hessian's eigenvalue of largest magnitude, by power iteration.

    Args:
        loss: evaluates the loss, twice differentiable.
        parameters: leaves that require a gradient.
        direction: where to start; random if None.
        iterations: products with the Hessian.

    Returns:
        ||H v|| for the last unit vector v, which is at most the eigenvalue's magnitude, and the
        next v.
    """
    if direction is None:
        generator = stream("power iteration", 0)
        direction = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    with torch.enable_grad():
        gradient = torch.autograd.grad(loss(), parameters, create_graph=True)
    size = 0.0
    for _ in range(iterations):
        norm = _norm(direction)
        if norm == 0:
            break
        direction = [v / norm for v in direction]
        direction = [
            Hv.detach()
            for Hv in torch.autograd.grad(
                gradient, parameters, direction, retain_graph=True, materialize_grads=True
            )
        ]
        size = _norm(direction)
    return size, direction


def _norm(vectors: Sequence[Tensor]) -> float:
    return float(torch.stack([v.double().square().sum() for v in vectors]).sum().sqrt())
