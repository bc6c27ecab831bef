"""An attempt: candidates from nothing, and the stages that make samples of them.

Random candidates, which a descent in all d dimensions and an elimination thin out; rounds of
searches in the few directions that stand out; or message passing. After the last, candidates are
exchanged while that gains.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from paperlib.elimination import eliminate, removal_costs
from paperlib.exchange import Exchanges
from paperlib.law import numbers_per_unknown
from paperlib.levenberg_marquardt import Damping
from paperlib.message_passing import MessagePassing
from paperlib.precision import FEW_SAMPLES, SETTLED
from paperlib.projection import Linearization
from paperlib.sphere import random_on_sphere
from paperlib.stages import PROMISING, Stages, stage_record
from paperlib.subspace_search import SubspaceSearch

# How two of the stages that a start can be made by are named in the log.
SEARCH, MESSAGES = "search in a subspace", "message passing"

# Most iterations of one start by message passing.
ITERATIONS = 600

# A descent between two searches ends when two steps no longer bring the loss below this share of
# what it was. A search takes as long as two or three steps, and leads further after more of them.
BETWEEN = {"stall_steps": 2, "stall_ratio": 0.7}

# The finish after them ends when two steps do not halve the loss: all of its steps do, unless a
# sample is missing. Then it is looked for before any more of them.
HALVED = 0.5
IMPATIENT = {"stall_steps": 2, "stall_ratio": HALVED}

# The rounds end when this many have not lowered the best loss by a tenth.
PATIENCE, MOST_ROUNDS = 3, 25

# Candidates are exchanged after an attempt that ends with at most this loss, until so many
# exchanges in turn have not lowered it by a tenth. The steps after one are judged twice: what has
# not come near the loss of before in the first few will not fall below it.
HOPEFUL, TRIES = 1e-2, 24
SETTLE, GLANCE, NEARLY, FOLLOWED = 10, 20, 1.7, 60

# From so many numbers per unknown of all candidates on, those that explain theta hold all samples.
TOLD = 1.5


@dataclass
class Attempt:
    """The outcome of one restart."""

    X: Tensor
    loss: float
    restart: int
    elimination_losses: list[float] = field(default_factory=list)
    agreed: bool = False


class Attempts(Stages):
    """The three kinds of attempt on one problem.

    Attributes:
        candidates: n^, how many a search begins with.
        eliminated: losses of the elimination in the attempt under way.
        exchanges: whether candidates are exchanged after an attempt that fell short.
    """

    def __init__(self, *problem: Any, candidates: int, **options: Any):
        """See `Stages`."""
        super().__init__(*problem, **options)
        self.candidates = candidates
        self.passing: MessagePassing | None = None
        self.eliminated: list[float] = []
        self.exchanges = False

    def _start(self, kept: Tensor | None) -> Tensor:
        """Random candidates, (n^, d), after those that are kept."""
        fresh = random_on_sphere(self.candidates, self.model.d, generator=self.generator)
        fresh = fresh.to(self.model.device, self.model.dtype)
        return fresh if kept is None else torch.cat([kept, fresh[: self.candidates - len(kept)]])

    def _attempt(self, start: Tensor, restart: int) -> Attempt:
        bulk = self._descend("bulk", start, restart, SETTLED[self.bulk], lifted=True, exact=False)
        elimination = eliminate(bulk, self.n)
        self.eliminated = elimination.losses
        X = bulk.X[elimination.kept]
        # With few numbers for each of theirs, candidates explain theta without being samples.
        told = numbers_per_unknown(self.model, self.theta, len(bulk.X)) >= TOLD
        if told and bulk.loss <= SETTLED[self.bulk] and len(bulk.X) > self.n:
            X = self._thinned(bulk, X, restart)
        point = self._finish(X, restart, brief=bulk.loss > PROMISING)
        return self._concluded(point, restart)

    def _thinned(self, bulk: Linearization, X: Tensor, restart: int) -> Tensor:
        """N of the candidates that explain theta as all of them do; X (n, d) where none are found.

        X is what elimination leaves. Where several candidates share a sample, it takes a sample
        with a tiny |alpha| for less than one of them, since it does not let the others move. Then
        one candidate after another is taken out, and put back if the others cannot replace it.
        """
        point = self._explaining(X, restart)
        if point is not None:
            return point.X
        left = bulk
        while len(left.X) > self.n:
            costs = removal_costs(left.gram_inverse, left.alpha)
            for j in costs.argsort()[: self.n].tolist():
                point = self._explaining(torch.cat([left.X[:j], left.X[j + 1 :]]), restart)
                if point is not None:
                    break
            else:
                return X
            left = point
        return left.X

    def _explaining(self, X: Tensor, restart: int) -> Linearization | None:
        """Candidates near X that explain theta, to the accuracy of the bulk stage, if any."""
        target = SETTLED[self.bulk]
        quick = {"stall_steps": PATIENCE, "stall_ratio": HALVED}
        point = self._descend("eliminate", X, restart, target, lifted=True, exact=False, **quick)
        return point if point.loss <= target else None

    def _concluded(
        self,
        point: Linearization,
        restart: int,
        previous: float = math.inf,
        *,
        gave_up: bool = False,
        since: int = 0,
    ) -> Attempt:
        """The outcome, after second chances for a sample that was missed.

        Where none was found, a finish that gave up early is taken to its end: theta may be noisy.
        `since` is how many exchanges have gained nothing already.
        """
        point = self._reseed(point, restart, previous)
        if gave_up and self.tolerance < point.loss <= PROMISING:
            point = self._descend_unlifted(point.X, restart)
        if self.exchanges:
            point = self._exchanged(point, restart, since)
        return Attempt(point.X, point.loss, restart, self.eliminated)

    def _exchanged(self, point: Linearization, restart: int, since: int = 0) -> Linearization:
        """Exchange one candidate after another (see `exchange.py`), while that lowers the loss."""
        mark = point.loss
        moves = self._moves(point, restart)
        while self.tolerance < point.loss <= HOPEFUL and since < TRIES:
            self.fallback = point, since
            before = moves.passes
            X = moves.next()
            self.passes += moves.passes - before
            trial = self._descend_exchanged(X, restart, GLANCE)
            if self.tolerance < trial.loss <= NEARLY * point.loss:
                trial = self._descend_exchanged(trial.X, restart, FOLLOWED)
            if trial.loss < point.loss:
                point = trial
                moves = self._moves(point, restart)
            since += 1
            if point.loss < 0.9 * mark:
                since, mark = 0, point.loss
        self.fallback = None
        return point

    def _moves(self, point: Linearization, restart: int) -> Exchanges:
        return Exchanges(
            point,
            settle=lambda X: self._descend_exchanged(X, restart, SETTLE),
            generator=self.generator,
        )

    def _descend_exchanged(self, X: Tensor, restart: int, steps: int) -> Linearization:
        return self._descend_unlifted(X, restart, name="exchange", steps=steps)

    def _attempt_in_subspaces(
        self, restart: int, X: Tensor | None = None, fallback: dict[str, Any] | None = None
    ) -> Attempt:
        """Rounds of searches and descents, then the finish; see `_rounds`."""
        best = self._rounds(restart, X, fallback)
        self.eliminated = eliminate(best, self.n).losses
        X, loss = best.X, best.loss
        del best  # it holds V^T V, which is made anew in float32
        point = None
        # Of many samples some are missing then: a finish would only tell so.
        if self.n > FEW_SAMPLES and loss > SETTLED[self.bulk]:
            point = self._sharpened(X, loss, restart)
        if point is None:
            point = self._impatient_finish(X, loss, restart)
            point = self._sharpened(point.X, point.loss, restart) or point
        return self._concluded(point, restart, gave_up=True)

    def _impatient_finish(self, X: Tensor, loss: float, restart: int) -> Linearization:
        if loss > PROMISING:
            return self._finish(X, restart, brief=True)
        return self._finish(X, restart, **IMPATIENT)

    def _sharpened(self, X: Tensor, loss: float, restart: int) -> Linearization | None:
        """The outcome of more rounds in float32, if those in bfloat16 left samples missing.

        Their residual is below what bfloat16 can tell from its own rounding. None where nothing is
        missing, too much is, or the memory allows no more digits.
        """
        missing = self.bulk == torch.bfloat16 and self.tolerance < loss <= PROMISING
        if not (missing and self._sharpen()):
            return None
        best = self._rounds(restart, X)
        return self._impatient_finish(best.X, best.loss, restart)

    def _sharpen(self) -> bool:
        """Go on in float32, if the memory allows; whether it does."""
        return False

    def _rounds(
        self, restart: int, X: Tensor | None = None, fallback: dict[str, Any] | None = None
    ) -> Linearization:
        """Rounds of a search in few directions and a short descent in all.

        The first round can begin at candidates X (n, d), with better ones of earlier rounds.
        """
        search = SubspaceSearch(
            self.model,
            self.theta if self.lift is None else self.lift.theta,
            self.n,
            candidates=self.candidates,
            lift=self.lift,
            dtype=self.products,
            forcing=self.forcing,
            generator=self.generator,
        )
        best: Linearization | None = None
        since = 0
        if fallback is not None:
            X_best = fallback["X"].to(self.theta)
            best = self._evaluate(X_best, lifted=True, exact=False, curvature=False)
            since = fallback["since"]
            self.fallback = best, since
        for _ in range(MOST_ROUNDS):
            if X is None:
                X = self._search(search, best, restart)
            point = self._descend(
                "bulk",
                X,
                restart,
                SETTLED[self.bulk],
                lifted=True,
                exact=False,
                **BETWEEN,
            )
            X = None
            since = 0 if best is None or point.loss < 0.9 * best.loss else since + 1
            if best is None or point.loss < best.loss:
                best = point
            self.fallback = best, since
            settled = best.loss <= SETTLED[self.bulk] or self._at_floor()
            if settled or since == PATIENCE:
                break
        self.fallback = None
        return best

    def _search(self, search: SubspaceSearch, best: Linearization | None, restart: int) -> Tensor:
        """Candidates (n, d) from one search, logged."""
        before = search.passes
        begun = self._announce(SEARCH, restart)
        X = search.first() if best is None else search.next(best)
        seconds, passes = time.perf_counter() - begun, round(search.passes - before)
        self._log(
            stage_record(
                SEARCH,
                self.model.dtype,
                "done",
                math.nan,
                self.candidates,
                passes,
                seconds,
                restart,
                products=self.products,
            )
        )
        return X

    def _attempt_by_messages(self, restart: int, kept: Tensor | None) -> Attempt:
        """Message passing, then signs and descent without a lift.

        It begins at the spectral start, or at candidates that explain almost everything: then a
        sample with a tiny |alpha| is missing, which stands out once the others are known.

        In every second of these the lengths of the means are free (see `MessagePassing.run`). The
        means know their signs, and p near d n has no d equations to spare for a lift.
        """
        name = MESSAGES
        earlier = self._starts_by(name, restart)
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
        beliefs = self.passing.run(
            ITERATIONS, on_sphere=earlier % 2 == 0, on_step=self.progress.step
        )
        self.passing.forget_scores()
        seconds = time.perf_counter() - begun
        for k, share in enumerate(beliefs.history, 1):
            self.history.append({"restart": restart, "stage": name, "step": k, "loss": share})
        passes = 2 * beliefs.iterations
        ended, share = beliefs.ended, beliefs.unexplained
        self._log(stage_record(name, self.bulk, ended, share, self.n, passes, seconds, restart))
        self.eliminated = []
        return self._concluded(self._settle(beliefs.X.to(self.theta), restart), restart)

    def _starts_by(self, name: str, restart: int) -> int:
        """How many of the restarts before this one were made by a stage of that name."""
        logged = (stage for stage in self.stages if stage["stage"] == name)
        return len({stage["restart"] for stage in logged if stage["restart"] < restart})

    def _go_on(self, state: dict[str, Any], *, searched: bool) -> Attempt:
        """The rest of an attempt that was cut off in a stage."""
        X, restart, stage = state["X"].to(self.theta), state["restart"], state["cut off"]["stage"]
        trial = state["fallback"]
        if stage == "bulk" and searched:
            return self._attempt_in_subspaces(restart, X, trial)
        if stage in ("bulk", "eliminate"):
            return self._attempt(X, restart)
        impatient = searched and trial is None
        rule = IMPATIENT if impatient else {}
        if stage == "exchange":  # it had one candidate less, perhaps: another is tried
            self.damping = Damping()
            X = trial["X"].to(self.theta)
            point = self._evaluate(X, lifted=False, exact=True, curvature=False)
        elif stage == "finish":
            point = self._descend_unlifted(X, restart, **rule)
        else:
            point = self._finish(X, restart, **rule)
        if impatient:
            point = self._sharpened(point.X, point.loss, restart) or point
        if trial is not None and trial["loss"] < point.loss:
            X = trial["X"].to(self.theta)
            point = self._evaluate(X, lifted=False, exact=True, curvature=False)
        previous = math.inf if trial is None else trial["loss"]
        since = trial["since"] if stage == "exchange" else 0
        return self._concluded(point, restart, previous, gave_up=searched, since=since)
