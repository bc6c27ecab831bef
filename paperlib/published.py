"""The paper's own solver: momentum gradient descent on the projection loss.

The baseline that the paper's figures were made with, as its section on experiments and its
released code describe it: candidates with N(0, 1) entries, gradient descent with momentum 0.9 on
L = ||E||^2 / ||Theta||^2, every row put back on the sphere of radius sqrt(d) after each step, until
L <= 1e-7 or 1,000,000 steps. The n x n Gram system is solved in the model's dtype, as published.

Two things deserve a word:

- The published gradient of a ReLU takes the slope 0.02 in place of 0 where the ReLU is inactive.
  That is a surrogate, not the gradient of L. `relu_slope=0` gives the gradient.
- Slopes are always evaluated at the candidates. The released code for ReLU + tanh evaluates them
  at the training inputs, which an attacker does not have: it leaks the answer into the attack.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from paperlib.activations import Activation
from paperlib.checks import check_count, check_positive, check_range
from paperlib.feature_map import FeatureBlock, FeatureMap
from paperlib.memory import bytes_of, check_fits
from paperlib.progress import Progress
from paperlib.projection import projection_loss
from paperlib.random_feature_block import RandomFeatureBlock
from paperlib.saved_attack import SavedAttack
from paperlib.sphere import to_sphere
from paperlib.stages import stage_record
from paperlib.streams import stream

# Records of a run of 1,000,000 steps are thinned to this many, evenly spaced, and the last.
MOST_RECORDS = 4096


@dataclass(frozen=True)
class Preset:
    """One of the settings in which the published code is launched.

    Attributes:
        n: number of samples.
        d: dimension.
        p: number of parameters.
        activation: name of the activation.
        options: options of the solver: `reconstruct(..., solver="published", **preset.options)`.
    """

    n: int
    d: int
    p: int
    activation: str
    options: dict[str, float]


PRESETS = {
    "synthetic": Preset(20, 100, 20_000, "relu", {"learning_rate": 20.0, "relu_slope": 0.02}),
    "cifar10": Preset(10, 3072, 100_000, "relu", {"learning_rate": 2000.0, "relu_slope": 0.02}),
}


def published_options(
    model: FeatureMap,
    theta: Tensor,
    n: int,
    *,
    seed: int,
    tolerance: float,
    watch: Progress,
    saved: SavedAttack | None = None,
    learning_rate: float = 20.0,
    momentum: float = 0.9,
    max_steps: int = 1_000_000,
    relu_slope: float = 0.02,
    restarts: int = 1,
) -> dict[str, Any]:
    """The published solver and its options.

    Args:
        model: the feature map.
        theta: (C, p).
        n: number of samples.
        seed: seed of the candidates.
        tolerance: loss at which the descent ends, 1e-7 in the paper.
        watch: progress.
        saved: the file that the attack is kept in, and goes on from.
        learning_rate: step size; the paper takes 20 on synthetic data with d = 100 and 2000 on
            CIFAR-10 (see `PRESETS`).
        momentum: factor of the previous step, 0.9 in the paper.
        max_steps: most steps of one restart; a step takes two passes over the features.
        relu_slope: slope of the ReLU on its inactive side in the gradient alone, 0.02 in the
            paper: a surrogate; 0 gives the gradient of the loss. Without effect on activations
            that hold no ReLU and on models that do not name their activation.
        restarts: most starts from new candidates, until one reaches the tolerance; the best by
            loss is returned. The paper has one.

    Raises:
        ValueError: for an option out of its range.
        TypeError: for an option of another type.
        MemoryError: if a step would not fit into the free memory.
    """
    check_positive("learning_rate", learning_rate)
    check_range("momentum", momentum, least=0, below=1)
    check_range("relu_slope", relu_slope, least=0)
    check_count("max_steps", max_steps)
    check_count("restarts", restarts)
    check_fits(
        {
            "features and slopes": bytes_of(model.dtype, 2, n, model.features_held),
            "weights": sum(model.resident_formats([model.dtype]).values()),
        },
        model.device,
    )
    generator = stream("published candidates", seed)
    best: dict[str, Any] | None = None
    history, stages, passes, first, begin = [], [], 0, 0, None
    saved = saved or SavedAttack()
    if saved.state is not None:
        state = saved.state
        best, history, stages, passes = (state[k] for k in ("best", "history", "stages", "passes"))
        first, begin = state["restart"], state["descent"]
        generator.set_state(state["generator"])
        if best is not None:
            best["samples"] = best["samples"].to(theta)

    def state_of(restart: int, descent: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "restart": restart,
            "descent": descent,
            "generator": generator.get_state(),
            "best": best,
            "history": history,
            "stages": stages,
            "passes": passes,
        }

    if saved.state is None:
        saved.begin(state_of(0, None))
    for restart in range(first, restarts):
        if begin is None:
            X = torch.randn(n, model.d, generator=generator, dtype=torch.float64)
        else:
            X = begin["X"]
        watch.stage(f"restart {restart + 1}, descent" if restart else "descent")
        begun = time.perf_counter() - (0.0 if begin is None else begin["seconds"])
        X, steps, ended, records = momentum_descent(
            model,
            theta,
            X.to(model.device, model.dtype),
            tolerance=tolerance,
            learning_rate=learning_rate,
            momentum=momentum,
            max_steps=max_steps,
            relu_slope=relu_slope,
            watch=watch,
            begin=begin,
            keep=lambda descent, restart=restart: saved.offer(lambda: state_of(restart, descent())),
        )
        begin = None
        loss = float(projection_loss(model, theta, X))
        spent = 2 * (steps + 1) + 2
        passes += spent
        history += [{"restart": restart, "stage": "descent", **record} for record in records]
        seconds = time.perf_counter() - begun
        stages.append(stage_record("descent", model.dtype, ended, loss, n, spent, seconds, restart))
        if best is None or math.isnan(best["loss"]) or loss < best["loss"]:
            best = {"samples": X, "loss": loss, "restart": restart}
        if loss <= tolerance:
            break
        saved.keep(state_of(restart + 1, None))
    return {
        **best,
        "history": history,
        "stages": stages,
        "passes": passes,
        "elimination_losses": [],
    }


def momentum_descent(
    model: FeatureMap,
    theta: Tensor,
    X: Tensor,
    *,
    tolerance: float,
    learning_rate: float,
    momentum: float,
    max_steps: int,
    relu_slope: float,
    watch: Progress,
    begin: dict[str, Any] | None = None,
    keep: Callable[[Callable[[], dict[str, Any]]], None] = lambda state: None,
) -> tuple[Tensor, int, str, list[dict[str, Any]]]:
    """One descent: velocity <- momentum velocity + dL/dX, X <- sphere(X - rate velocity).

    Args:
        model: the feature map.
        theta: (C, p) in the model's dtype.
        X: (n, d) start, or where a descent that was stopped had come to.
        tolerance: stop when the loss is at most this.
        learning_rate: step size.
        momentum: factor of the previous velocity.
        max_steps: stop after this many steps.
        relu_slope: see `published_options`.
        watch: progress.
        begin: the state of that descent.
        keep: called after every step with a function that makes that state.

    Returns:
        The candidates (n, d), on the sphere; the number of steps; why it ended, "converged",
        "step limit" or "diverged" (a loss that is not finite: then the candidates before it); and
        at most about `MOST_RECORDS` records of the steps, the last among them.
    """
    records, stride, ended, step = [], 1, "step limit", 0
    begun = time.perf_counter()
    velocity = torch.zeros_like(X)
    if begin is not None:
        velocity = begin["velocity"].to(X)
        records, stride, step = begin["records"], begin["stride"], begin["step"]
        begun -= begin["seconds"]
    total = float(_sum(model, theta.double().square().sum()))
    loss, gradient = loss_and_gradient(model, theta, X, total=total, relu_slope=relu_slope)
    # A start within the tolerance is put on the sphere and left there.
    last_finite = to_sphere(X)
    here = step

    def state() -> dict[str, Any]:
        return {
            "X": X,
            "velocity": velocity,
            "step": step,
            "stride": stride,
            "records": records,
            "seconds": time.perf_counter() - begun,
        }

    while loss > tolerance and step < max_steps:
        velocity = momentum * velocity + gradient
        X = to_sphere(X - learning_rate * velocity)
        loss, gradient = loss_and_gradient(model, theta, X, total=total, relu_slope=relu_slope)
        step += 1
        if not math.isfinite(loss):
            ended = "diverged"
            break
        last_finite = X
        record = {
            "step": step,
            "loss": loss,
            "damping": math.nan,
            "inner": 0,
            "accepted": True,
            "passes": 2 * (step + 1),
            "seconds": time.perf_counter() - begun,
        }
        if step % stride == 0:
            records.append(record)
        if len(records) > MOST_RECORDS:
            stride *= 2
            records = [kept for kept in records if kept["step"] % stride == 0]
        watch.step(loss, X)
        keep(state)
    if loss <= tolerance:
        ended = "converged"
    if step > here and last_finite is X and (not records or records[-1] is not record):
        records.append(record)
    return last_finite, step, ended, records


def loss_and_gradient(
    model: FeatureMap, theta: Tensor, X: Tensor, *, total: float, relu_slope: float
) -> tuple[float, Tensor]:
    """L at X and the published gradient, (n, d), in two passes over the features.

    alpha = (Phi Phi^T)^-1 Phi Theta^T in the model's dtype, E = Theta - alpha^T Phi, and
    dL/dx_i = -2 J_i^T (E^T alpha_i) / ||Theta||^2, with the surrogate slope inside J_i.

    Args:
        model: the feature map.
        theta: (C, p) in the model's dtype.
        X: (n, d).
        total: ||Theta||^2.
        relu_slope: see `published_options`; 0 for the gradient of the loss.
    """
    n, C = len(X), len(theta)
    gram, rhs = X.new_zeros(n, n), X.new_zeros(n, C)
    kept = []
    for block in surrogate_blocks(model, relu_slope):
        features, state = block.linearize(X)
        gram += features @ features.T
        rhs += features @ theta[:, block.start : block.stop].T
        kept.append((features, state))
    model.sum_over_processes([gram, rhs])
    alpha, info = torch.linalg.solve_ex(gram, rhs)
    if int(info):  # exactly singular: two candidates at the same point
        alpha = torch.linalg.pinv(gram, hermitian=True) @ rhs
    gradient, square = torch.zeros_like(X), X.new_zeros(())
    # Walked again, so that a streamed V is never held as a whole.
    blocks = surrogate_blocks(model, relu_slope)
    for block, (features, state) in zip(blocks, kept, strict=True):
        E = theta[:, block.start : block.stop] - alpha.T @ features
        square += E.square().sum()
        if C == 1:  # alpha_i is a number, and comes out of the product with the Jacobian
            gradient += alpha * block.vjp(state, E.expand(n, -1))
        else:
            gradient += block.vjp(state, alpha @ E)
    model.sum_over_processes([gradient, square])
    return float(square) / total, (-2 / total) * gradient


def surrogate_blocks(model: FeatureMap, relu_slope: float) -> Iterator[FeatureBlock]:
    """The blocks of the model, with `relu_slope` as slope where a ReLU is inactive."""
    activation: Activation | None = getattr(model, "activation", None)
    if relu_slope == 0 or activation is None or not activation.has_relu:
        yield from model.blocks()
        return

    def slope(u: Tensor) -> Tensor:
        if activation.name == "relu":  # one reading of u: this is the inner loop of the descent
            return torch.where(u > 0, u.new_tensor(1.0), u.new_tensor(relu_slope))
        return activation.slope(u).add_(u <= 0, alpha=relu_slope)

    surrogate = replace(activation, slope=slope)
    for start, V in model.weight_blocks():
        yield RandomFeatureBlock(start, V, surrogate, model.linear_coefficient)


def _sum(model: FeatureMap, value: Tensor) -> Tensor:
    model.sum_over_processes([value])
    return value
