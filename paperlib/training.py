"""Training, and what it leaves for the attack: theta, and how well the true data explain it.

The attack through the last layer (Section 5 of the paper) assumes that theta = W(T) - W(0) is a
combination of the features of the training data. That is exact when only the last layer is
trained. When the layers below move too, theta is a combination of the features on the way, and
the *residual at the truth*, the projection loss at the training data, is above zero: it bounds
what any attack on that loss can reach. A sample whose *share*, the rise of that loss when its
feature is taken away, is far below the residual has left no trace that stands out, and no attack
finds it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paperlib.checks import (
    check_count,
    check_finite,
    check_on_sphere,
    check_positive,
    check_rows,
)
from paperlib.elimination import shares
from paperlib.feature_map import FeatureMap
from paperlib.gradient_descent import DescentTrace, gradient_descent
from paperlib.losses import Loss, loss_named
from paperlib.networks.network import Network
from paperlib.projection import Linearization, significant_eigenpairs

LAYERS = ("all", "last")

# The paper trains until the loss is below this (its appendix on networks).
TARGET = 1e-7


@dataclass(frozen=True)
class Training:
    """What training left.

    Attributes:
        features: the last-layer feature map after training, as the attacker knows it.
        theta: (C, p), the last layer after minus before training.
        loss: final training loss.
        reached: whether it is below the target.
        status: the outcome in words.
        residual_at_truth: projection loss of theta at the training data; 0 if only the last layer
            moved, NaN if nothing did.
        shares: (n,) float64, how much that loss rises when a training sample is left out. Samples
            with a share far below `residual_at_truth` are beyond reach.
        drift: relative change of the training data's features, ||Phi(T) - Phi(0)|| / ||Phi(0)||.
        steps: steps of gradient descent.
        seconds: wall time.
        history: dicts of step, loss, step_size, curvature, seconds.
        options: loss, layers, target and so on.
    """

    features: FeatureMap
    theta: Tensor
    loss: float
    reached: bool
    status: str
    residual_at_truth: float
    shares: Tensor
    drift: float
    steps: int
    seconds: float
    history: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.status}; residual at the truth {self.residual_at_truth:.1e}, "
            f"features moved by {self.drift:.1%} ({self.steps} steps, {self.seconds:.1f} s)"
        )


def train(
    network: Network,
    X: Tensor,
    y: Tensor,
    *,
    loss: str = "squared",
    layers: str = "all",
    target: float = TARGET,
    max_steps: int = 100_000,
    momentum: float = 0.0,
    step_scale: float = 1.0,
    progress: bool | None = None,
) -> Training:
    """Train a network in place by full-batch gradient descent.

    Args:
        network: a `TwoLayer`, `ResNet`, `VisionTransformer` or another `Network`.
        X: (n, d) training inputs, rows on the sphere of radius sqrt(d).
        y: labels: (n, C) or, for one output, (n,); classes (n,) are allowed for cross-entropy.
        loss: "squared" (mean over samples and outputs), "logistic" (labels -1, +1) or
            "cross-entropy" (one-hot or class labels).
        layers: "all", or "last" to train the last layer alone.
        target: training loss to reach (the paper's 1e-7).
        max_steps: most steps.
        momentum: 0 for plain gradient descent, below 1.
        step_scale: step size times the largest curvature, measured on the way; below 2. Smaller
            steps come closer to gradient flow.
        progress: draw a progress bar on work longer than two seconds; if None, unless
            PAPERLIB_PROGRESS=0 is set.

    Raises:
        TypeError: if `network` is no `Network`, or X is of another dtype than the network.
        ValueError: for wrong shapes, labels that the loss does not take, inputs off the sphere.
    """
    if not isinstance(network, Network):
        raise TypeError(f"network must be a paperlib Network, got {type(network).__name__}")
    if layers not in LAYERS:
        raise ValueError(f"layers must be one of {LAYERS}, got {layers!r}")
    before = network.feature_map()
    chosen, targets = _check(before, X, y, network.outputs, loss)
    options = _options(chosen, layers, target, max_steps, momentum, step_scale)
    features_0 = before.features(X)
    if layers == "last":
        head, trace = _descend_in_span(
            chosen, features_0, targets, network.head.weight.detach(), progress, options
        )
        with torch.no_grad():
            network.head.weight.copy_(head)
        after, drift = before, 0.0
    else:
        del before
        with network.in_span(X) as (trained, rows):
            trace = gradient_descent(
                lambda: chosen.value(trained(rows), targets),
                [p for p in trained.parameters() if p.requires_grad],
                target=options["target"],
                max_steps=options["max_steps"],
                momentum=options["momentum"],
                step_scale=options["step_scale"],
                progress=progress,
            )
        after = network.feature_map()
        drift = float((after.features(X) - features_0).norm() / features_0.norm())
    return _record(after, network.theta, X, trace, drift, options)


def train_last_layer(
    model: FeatureMap,
    X: Tensor,
    y: Tensor,
    *,
    outputs: int | None = None,
    loss: str = "squared",
    theta_0: Tensor | None = None,
    target: float = TARGET,
    max_steps: int = 100_000,
    momentum: float = 0.0,
    step_scale: float = 1.0,
    progress: bool | None = None,
) -> Training:
    """Train theta of f(x) = theta phi(x) on a fixed feature map, by gradient descent.

    Gradient descent never leaves theta_0 + span{phi(x_i)}, so it is run in orthonormal coordinates
    of that span: the same iterates, n C numbers instead of p C.

    Args:
        model: the feature map.
        X: (n, d) training inputs, rows on the sphere of radius sqrt(d).
        y: labels as in `train`.
        outputs: C; if None, as many as y has columns.
        loss: "squared", "logistic" or "cross-entropy".
        theta_0: (C, p) start; zero if not given.
        target: training loss to reach.
        max_steps: most steps.
        momentum: 0 for plain gradient descent, below 1.
        step_scale: step size times the largest curvature; below 2.
        progress: as in `train`.

    Raises:
        TypeError: if X is of another dtype than the model.
        ValueError: for wrong shapes, labels that the loss does not take, inputs off the sphere.
    """
    if outputs is None:
        outputs = theta_0.shape[0] if theta_0 is not None else _columns(y, loss)
    chosen, targets = _check(model, X, y, check_count("outputs", outputs), loss)
    options = _options(chosen, "last", target, max_steps, momentum, step_scale)
    if theta_0 is None:
        theta_0 = torch.zeros(outputs, model.p, dtype=model.dtype, device=model.device)
    theta_0 = check_rows("theta_0", theta_0, model, rows=outputs, columns=model.p).detach()
    theta, trace = _descend_in_span(chosen, model.features(X), targets, theta_0, progress, options)
    return _record(model, theta - theta_0, X, trace, 0.0, options)


def _descend_in_span(
    loss: Loss,
    features: Tensor,
    targets: Tensor,
    theta_0: Tensor,
    progress: bool | None,
    options: dict[str, Any],
) -> tuple[Tensor, DescentTrace]:
    """Theta (C, p) after gradient descent from theta_0, in float64 coordinates of the span."""
    wide = features.double()
    values, vectors = significant_eigenpairs(wide @ wide.T, cutoff=1e-14)
    roots = values.sqrt()
    # Phi = (U S) Q with orthonormal rows of Q = S^-1 U^T Phi (r, p); theta = theta_0 + B Q.
    coordinates = vectors * roots  # (n, r)
    start = wide @ theta_0.double().T
    B = torch.zeros(len(theta_0), len(roots), dtype=torch.float64, device=features.device)
    B.requires_grad_()
    trace = gradient_descent(
        lambda: loss.value(start + coordinates @ B.T, targets),
        [B],
        target=options["target"],
        max_steps=options["max_steps"],
        momentum=options["momentum"],
        step_scale=options["step_scale"],
        progress=progress,
    )
    move = ((B.detach() / roots) @ vectors.T) @ wide
    return theta_0 + move.to(theta_0.dtype), trace


def _check(model: FeatureMap, X: Tensor, y: Tensor, outputs: int, loss: str) -> tuple[Loss, Tensor]:
    check_on_sphere("X", check_finite("X", check_rows("X", X, model)))
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a torch tensor, got {type(y).__name__}")
    if y.ndim not in (1, 2) or len(y) != len(X):
        raise ValueError(f"y must have {len(X)} rows as X has, got shape {tuple(y.shape)}")
    chosen = loss_named(loss)
    return chosen, chosen.targets(y, outputs).to(model.device)


def _columns(y: Tensor, loss: str) -> int:
    classes = loss_named(loss).name == "cross-entropy" and isinstance(y, Tensor) and y.ndim == 1
    if classes and not y.dtype.is_floating_point:
        return int(y.max()) + 1
    return y.shape[1] if isinstance(y, Tensor) and y.ndim == 2 else 1


def _options(
    loss: Loss, layers: str, target: float, max_steps: int, momentum: float, step_scale: float
) -> dict[str, Any]:
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
    return {
        "loss": loss.name,
        "layers": layers,
        "target": check_positive("target", target),
        "max_steps": check_count("max_steps", max_steps),
        "momentum": momentum,
        "step_scale": check_positive("step_scale", step_scale, below=2.0),
    }


def _record(
    features: FeatureMap,
    theta: Tensor,
    X: Tensor,
    trace: DescentTrace,
    drift: float,
    options: dict[str, Any],
) -> Training:
    reached = trace.loss <= options["target"]
    status = f"trained to loss {trace.loss:.1e}"
    if not reached:
        status = (
            f"not trained: {trace.status} at loss {trace.loss:.1e}, "
            f"above the target {options['target']:.0e}"
        )
    if bool(theta.any()):
        truth = Linearization(features, theta, X)
        residual = truth.loss
        each = shares(truth)
    else:  # nothing moved, for instance since no neuron is active: there is nothing to explain
        residual, each = math.nan, torch.zeros(len(X), dtype=torch.float64, device=X.device)
    return Training(
        features=features,
        theta=theta,
        loss=trace.loss,
        reached=reached,
        status=status,
        residual_at_truth=residual,
        shares=each,
        drift=drift,
        steps=trace.steps,
        seconds=trace.seconds,
        history=trace.history,
        options=options,
    )
