"""The record that every solver returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Reconstruction:
    """What was read back from the parameters, and how.

    Attributes:
        samples: (n, d) candidates, rows on the sphere of radius sqrt(d), in the model's dtype.
        loss: projection loss at the samples, evaluated in the model's dtype; 0 means that their
            features span the parameters exactly.
        status: in words, what may be concluded from the loss.
        explained: whether the loss reached the tolerance.
        identifiable: whether the parameters count more numbers than the data, C p > n (d - 1 + C)
            for C independent outputs (p > d n for one), where p counts features that some sample
            moved; if not, other data explain them as well.
        history: one dict a step: stage, restart, step, loss, damping, inner iterations, whether it
            was accepted, and the passes and seconds of the stage up to there.
        stages: one dict a stage: restart, stage (its name), dtype, products, why it ended, loss,
            candidates, passes, seconds.
        passes: products of the feature weights (or the module's Jacobian) with all candidates.
        seconds: wall time of the whole reconstruction.
        restart: which restart the samples come from.
        options: everything needed to run it again, the model included.
        elimination_losses: loss against the number of candidates kept, index 0 .. n^ at the
            moment of elimination; 0 .. n after searches in a subspace, which end with n; empty
            where nothing was eliminated.
    """

    samples: Tensor
    loss: float
    status: str
    explained: bool
    identifiable: bool
    history: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    passes: int
    seconds: float
    restart: int
    options: dict[str, Any]
    elimination_losses: list[float] = field(default_factory=list)

    def history_frame(self) -> pandas.DataFrame:
        """The history as a data frame, a row a step."""
        import pandas

        return pandas.DataFrame(self.history)

    def __str__(self) -> str:
        """One line: how many samples, the loss, and the status."""
        n, d = self.samples.shape
        return (
            f"{n} samples of dimension {d}, loss {self.loss:.1e} after {self.passes} passes in "
            f"{self.seconds:.1f} s: {self.status}"
        )


def conclude(loss: float, tolerance: float, *, identifiable: bool, agreed: bool = False) -> str:
    """The status in words: never a success that the loss cannot show."""
    missed = not loss <= tolerance  # a loss that is no number explains nothing
    if missed and agreed:
        return (
            f"not explained to the tolerance {tolerance:.0e}: stopped at loss {loss:.1e}, where "
            "independent restarts found the same samples; they are likely to be training data, "
            "and what is left is not theirs to explain"
        )
    if missed:
        return (
            f"not explained: stopped at loss {loss:.1e}, above the tolerance {tolerance:.0e}; "
            "some of the samples may still be right"
        )
    if not identifiable:
        return (
            "explained, not identified: these data explain the parameters, but the parameters "
            "count no more numbers than the data, so other data explain them as well; "
            "these are not guaranteed to be the training data"
        )
    return (
        "explained and identified: these data explain the parameters, which count more numbers "
        "than the data, so they are expected to be the training data"
    )
