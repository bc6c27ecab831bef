"""How many samples were trained on: the estimate of n from the parameters alone.

With k candidates the least projection loss is 0 for k >= n, and above 0 for k < n, since the
features of n samples are linearly independent. So start with more candidates than there can be
samples, remove the one that is missed least, refine the others, and so on: the curve of the
refined loss against the number kept jumps when the first true sample is removed.

The linear part is projected off in this curve (see `lift.py`), and it has to be for a ReLU:
relu(u) - relu(-u) = u, so that two superfluous candidates at w and -w supply any linear function,
and with it any number of wrong signs, at no loss at all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paperlib.checks import check_count, check_theta
from paperlib.elimination import eliminate
from paperlib.feature_map import FeatureMap
from paperlib.levenberg_marquardt import Descent, levenberg_marquardt
from paperlib.lift import Lift, room_for_lift
from paperlib.memory import PRODUCTS, choose_kept
from paperlib.precision import FLOOR, Formats
from paperlib.progress import Progress
from paperlib.projection import Linearization
from paperlib.reconstruct import TOLERANCE, reconstruct
from paperlib.reseed import reseed_least_useful
from paperlib.saved_attack import SavedAttack, open_attack
from paperlib.signs import settle_signs
from paperlib.stages import PROMISING, RESEED_GAIN
from paperlib.streams import stream


@dataclass(frozen=True)
class SampleCount:
    """How many samples the parameters were trained on, and why.

    Attributes:
        n: the estimate: the fewest candidates that explain the parameters; if no number does,
            the one at which the refined loss falls by the largest factor.
        jump: the factor by which the refined loss falls from n - 1 to n, losses below the
            tolerance counted as the tolerance.
        losses: losses[k] is the refined loss with k candidates kept, k = 0 .. most, without the
            linear part where that is lifted; losses[0] = 1. Never more for more candidates.
        explained: whether the samples explain the parameters, down to the tolerance. If not, a
            sample may be missing.
        samples: (n, d) the candidates kept at the estimate, refined, with their signs settled.
        loss: projection loss of the samples.
        tolerance: the loss that counts as zero.
        ended: for each number kept, from `most` down, why its refinement ended.
    """

    n: int
    jump: float
    losses: list[float]
    explained: bool
    samples: Tensor
    loss: float
    tolerance: float
    ended: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line: the estimate, and how clearly it stands out."""
        surely = "explain" if self.explained else "do not explain"
        return (
            f"{self.n} samples: the loss falls by a factor of {self.jump:.0e} from "
            f"{self.n - 1} to {self.n} candidates, which {surely} the parameters"
        )


def estimate_sample_count(
    model: FeatureMap,
    theta: Tensor,
    *,
    most: int,
    seed: int = 0,
    tolerance: float | None = None,
    restarts: int = 5,
    max_steps: int = 200,
    refine_steps: int = 40,
    progress: bool | None = None,
    resume: str | os.PathLike | None = None,
) -> SampleCount:
    """Estimate the number of training samples by backward elimination with refinement.

    Args:
        model: the feature map phi.
        theta: trained minus initial parameters, (C, p), or (p,) for one output.
        most: number of candidates to start with; the estimate is never larger. It should lie
            above any n that is thought possible; C p > most (d - 1 + C) numbers are needed for
            all of them to be identifiable.
        seed: of the random candidates.
        tolerance: loss that counts as zero; that of `reconstruct` if None.
        restarts: most starts of the reconstruction with `most` candidates.
        max_steps: most steps in one stage of that reconstruction.
        refine_steps: most steps after each removal.
        progress: as in `reconstruct`.
        resume: a folder in which the reconstruction and every number of candidates that is done
            are kept, as in `reconstruct`.

    Returns:
        A `SampleCount`.

    Raises:
        ValueError: for most < 1, p < most, or theta that `reconstruct` refuses.
        OSError: if the folder of `resume` cannot be written.
    """
    theta = check_theta(theta, model)
    most = check_count("most", most)
    check_count("refine_steps", refine_steps)
    if tolerance is None:
        tolerance = TOLERANCE[model.dtype]
    record = reconstruct(
        model,
        theta,
        most,
        seed=seed,
        tolerance=tolerance,
        restarts=restarts,
        max_steps=max_steps,
        progress=progress,
        resume=resume,
    )
    problem = record.options | {"task": "sample count", "refine_steps": refine_steps}
    saved = open_attack(resume, theta, model, **problem)
    room = room_for_lift(model.p, model.d, most)
    lift = Lift(model, theta, dtype=model.dtype) if model.linear_coefficient and room else None
    own = Formats(model.dtype, model.dtype)
    keep = choose_kept(model, most, len(theta), own, n=most)
    with Progress(progress) as watch:
        kept = remove_one_by_one(
            model,
            theta,
            record.samples,
            lift,
            tolerance=tolerance,
            max_steps=refine_steps,
            generator=stream("candidates", seed, index=1),
            keep=keep,
            watch=watch,
            saved=saved,
        )
        losses = [1.0] + [step["loss"] for step in reversed(kept)]
        for k in range(1, most + 1):
            losses[k] = min(losses[k], losses[k - 1])
        n, jump = fewest_that_explain(losses, tolerance)
        watch.stage("finish")
        X = kept[most - n]["X"].to(theta)
        X = settle_signs(model, theta, X) if lift is not None else X
        options = {"target": tolerance, "max_steps": max_steps, "keep": keep, "watch": watch}
        finish = descend(model, theta, X, None, **options)
    return SampleCount(
        n=n,
        jump=jump,
        losses=losses,
        explained=finish.point.loss <= tolerance,
        samples=finish.point.X,
        loss=finish.point.loss,
        tolerance=tolerance,
        ended=[step["ended"] for step in kept],
    )


def fewest_that_explain(losses: list[float], tolerance: float) -> tuple[int, float]:
    """The fewest candidates with a loss within the tolerance, and the fall of the loss there.

    If none has, the number at which the loss falls by the largest factor. Losses below the
    tolerance count as the tolerance: what happens there is rounding.

    Args:
        losses: for 0, 1, .., most candidates.
        tolerance: the loss that counts as zero.
    """
    floored = [max(loss, tolerance) for loss in losses]
    falls = [floored[k - 1] / floored[k] for k in range(1, len(floored))]
    explaining = [k for k in range(1, len(losses)) if losses[k] <= tolerance]
    k = explaining[0] if explaining else 1 + falls.index(max(falls))
    return k, falls[k - 1]


def remove_one_by_one(
    model: FeatureMap,
    theta: Tensor,
    X: Tensor,
    lift: Lift | None,
    *,
    tolerance: float,
    max_steps: int,
    generator: torch.Generator,
    keep: str,
    watch: Progress,
    saved: SavedAttack,
) -> list[dict[str, Any]]:
    """The refined candidates X for every number kept, from len(X) down to 1, `loss` and `ended`.

    Args:
        model: the feature map.
        theta: (C, p).
        X: (most, d) candidates.
        lift: the projection off the columns of V, if the linear part is lifted.
        tolerance: refinement ends below it.
        max_steps: most steps of one descent.
        generator: source of the new starts of candidates that are missed least.
        keep: what stays of the activations between passes.
        watch: progress.
        saved: what is done is kept there, and not done again.
    """

    def refine(X: Tensor) -> Descent:
        options = {"target": tolerance, "max_steps": max_steps, "keep": keep, "watch": watch}
        run = descend(model, theta, X, lift, **options)
        if lift is None or run.point.loss <= tolerance:
            return run
        # What is left of the activation is even only for ReLU and its like: elsewhere a wrong
        # sign is a local minimum of the lifted loss too.
        settled = settle_signs(model, theta, run.point.X)
        if torch.equal(settled, run.point.X):
            return run
        trial = descend(model, theta, settled, lift, **options)
        return trial if trial.point.loss < run.point.loss else run

    kept: list[dict[str, Any]] = []
    point: Linearization | None = None
    if saved.state is not None:
        kept = saved.state["kept"]
        generator.set_state(saved.state["generator"])
        if len(kept) < len(X):
            last = kept[-1]["X"].to(theta)
            target = theta if lift is None else lift.theta
            point = Linearization(model, target, last, lift=lift, keep=keep)
    for k in range(len(X) - len(kept), 0, -1):
        if point is not None:
            X = point.X[eliminate(point, k).kept]
        watch.stage(f"{k} candidates")
        run = refine(X)
        # A sample with a tiny |alpha| is easily overlooked, and stands out in the residual alone.
        while tolerance < run.point.loss <= PROMISING:
            trial = refine(reseed_least_useful(run.point, generator=generator))
            if trial.point.loss > RESEED_GAIN * run.point.loss:
                break
            run = trial
        point = run.point
        kept.append({"X": point.X, "loss": point.loss, "ended": run.status})
        saved.keep({"kept": kept, "generator": generator.get_state()})
    return kept


def descend(
    model: FeatureMap,
    theta: Tensor,
    X: Tensor,
    lift: Lift | None,
    *,
    target: float,
    max_steps: int,
    watch: Progress,
    keep: str = PRODUCTS,
) -> Descent:
    """Levenberg-Marquardt in the model's own dtype, lifted if `lift` is given."""

    def evaluate(candidates: Tensor) -> Linearization:
        target_theta = theta if lift is None else lift.theta
        return Linearization(model, target_theta, candidates, lift=lift, curvature=True, keep=keep)

    return levenberg_marquardt(
        evaluate,
        X,
        target=target,
        max_steps=max_steps,
        floor=max(target, FLOOR[model.dtype]),
        on_step=lambda record, point: watch.step(record["loss"], point.X),
    )
