"""The default solver: Levenberg-Marquardt in stages, from random candidates to signed samples.

1. bulk: more candidates than samples, linear part lifted, fast arithmetic;
2. eliminate: backward elimination down to n, the others moving where they have to, then refine,
   still lifted;
3. signs: settled by one regression on both signs of each candidate;
4. finish: the unlifted loss, evaluated in the model's own dtype.

Where V is known and n is well below d, stages 1 and 2 are first made in the few directions that
stand out, in turn with short descents of n candidates in all d (see `subspace_search.py`).

Restarts repeat this from new random candidates until the loss is explained; the best by loss is
returned. Where p is near d n, most starts end in local minima; there a start is made by message
passing (see `message_passing.py`) in place of stages 1 and 2, and candidates are exchanged where
it ends with some samples mixed (see `exchange.py`).
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from paperlib.attempts import SEARCH, Attempt, Attempts
from paperlib.exchange import exchange_bytes
from paperlib.feature_map import FeatureMap
from paperlib.law import numbers_per_unknown
from paperlib.lift import Lift, room_for_lift, spent_by_lift
from paperlib.memory import allot
from paperlib.message_passing import message_bytes
from paperlib.precision import Formats, agreed_formats, bulk_formats, single_formats
from paperlib.progress import Progress
from paperlib.saved_attack import SavedAttack
from paperlib.spectral_start import second_moment_coefficient
from paperlib.stages import PROMISING, stage_record
from paperlib.streams import stream
from paperlib.subspace_search import search_bytes, search_pays

# Candidates for each sample, by default.
OVERSAMPLING = 1.4

# Two candidates are the same sample above this |cosine|, and two restarts agree when this share of
# their candidates is the same.
SAME = 0.9
AGREEMENT = 0.9

# Message passing makes the starts below this many numbers per unknown, and every second one above,
# where searches do not (chapter 11). It needs the second moment of the activation, and identifiable
# data.
NEAR = 2.5
LEAST_SECOND_MOMENT = 1e-2

# Restarts by default, and where every start is made by message passing.
RESTARTS, RESTARTS_NEAR = 5, 20


def candidates_of(n: int, p: int, *, oversampling: float = OVERSAMPLING) -> int:
    """How many candidates, n^ >= n, an attack on n samples begins with."""
    return max(n, min(math.ceil(oversampling * n), n + p // 4))


def same_samples(A: Tensor, B: Tensor, *, share: float = AGREEMENT) -> bool:
    """Whether that share of the rows of A turn up among those of B, up to sign."""
    cosines = (torch.nn.functional.normalize(A) @ torch.nn.functional.normalize(B).T).abs()
    return float((cosines.amax(1) > SAME).double().mean()) >= share


class SecondOrderSolver(Attempts):
    """Attempts of three kinds on one problem, until one succeeds."""

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
        saved: SavedAttack | None = None,
    ):
        """See `reconstruct` for the options."""
        candidates = candidates_of(n, model.p, oversampling=oversampling)
        formats = agreed_formats(model, bulk_formats(model, n, candidates, bulk))
        super().__init__(
            model,
            theta,
            n,
            candidates=candidates,
            formats=formats,
            keep=keep,
            max_steps=max_steps,
            tolerance=tolerance,
            forcing=forcing,
            generator=stream("candidates", seed),
            progress=progress,
            saved=saved,
        )
        self.ratio = numbers_per_unknown(model, theta, n)
        plain = model.random_features
        possible = plain is not None and abs(second_moment_coefficient(plain)) > LEAST_SECOND_MOMENT
        if start in ("messages", "subspace") and not possible:
            raise ValueError(
                f"start={start!r} needs a model with weights V and an activation with a second "
                "moment"
            )
        # The spectral start has d directions at most, and (V^T V)^-1 needs as many features.
        room = n <= model.d <= model.p
        if start in ("messages", "subspace") and not room:
            raise ValueError(
                f"start={start!r} needs n <= d <= p, got n = {n}, d = {model.d}, p = {model.p}"
            )
        possible = possible and room
        self.messages = possible and start in ("auto", "messages")
        self.messages = self.messages and (self.ratio > 1 or start == "messages")
        self.always_messages = start == "messages" or (self.messages and self.ratio < NEAR)
        self.exchanges = self.always_messages
        if restarts is None:
            restarts = RESTARTS_NEAR if self.always_messages else RESTARTS
        self.restarts = restarts
        lifted = self._lifts(lift)
        # A linear part that is not lifted would drown the second moment.
        liftable = plain is model and (lifted or abs(model.linear_coefficient) < 1e-6)
        if start == "subspace" and not liftable:
            raise ValueError("start='subspace' needs the lift: lift=None or True, and larger p")
        self.always_searches = start == "subspace"
        small = search_pays(model, n, candidates, len(theta))
        self.searches = self.always_searches or (
            start == "auto" and possible and liftable and small and self.ratio >= NEAR
        )
        # Searches come first, twice if need be.
        others = 2 if self.searches else 1
        messages = self.always_messages or (self.messages and restarts > others)
        self.wanted_keep = keep
        size = n, len(theta), model.p, model.d
        self.start_bytes = max(
            message_bytes(*size) if messages else 0,
            search_bytes(model, n, candidates, len(theta)) if self.searches else 0,
            exchange_bytes(*size) if self.exchanges else 0,
        )
        # Whether the bulk stage went on in float32: first in the attack that is taken up again.
        state = self.saved.state
        went_on = state is not None and state["sharpened"]
        self.sharpened = went_on and self._settle_for_single()
        if not self.sharpened:
            self.keep = self._allot(formats)
        try:
            self.lift = self._make_lift() if lifted else None
        except BaseException:
            self.model.reserve(None)  # there will be no `solve` to end the plan
            raise
        self.best: Attempt | None = None
        self.independent: list[Tensor] = []  # samples of the starts that began anew
        self.stuck = False

    def _allot(self, formats: Formats) -> str:
        """Make room for these formats; what stays of the activations between passes.

        Raises:
            MemoryError: in all processes, if one of them has no room.
        """
        refused = given = None
        try:
            given = allot(
                self.model,
                self.candidates,
                len(self.theta),
                formats,
                n=self.n,
                keep=self.wanted_keep,
                starts=self.start_bytes,
            )
        except MemoryError as error:
            refused = error
        full = torch.tensor([float(given is None)], dtype=torch.float64, device=self.model.device)
        self.model.sum_over_processes([full])
        if full > 0:
            raise refused or MemoryError("another process has no room for its share of the attack")
        self.model.reserve(given.resident)
        return given.keep

    def _settle_for_single(self) -> bool:
        """Change to the formats that go on in float32, if the memory allows; whether it does."""
        formats = agreed_formats(self.model, single_formats(self.model))
        try:
            self.keep = self._allot(formats)
        except MemoryError:
            return False
        self.bulk, self.products = formats
        return True

    def _lifts(self, wanted: bool | None) -> bool:
        """Whether the linear part is lifted: as wanted, or where there is one and room."""
        model = self.model
        liftable = model.has_weights and model.linear_coefficient != 0
        if wanted is None:
            return liftable and room_for_lift(model.p, model.d, self.candidates)
        if wanted and not liftable:
            raise ValueError(
                "lift=True needs a model with weights V and an activation with a linear part"
            )
        spent = spent_by_lift(model.d, self.candidates)
        if wanted and spent >= model.p:
            raise ValueError(
                f"lift=True spends d + {self.candidates} candidates = {spent} of the p equations: "
                f"it needs more than that, got p = {model.p}"
            )
        return wanted

    def _make_lift(self) -> Lift:
        self.progress.stage("lift the linear part")
        begun = time.perf_counter()
        # Rounding V to float16 saves memory, not time: the lift may as well be exact.
        dtype = self.model.dtype if self.bulk == torch.float16 else self.bulk
        lift = Lift(self.model, self.theta, dtype=dtype)
        seconds = time.perf_counter() - begun
        self._log(stage_record("lift", dtype, "done", math.nan, 0, 0, seconds, 0))
        return lift

    def _sharpen(self) -> bool:
        """Go on in float32, if the memory allows; whether it does."""
        self.model.release(self.bulk)
        if not self._settle_for_single():
            return False
        self.sharpened = True
        if self.lift is not None:
            self.lift = None  # V^T V twice would be more than was foreseen
            self.lift = self._make_lift()
        return True

    def solve(self) -> Attempt:
        """Run restarts until one explains the parameters; the best by loss otherwise.

        Searches, message passing while much is missing, and every restart after one that gained
        nothing begin anew. Any other begins at the best samples so far, with fresh random
        candidates beside them: most of those samples are right, and each right one leaves d
        unknowns fewer to search.

        Two starts from random candidates hardly ever meet but at true samples. When they agree on
        the samples, the loss that is left is not the candidates' fault (a network whose features
        moved while it trained is never explained exactly), and more restarts would find no more.
        """
        try:
            return self._solve()
        finally:
            self.model.reserve(None)

    def _solve(self) -> Attempt:
        begun = self._begin()
        for restart in range(begun["restart"], self.restarts):
            best = self.best
            kept = None if best is None or self.stuck else best.X
            promising = best is not None and best.loss <= PROMISING
            # What a search leads to depends on its random start, so one that failed is made anew.
            again = restart == 1 and not promising
            searched = self.always_searches or (self.searches and (restart == 0 or again))
            # Then every second start is by messages; where little is missing, more candidates
            # beside the best come before them.
            searches = self._starts_by(SEARCH, restart)
            turn = (restart - searches) % 2 == (0 if searches else 1)
            by_turn = self.messages and turn and (self.stuck or not promising)
            messages = self.always_messages or (by_turn and not searched)
            if searched or (messages and not promising):
                kept = None
            if restart == begun["restart"] and "X" in begun:
                attempt = self._go_on(begun, searched=searched)
            elif messages:
                attempt = self._attempt_by_messages(restart, kept)
            elif searched:
                attempt = self._attempt_in_subspaces(restart)
            else:
                attempt = self._attempt(self._start(kept), restart)
            self.stuck = best is not None and attempt.loss > 0.5 * best.loss
            if best is None or math.isnan(best.loss) or attempt.loss < best.loss:
                self.best = best = attempt
            if best.loss <= self.tolerance:
                break
            if kept is None:
                # Searches and message passing begin in the same outlying directions each time: they
                # can find all but a sample with a tiny |alpha|, or the same mixture of two, again.
                # So all samples have to agree, and with two starts.
                share, others = (1.0, 2) if messages or searched else (AGREEMENT, 1)
                met = sum(same_samples(attempt.X, X, share=share) for X in self.independent)
                self.independent.append(attempt.X)
                if met >= others and same_samples(best.X, attempt.X, share=share):
                    best.agreed = True
                    break
            self.saved.keep(self.state() | {"restart": restart + 1})
        return self.best

    def _begin(self) -> dict[str, Any]:
        """The state to begin at: of a process that was stopped, or of none."""
        if self.saved.state is None:
            state = self.state() | {"restart": 0}
            self.saved.begin(state)
            return state
        self._restore(self.saved.state)
        return self.saved.state

    def state(self) -> dict[str, Any]:
        """As in `Stages`, with the outcomes of earlier restarts."""
        return super().state() | {
            "best": None if self.best is None else vars(self.best),
            "independent": self.independent,
            "stuck": self.stuck,
            "eliminated": self.eliminated,
            "sharpened": self.sharpened,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        if state["best"] is not None:
            self.best = Attempt(**state["best"])
            self.best.X = self.best.X.to(self.theta)
        self.independent = [X.to(self.theta) for X in state["independent"]]
        self.stuck, self.eliminated = state["stuck"], state["eliminated"]
