"""The default solver: Levenberg-Marquardt in stages, from random candidates to signed samples.

1. bulk: more candidates than samples, linear part lifted, fast arithmetic;
2. eliminate: backward elimination down to n, then refine, still lifted;
3. signs: settled by one regression on both signs of each candidate;
4. finish: the unlifted loss, evaluated in the model's own dtype.

Where V is known, stages 1 and 2 are first made in the few directions that stand out, in turn with
short descents of n candidates in all d (see `subspace_search.py`).

Restarts repeat this from new random candidates until the loss is explained; the best by loss is
returned. Where p is near d n, most starts end in local minima; there a start is made by message
passing (see `message_passing.py`) in place of stages 1 and 2.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from paperlib.elimination import eliminate
from paperlib.feature_map import FeatureMap
from paperlib.identifiability import numbers_per_unknown
from paperlib.lift import Lift
from paperlib.memory import check_memory, choose_kept, make_room
from paperlib.message_passing import MessagePassing
from paperlib.precision import SETTLED, bulk_formats
from paperlib.progress import Progress
from paperlib.projection import Linearization
from paperlib.spectral_start import second_moment_coefficient
from paperlib.sphere import random_on_sphere
from paperlib.stages import PROMISING, Stages
from paperlib.streams import stream
from paperlib.subspace_search import SubspaceSearch

# The lift spends d + n^ of the p equations; it is used while most of them are left.
LIFT_SHARE = 0.5

# Two candidates are the same sample above this |cosine|, and two restarts agree when this share of
# their candidates is the same.
SAME = 0.9
AGREEMENT = 0.9

# Message passing makes the starts below this many numbers per unknown, and every second one above
# (chapter 11). It needs the second moment of the activation, and identifiable data.
NEAR = 2.5
LEAST_SECOND_MOMENT = 1e-2
ITERATIONS = 600

# A descent between two searches ends when a step or two no longer halve the loss. The rounds end
# when this many have not lowered the best loss by a tenth.
SHORT, HALVED = 2, 0.5
PATIENCE, MOST_ROUNDS = 3, 25

# Restarts by default, and where every start is made by message passing.
RESTARTS, RESTARTS_NEAR = 5, 20


@dataclass
class Attempt:
    """The outcome of one restart."""

    X: Tensor
    loss: float
    restart: int
    elimination_losses: list[float] = field(default_factory=list)
    agreed: bool = False


def same_samples(A: Tensor, B: Tensor, *, share: float = AGREEMENT) -> bool:
    """Whether that share of the rows of A turn up among those of B, up to sign."""
    cosines = (torch.nn.functional.normalize(A) @ torch.nn.functional.normalize(B).T).abs()
    return float((cosines.amax(1) > SAME).double().mean()) >= share


class SecondOrderSolver(Stages):
    """Starts of three kinds on one problem, each followed by the stages above."""

    def __init__(
        self,
        model: FeatureMap,
        theta: Tensor,
        n: int,
        *,
        seed: int,
        restarts: int | None,
        start: str,
        max_steps: int,
        tolerance: float,
        oversampling: float,
        lift: bool | None,
        bulk: str,
        keep: str,
        forcing: float,
        progress: Progress,
    ):
        """See `reconstruct` for the options."""
        self.candidates = max(n, min(math.ceil(oversampling * n), n + model.p // 4))
        formats = bulk_formats(model, self.candidates, bulk)
        make_room(model, formats)
        sizes = (self.candidates, len(theta), formats)
        super().__init__(
            model,
            theta,
            n,
            formats=formats,
            keep=choose_kept(model, *sizes, n=n) if keep == "auto" else keep,
            max_steps=max_steps,
            tolerance=tolerance,
            forcing=forcing,
            generator=stream("candidates", seed),
            progress=progress,
        )
        self.ratio = numbers_per_unknown(model, theta, n)
        possible = (
            hasattr(model, "weight_blocks")
            and abs(second_moment_coefficient(model)) > LEAST_SECOND_MOMENT
        )
        if start in ("messages", "subspace") and not possible:
            raise ValueError(
                f"start={start!r} needs a model with weights V and an activation with a second "
                "moment"
            )
        self.messages = possible and start in ("auto", "messages")
        self.messages = self.messages and (self.ratio > 1 or start == "messages")
        self.always_messages = start == "messages" or (self.messages and self.ratio < NEAR)
        if restarts is None:
            restarts = RESTARTS_NEAR if self.always_messages else RESTARTS
        self.restarts = restarts
        sent = self.always_messages or (self.messages and restarts > 1)
        check_memory(model, *sizes, n=n, keep=self.keep, messages=sent)
        self.lift = self._make_lift(lift)
        self.passing: MessagePassing | None = None
        # A linear part that is not lifted would drown the second moment.
        liftable = self.lift is not None or abs(model.linear_coefficient) < 1e-6
        if start == "subspace" and not liftable:
            raise ValueError("start='subspace' needs the lift: lift=None or True, and larger p")
        self.searches = start == "subspace" or (
            start == "auto" and possible and liftable and self.ratio >= NEAR
        )
        self.always_searches = start == "subspace"

    def _make_lift(self, wanted: bool | None) -> Lift | None:
        model = self.model
        room = model.d + self.candidates <= LIFT_SHARE * model.p
        if wanted is None:
            wanted = model.linear_coefficient != 0 and room
        if not wanted:
            return None
        if model.linear_coefficient == 0:
            raise ValueError(
                "lift=True needs a model with weights V and an activation with a linear part"
            )
        self.progress.stage("lift the linear part")
        begun = time.perf_counter()
        # Rounding V to float16 saves memory, not time: the lift may as well be exact.
        dtype = self.model.dtype if self.bulk == torch.float16 else self.bulk
        lift = Lift(model, self.theta, dtype=dtype)
        self._log("lift", dtype, "done", math.nan, 0, 0, time.perf_counter() - begun, 0)
        return lift

    def solve(self) -> Attempt:
        """Run restarts until one explains the parameters; the best by loss otherwise.

        The first restart, and every one after a restart that gained nothing, begin anew. Any
        other begins at the best samples so far, with fresh random candidates beside them: most of
        those samples are right, and each right one leaves d unknowns fewer to search.

        Two starts from random candidates hardly ever meet but at true samples. When they agree on
        the samples, the loss that is left is not the candidates' fault (a network whose features
        moved while it trained is never explained exactly), and more restarts would find no more.
        """
        best: Attempt | None = None
        independent: list[Tensor] = []
        stuck = False
        for restart in range(self.restarts):
            messages = self.always_messages or (self.messages and restart % 2 == 1)
            kept = None if best is None or stuck else best.X
            if messages:
                # Below, the best is resumed only where little is missing.
                kept = None if best is None or best.loss > PROMISING else kept
                attempt = self._attempt_by_messages(restart, kept)
            elif self.searches and (restart == 0 or self.always_searches):
                kept = None
                attempt = self._attempt_in_subspaces(restart)
            else:
                attempt = self._attempt(self._start(kept), restart)
            stuck = best is not None and attempt.loss > 0.5 * best.loss
            if best is None or attempt.loss < best.loss:
                best = attempt
            if best.loss <= self.tolerance:
                break
            if kept is None:
                # Message passing finds all but a sample with a tiny |alpha| again and again: then
                # all samples have to agree.
                share = 1.0 if messages else AGREEMENT
                best.agreed = any(same_samples(attempt.X, X, share=share) for X in independent)
                independent.append(attempt.X)
                if best.agreed:
                    break
        return best

    def _start(self, kept: Tensor | None) -> Tensor:
        """Random candidates, (n^, d), after those that are kept."""
        fresh = random_on_sphere(self.candidates, self.model.d, generator=self.generator)
        fresh = fresh.to(self.model.device, self.model.dtype)
        return fresh if kept is None else torch.cat([kept, fresh[: self.candidates - len(kept)]])

    def _attempt(self, start: Tensor, restart: int) -> Attempt:
        bulk = self._descend("bulk", start, restart, SETTLED[self.bulk], lifted=True, exact=False)
        elimination = eliminate(bulk, self.n)
        X = bulk.X[elimination.kept]
        point = self._finish(X, restart, brief=bulk.loss > PROMISING)
        point = self._reseed(point, restart)
        return Attempt(point.X, point.loss, restart, elimination.losses)

    def _attempt_in_subspaces(self, restart: int) -> Attempt:
        """Rounds of a search in few directions and a short descent in all, then the finish."""
        search = SubspaceSearch(
            self.model,
            self.theta if self.lift is None else self.lift.theta,
            self.n,
            candidates=self.candidates,
            lift=self.lift,
            dtype=self.bulk,
            forcing=self.forcing,
            generator=self.generator,
        )
        best: Linearization | None = None
        since = 0
        for _ in range(MOST_ROUNDS):
            name, before = "search in a subspace", search.passes
            begun = self._announce(name, restart)
            X = search.first() if best is None else search.next(best)
            seconds, passes = time.perf_counter() - begun, search.passes - before
            self._log(name, self.bulk, "done", math.nan, self.candidates, passes, seconds, restart)
            point = self._descend(
                "bulk",
                X,
                restart,
                SETTLED[self.bulk],
                lifted=True,
                exact=False,
                stall_steps=SHORT,
                stall_ratio=HALVED,
            )
            since = 0 if best is None or point.loss < 0.9 * best.loss else since + 1
            if best is None or point.loss < best.loss:
                best = point
            settled = best.loss <= SETTLED[self.bulk] or self._at_floor()
            if settled or since == PATIENCE:
                break
        losses = eliminate(best, self.n).losses
        point = self._finish(best.X, restart, brief=best.loss > PROMISING)
        point = self._reseed(point, restart)
        return Attempt(point.X, point.loss, restart, losses)

    def _attempt_by_messages(self, restart: int, kept: Tensor | None) -> Attempt:
        """Message passing, then signs and descent without a lift.

        It begins at the spectral start, or at candidates that explain almost everything: then a
        sample with a tiny |alpha| is missing, which stands out once the others are known.

        Its means know their signs, and p near d n has no d equations to spare for a lift.
        """
        name = "message passing"
        begun = self._announce(name, restart)
        if self.passing is None:
            shared = self.lift is not None and self.lift.dtype == self.bulk
            self.passing = MessagePassing(
                self.model,
                self.theta,
                self.n,
                generator=self.generator,
                dtype=self.bulk,
                weight_gram=self.lift.weight_gram if shared else None,
            )
        else:
            self.passing.begin()
        if kept is not None:
            self.passing.resume(kept)
        beliefs = self.passing.run(ITERATIONS, on_step=self.progress.step)
        self.passing.forget_scores()
        seconds = time.perf_counter() - begun
        for k, share in enumerate(beliefs.history, 1):
            self.history.append({"restart": restart, "stage": name, "step": k, "loss": share})
        passes = 2 * beliefs.iterations
        self._log(
            name, self.bulk, beliefs.ended, beliefs.unexplained, self.n, passes, seconds, restart
        )
        point = self._settle(beliefs.X.to(self.theta), restart)
        point = self._reseed(point, restart)
        return Attempt(point.X, point.loss, restart)
