"""The stages that follow a start, whatever made it, and the log of all that ran.

Descents by Levenberg-Marquardt in the bulk formats or exact, lifted or not; the finish, which
refines n candidates, settles their signs and minimises the unlifted loss; and second chances for a
sample that was missed.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from paperlib.feature_map import FeatureMap
from paperlib.levenberg_marquardt import Damping, Descent, levenberg_marquardt
from paperlib.lift import Lift
from paperlib.precision import FLOOR, Formats
from paperlib.progress import Progress
from paperlib.projection import Linearization
from paperlib.reseed import reseed_least_useful
from paperlib.saved_attack import SavedAttack
from paperlib.signs import settle_signs

# A bulk loss above this is a local minimum, not the floor of the arithmetic: restart.
PROMISING = 1e-3

# Steps of a descent that is expected to lead nowhere.
BRIEF = 10

# Signs are settled once the lifted loss is this share of the tolerance: the unlifted one, which
# takes fewer passes, is minimised to the end.
SHARP = 0.1

# The least useful candidate is moved again and again while each move gains at least this factor.
RESEED_GAIN = 0.8


class Stages:
    """What is common to all attempts on one problem.

    Attributes:
        history: one record a step, with its restart and stage.
        stages: one record a stage: what ran, in which format, why it ended, passes, seconds.
        passes: readings of all features so far.
        lift: the projection off the columns of V, once there is one.
    """

    def __init__(
        self,
        model: FeatureMap,
        theta: Tensor,
        n: int,
        *,
        formats: Formats,
        keep: str,
        max_steps: int,
        tolerance: float,
        forcing: float,
        generator: torch.Generator,
        progress: Progress,
        saved: SavedAttack | None = None,
    ):
        """See `reconstruct` for the options."""
        self.model, self.theta, self.n = model, theta, n
        self.saved = saved or SavedAttack()
        self.bulk, self.products = formats
        self.keep, self.max_steps, self.tolerance = keep, max_steps, tolerance
        self.forcing, self.generator, self.progress = forcing, generator, progress
        self.lift: Lift | None = None
        self.history: list[dict[str, Any]] = []
        self.stages: list[dict[str, Any]] = []
        self.passes = 0
        # What the stage under way has to beat, if it is a trial: a point, and how long it stood.
        self.fallback: tuple[Linearization, int] | None = None
        self.damping = Damping()  # of the next stage

    def state(self) -> dict[str, Any]:
        """What a later process needs to go on, all but the stage under way."""
        return {
            "generator": self.generator.get_state(),
            "history": self.history,
            "stages": self.stages,
            "passes": self.passes,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Take over what was logged, with the stage that was cut off."""
        self.generator.set_state(state["generator"])
        self.history, self.stages = state["history"], state["stages"]
        self.passes = state["passes"]
        if "cut off" in state:
            self.stages.append(state["cut off"])
            self.passes += state["cut off"]["passes"]
            last = self.history[-1]
            mu = self.damping.after(last["damping"], accepted=last["accepted"])
            self.damping = Damping(start=mu)

    def _keep(self, point: Linearization, cut_off: dict[str, Any]) -> None:
        """Offer a stage under way to the file of the attack: its candidates and its log."""
        fallback = None
        if self.fallback is not None:
            best, since = self.fallback
            fallback = {"X": best.X, "loss": best.loss, "since": since}
        self.saved.offer(
            lambda: {
                **self.state(),
                "restart": cut_off["restart"],
                "X": point.X,
                "fallback": fallback,
                "cut off": cut_off,
            }
        )

    def _announce(self, name: str, restart: int) -> float:
        """Show a stage in the progress bar; the time it begins at."""
        self.progress.stage(f"restart {restart + 1}, {name}" if restart else name)
        return time.perf_counter()

    def _at_floor(self) -> bool:
        """Whether rounding ended the last stage."""
        return self.stages[-1]["ended"] == "precision floor"

    def _reseed(
        self, point: Linearization, restart: int, previous: float = math.inf
    ) -> Linearization:
        """Move the least useful candidate again and again, while that gains."""
        while self.tolerance < point.loss <= min(PROMISING, RESEED_GAIN * previous):
            previous = point.loss
            self.passes += 2
            self.fallback = point, 0
            X = reseed_least_useful(point, generator=self.generator)
            trial = self._finish(X, restart)
            if trial.loss < point.loss:
                point = trial
        self.fallback = None
        return point

    def _finish(
        self, X: Tensor, restart: int, *, brief: bool = False, **stall: float
    ) -> Linearization:
        """Refine the n candidates, settle their signs, and minimise the unlifted loss."""
        if self.lift is None:
            return self._descend_unlifted(X, restart, brief=brief, **stall)
        # Signs of samples with a small |alpha| need directions that are exact; a lift in
        # bfloat16 cannot give them, and the reseeding below has to find such samples.
        if not brief and self.lift.dtype != torch.bfloat16:
            target = max(FLOOR[self.model.dtype], SHARP * self.tolerance)
            X = self._descend("refine", X, restart, target, lifted=True, exact=True, **stall).X
        return self._settle(X, restart, brief=brief, **stall)

    def _settle(
        self, X: Tensor, restart: int, *, brief: bool = False, **stall: float
    ) -> Linearization:
        """Settle the signs of the candidates and minimise the unlifted loss."""
        X = settle_signs(self.model, self.theta, X)
        self.passes += 2
        return self._descend_unlifted(X, restart, brief=brief, **stall)

    def _descend_unlifted(
        self, X: Tensor, restart: int, *, name: str = "finish", **rule: Any
    ) -> Linearization:
        """Minimise the unlifted loss; `rule` is when to give up, as in `_descend`."""
        target = min(FLOOR[self.model.dtype], self.tolerance)
        return self._descend(name, X, restart, target, lifted=False, exact=True, **rule)

    def _descend(
        self,
        name: str,
        X: Tensor,
        restart: int,
        target: float,
        *,
        lifted: bool,
        exact: bool,
        brief: bool = False,
        steps: int | None = None,
        **stall: float,
    ) -> Linearization:
        """One Levenberg-Marquardt run, logged; `stall` is its own rule for giving up.

        It takes `steps` at most, `max_steps` if None, and no more than `BRIEF` if it is brief.
        """
        steps = min(self.max_steps, BRIEF if brief else steps or self.max_steps)
        dtype = self.model.dtype if exact else self.bulk

        def log(ended: str, loss: float, passes: int) -> dict[str, Any]:
            return stage_record(
                name,
                dtype,
                ended,
                loss,
                len(X),
                passes,
                time.perf_counter() - begun,
                restart,
                products=self.products,
            )

        def after_step(record: dict[str, Any], point: Linearization) -> None:
            self.history.append({"restart": restart, "stage": name, **record})
            self._keep(point, log("interrupted", point.loss, record["passes"]))
            self.progress.step(record["loss"], point.X)

        begun = self._announce(name, restart)
        run: Descent = levenberg_marquardt(
            lambda X: self._evaluate(X, lifted=lifted, exact=exact),
            X,
            target=target,
            max_steps=steps,
            damping=self.damping,
            forcing=self.forcing,
            floor=max(self.tolerance, FLOOR[dtype]),
            on_step=after_step,
            **stall,
        )
        self.damping = Damping()
        self._log(log(run.status, run.point.loss, run.passes))
        return run.point

    def _evaluate(
        self, X: Tensor, *, lifted: bool, exact: bool, curvature: bool = True
    ) -> Linearization:
        """The Gauss-Newton model at candidates, of the lifted loss or not, in bulk or exact."""
        lift = self.lift if lifted else None
        return Linearization(
            self.model,
            self.theta if lift is None else lift.theta,
            X,
            lift=lift,
            dtype=self.model.dtype if exact else self.bulk,
            curvature_dtype=self.products,
            curvature=curvature,
            keep=self.keep,
        )

    def _log(self, record: dict[str, Any]) -> None:
        """Log a stage that ended."""
        self.passes += record["passes"]
        self.stages.append(record)


def stage_record(
    name: str,
    dtype: torch.dtype,
    ended: str,
    loss: float,
    candidates: int,
    passes: int,
    seconds: float,
    restart: int,
    *,
    products: torch.dtype | None = None,
) -> dict[str, Any]:
    """The log of one stage; `products` is the format of its Gauss-Newton products, if any."""
    return {
        "restart": restart,
        "stage": name,
        "dtype": str(dtype).removeprefix("torch."),
        "products": str(products or dtype).removeprefix("torch."),
        "ended": ended,
        "loss": loss,
        "candidates": candidates,
        "passes": passes,
        "seconds": seconds,
    }
