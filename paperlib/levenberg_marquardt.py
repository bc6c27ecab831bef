"""Levenberg-Marquardt on the projection loss, without ever forming a Jacobian.

One step: linearise at the candidates, solve the damped Gauss-Newton system by preconditioned
conjugate gradients, put the rows back on the sphere, accept if the loss fell and damp less, or
reject and damp more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from paperlib.conjugate_gradients import LinearSolution, conjugate_gradients
from paperlib.expected_normal_matrix import ExpectedNormalMatrix, expectation_pays
from paperlib.preconditioner import Preconditioner
from paperlib.projection import Linearization
from paperlib.sphere import to_sphere, to_tangent


@dataclass(frozen=True)
class Damping:
    """How the damping mu follows success and failure (Marquardt's rule).

    Attributes:
        start: mu of the first step, relative to the diagonal of the Gauss-Newton matrix.
        shrink: factor after an accepted step.
        grow: factor after a rejected one.
        least: mu never falls below.
        most: give up above.
    """

    start: float = 1e-2
    shrink: float = 0.25
    grow: float = 5.0
    least: float = 1e-9
    most: float = 1e3

    def after(self, mu: float, *, accepted: bool) -> float:
        """The damping of the next step."""
        return max(mu * self.shrink, self.least) if accepted else mu * self.grow


@dataclass
class Descent:
    """Where Levenberg-Marquardt ended.

    Attributes:
        point: the last accepted Gauss-Newton model, with its candidates `point.X`; what only its
            products need, all that is as large as the features, is given up.
        status: why it stopped: "converged", "stalled", "precision floor" or "step limit".
        history: one record a step: loss, damping, inner iterations, accepted, and the passes and
            seconds up to there.
        passes: products of V (or the module's Jacobian) with n vectors.
    """

    point: Linearization
    status: str
    history: list[dict]
    passes: int


def levenberg_marquardt(
    evaluate: Callable[[Tensor], Linearization],
    X: Tensor,
    *,
    target: float,
    max_steps: int,
    damping: Damping = Damping(),  # noqa: B008 - frozen
    forcing: float = 0.1,
    max_inner: int = 50,
    stall_steps: int = 20,
    stall_ratio: float = 0.9,
    floor: float = 0.0,
    on_step: Callable[[dict, Linearization], None] | None = None,
) -> Descent:
    """Minimise the projection loss from X.

    Args:
        evaluate: X -> Gauss-Newton model at X, with curvature.
        X: (n, d) start.
        target: stop when the loss is at most this.
        max_steps: stop after this many linear solves.
        damping: the rule for mu.
        forcing: relative residual to which each linear system is solved.
        max_inner: most products in one linear solve.
        stall_steps: window over which progress is judged.
        stall_ratio: stop if the loss fell by less than this factor over the window.
        floor: loss below which rounding may end the descent: there, a step that does not at
            least halve the loss is the last one.
        on_step: called after every step with its record and the current model.
    """
    begun = time.perf_counter()
    point = evaluate(to_sphere(X))
    # Nothing else may hold the first point: what it keeps for products is as large as the features.
    status, history, passes = "step limit", [], point.passes
    mu, an_evaluation = damping.start, point.passes
    losses = [point.loss]
    for step in range(1, max_steps + 1):
        if point.loss <= target:
            status = "converged"
            break
        solution, dX = damped_step(point, mu, forcing=forcing, max_inner=max_inner)
        try:
            trial = evaluate(to_sphere(point.X + dX))
        except torch.linalg.LinAlgError:  # of features that are not finite, whose step is rejected
            trial = None
        reached = math.inf if trial is None else trial.loss
        accepted = reached < point.loss
        passes += an_evaluation if trial is None else trial.passes
        passes += point.product_passes * solution.iterations
        record = {
            "step": step,
            "loss": reached if accepted else point.loss,
            "damping": mu,
            "inner": solution.iterations,
            "accepted": accepted,
            "passes": passes,
            "seconds": time.perf_counter() - begun,
        }
        history.append(record)
        at_floor = point.loss <= floor and reached > 0.5 * point.loss
        mu = damping.after(mu, accepted=accepted)
        if accepted:
            point = trial
        del trial  # a rejected one is not to wait beside the next
        losses.append(point.loss)
        if on_step is not None:
            on_step(record, point)
        if at_floor:
            status = "precision floor"
            break
        if mu > damping.most:
            status = "stalled"
            break
        if len(losses) > stall_steps and losses[-1] > stall_ratio * losses[-1 - stall_steps]:
            status = "stalled"
            break
    else:
        if point.loss <= target:
            status = "converged"
    point.forget_curvature()
    return Descent(point, status, history, passes)


def damped_step(
    point: Linearization, mu: float, *, forcing: float, max_inner: int
) -> tuple[LinearSolution, Tensor]:
    """Solve (H + mu D) step = -gradient on the tangent space; returns the solution and dX.

    The unknowns (dX, da, dw) are one vector: (n d) + (n C) + (C d) numbers. Only dX is damped.
    """
    expected = expectation_pays(point.model, len(point.X))
    preconditioner = (ExpectedNormalMatrix if expected else Preconditioner)(point, mu)
    n, d = point.X.shape
    C = len(point.theta)
    lifted = point.lift is not None

    def split(v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        dX, da, dw = v[: n * d], v[n * d : n * d + n * C], v[n * d + n * C :]
        return dX.view(n, d), da.view(n, C), dw.view(C, d) if lifted else None

    def join(*parts: Tensor | None) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts if part is not None])

    def operator(v: Tensor) -> Tensor:
        dX, da, dw = split(v)
        HX, Ha, Hw = point.product(dX, da, dw)
        return join(to_tangent(point.X, HX) + preconditioner.damping * dX, Ha, Hw)

    b = point.X.new_zeros(n * d + n * C + (C * d if lifted else 0))
    b[: n * d] = to_tangent(point.X, point.gradient).reshape(-1)
    solution = conjugate_gradients(
        operator,
        b,
        lambda r: join(*preconditioner.apply(*split(r))),
        tolerance=forcing,
        max_iterations=max_inner,
    )
    return solution, split(solution.x)[0]
