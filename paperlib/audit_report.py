"""An audit in words, with its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from paperlib.confirmed_attack import SAME
from paperlib.law import least_parameters
from paperlib.reconstruct import TOLERANCE

if TYPE_CHECKING:
    from paperlib.audit import Audit

# What moves a last layer by more than sums of features.
NO_PLAIN_DESCENT = (
    "training was no plain gradient descent (Adam, weight decay, dropout, augmentation)"
)


def in_words(found: Audit) -> list[str]:
    """The lines of the answer."""
    rows = "" if found.outputs == 1 else f"{found.outputs:,} x "
    lines = [
        f"last layer    {found.last_layer!r}: {rows}{found.p:,} = {found.parameters:,} parameters, "
        f"moved by {found.moved:.2g} of their norm"
    ]
    if found.independent < found.outputs:
        lines.append(f"              {found.independent} of its {found.outputs} rows independent")
    norms = "of known norm"
    if found.options["radius"] is None:
        searched = found.d_searched > found.d
        norms = "of unknown norm" if searched else "whose norm leaves no trace"
    lines.append(
        f"layers below  moved by {found.body_moved:.2g} of their norm"
        + ("" if found.body_moved else ": plain gradient descent adds up features exactly")
    )
    lines.append(
        f"the law       inputs of {found.d:,} numbers, {norms}: at most {found.readable:,} samples "
        "are determined"
    )
    if found.n is not None:
        ratio = found.parameters / (found.d * found.n)
        origin = "given" if found.count is None else f"estimated, {found.count}"
        lines.append(
            f"samples       n = {found.n:,} ({origin}): {ratio:.3g} parameters for each "
            "number in the data"
        )
    if found.record is not None:
        lines.append(f"attack        projection loss {found.record.loss:.1e}: {_attacked(found)}")
    lines.append(f"verdict       {found.verdict}: {meaning(found)}")
    if found.comparison is not None:
        result = found.comparison
        lines.append(
            f"the data      {result.recovered(SAME)} of {result.n} within {SAME:g} of their norm, "
            f"mean error {result.signed_error:.2g}; they leave {found.residual_at_truth:.1e} "
            "unexplained"
        )
    if found.n is not None and found.record is not None:
        least = least_parameters(found.n, found.d_searched, found.independent)
        lines.append(
            f"stopped by    fewer than {least:,} features in place of {found.p:,}, or more than "
            f"{found.readable:,} samples; `paperlib.protections` tries noise and rounding"
        )
    return lines


def _attacked(found: Audit) -> str:
    """Whether the samples explain the parameters, and how many were found twice."""
    record, confirmed = found.record, int(found.confirmed.sum())
    twice = f"{confirmed} of {found.n} samples found again from other random candidates"
    if not record.explained:
        return f"not explained; {twice}"
    rounded = record.loss > TOLERANCE[found.features.dtype] and found.rounding >= record.loss
    words = "explained, to the rounding of the stored weights" if rounded else "explained"
    return words if confirmed == found.n else f"{words}; {twice}"


def meaning(found: Audit) -> str:
    """What the verdict says, and what it does not."""
    verdict = found.verdict
    confirmed = 0 if found.confirmed is None else int(found.confirmed.sum())
    if verdict == "read back":
        return "these samples explain the parameters: they are expected to be the training data"
    if verdict == "partly read back":
        return (
            f"fewer than {found.n} samples would explain the parameters: the {confirmed} that two "
            "attacks found are expected to be training data, the others are not needed"
        )
    if found.record is not None and found.body_moved == 0:
        # The data would explain the parameters, if n were right and this were plain descent.
        least = f", as {found.independent} independent rows show" * (found.n < found.independent)
        return (
            f"two attacks agree on {confirmed or 'none'} of {found.n} samples, but those do not "
            "explain the parameters, although the layers below did not move: there are more "
            f"samples than that{least}, or {NO_PLAIN_DESCENT}, or the search ended early. What was "
            "found need not be near the data"
        )
    if verdict.endswith("agreed on"):
        return (
            f"two attacks from independent starts agree on {confirmed} of {found.n} samples: this "
            "is where the parameters point; how near it is to the data depends on how little the "
            "layers below moved"
        )
    if verdict == "not found":
        return (
            "the numbers would allow it, this attack did not find them; more restarts, or another "
            "attack, may"
        )
    if verdict == "not attacked":
        if found.count is not None:
            return (
                f"no number of samples up to {len(found.count.losses) - 1} stands out: there are "
                f"more, or {NO_PLAIN_DESCENT}; give n"
            )
        return "how many samples there are cannot be estimated where the layers below moved: give n"
    return (
        "other data explain these parameters as well; that says nothing of attackers who know "
        "more, or hold several releases"
    )
