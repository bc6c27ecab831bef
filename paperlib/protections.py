"""What would have stopped an attack: the parameters spoilt on purpose, and attacked again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from paperlib.audit import Audit
from paperlib.checks import check_positive
from paperlib.confirmed_attack import close_rows
from paperlib.quantise import BITS, quantise
from paperlib.reconstruct import reconstruct
from paperlib.streams import stream

if TYPE_CHECKING:
    import pandas


def protections(
    audit: Audit,
    *,
    noise: Sequence[float] = (0.1, 1.0),
    formats: Sequence[str] = ("float16", "bfloat16", "int8", "int4"),
    restarts: int | None = None,
    progress: bool | None = None,
) -> pandas.DataFrame:
    """The last layer with noise, or rounded, before it is released; and the same attack on it.

    What is spoilt is W(T), since that is what would be released; the attacker still knows W(0).
    The samples that the audit confirmed stand for the data. Only this attack is tried: one made
    for noisy parameters may find more.

    Args:
        audit: with at least one confirmed sample.
        noise: sizes of Gaussian noise on W(T), relative to ||W(T) - W(0)||.
        formats: of `quantise`, a scale for each row.
        restarts: of each attack; those of the audit if None.
        progress: as in `reconstruct`.

    Returns:
        One row for each: `protection`; `spoilt`, ||change|| / ||W(T) - W(0)||; `found`, how many
        confirmed samples come back within 0.2 of their norm; `confirmed`, of how many;
        `loss`, the projection loss reached.

    Raises:
        ValueError: if nothing was confirmed, or for a noise or format without sense.
    """
    import pandas

    if audit.record is None or not bool(audit.confirmed.any()):
        raise ValueError(f"no sample was confirmed ({audit.verdict}): there is nothing to protect")
    levels = [check_positive("noise", level) for level in noise]
    for name in formats:
        if name not in BITS:
            raise ValueError(f"formats must be among {', '.join(BITS)}, got {name!r}")
    theta, released = audit.theta, audit.start + audit.theta.double()
    generator = stream("noise", audit.options["seed"])
    direction = torch.randn(theta.shape, generator=generator, dtype=torch.float64).to(theta.device)
    spoilt = {"none": released}
    for level in levels:
        size = level * theta.norm() / math.sqrt(theta.numel())
        spoilt[f"noise of {level:g}"] = released + size * direction
    for name in formats:
        spoilt[name] = quantise(released, name)
    options = {k: audit.options[k] for k in ("seed", "restarts", "max_steps", "tolerance")}
    options |= {"progress": progress} | ({} if restarts is None else {"restarts": restarts})
    to_inputs = audit.features.module.inputs
    truth = to_inputs(audit.record.samples[audit.confirmed.to(audit.theta.device)]).flatten(1)
    rows = []
    for name, weights in spoilt.items():
        left = (weights - audit.start).to(theta)  # of what was stored in many digits
        record = audit.record
        if name != "none":
            record = reconstruct(audit.features, left, audit.n, **options)
        found = close_rows(truth, to_inputs(record.samples).flatten(1))
        rows.append(
            {
                "protection": name,
                "spoilt": float((left - theta).norm() / theta.norm()),
                "found": int(found.sum()),
                "confirmed": len(truth),
                "loss": record.loss,
            }
        )
    return pandas.DataFrame(rows)
