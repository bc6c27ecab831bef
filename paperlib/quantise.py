"""Parameters as they are stored with fewer bits, and read back."""

from __future__ import annotations

import torch
from torch import Tensor

from paperlib.checks import check_count, check_finite, check_named

# Bits of one parameter; the scales that neighbours share come on top.
BITS = {"float16": 16, "bfloat16": 16, "int8": 8, "int4": 4, "sign": 1}

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def quantise(theta: Tensor, format: str, *, group: int | None = None) -> Tensor:
    """Parameters rounded to a storage format and read back, in the dtype and shape of theta.

    - "float16", "bfloat16": the nearest number of that format.
    - "int8", "int4": s q with the nearest whole number q in -127 .. 127 or -7 .. 7, the scale
      s = max |theta| / 127 or / 7 being shared by the weights of one group (symmetric "absmax").
    - "sign": s sign(theta), s = mean |theta| of the group, which is the best s in least squares
      (Rastegari et al. 2016, XNOR-Net); a weight of zero counts as positive.

    Rounding what was already rounded changes nothing.

    Args:
        theta: (p,) or (C, p) parameters; whatever is released is what should be rounded: the
            trained parameters, or their difference from the start.
        format: one of `BITS`.
        group: how many neighbouring weights of a row share a scale, for "int8", "int4" and "sign";
            the whole row if None. The last group of a row may be smaller.

    Raises:
        TypeError: if theta is not a tensor of floating-point numbers.
        ValueError: for an unknown format, another shape, a group below 1 or for a format without
            one, values that are not finite, or values that float16 cannot hold.
    """
    if not isinstance(theta, Tensor) or not theta.dtype.is_floating_point:
        kind = theta.dtype if isinstance(theta, Tensor) else type(theta).__name__
        raise TypeError(f"theta must be a tensor of floating-point numbers, got {kind}")
    if theta.ndim not in (1, 2) or 0 in theta.shape:
        raise ValueError(f"theta must have shape (p,) or (C, p), got {tuple(theta.shape)}")
    check_named("format", format, BITS)
    check_finite("theta", theta)
    if format in FLOATS:
        if group is not None:
            raise ValueError(f"group is for formats with a shared scale, {format} has none")
        stored = theta.to(FLOATS[format])
        if not bool(torch.isfinite(stored).all()):
            most = torch.finfo(FLOATS[format]).max
            raise ValueError(
                f"{format} holds numbers up to {most:.5g}, theta has "
                f"{float(theta.abs().max()):.5g}: scale it first"
            )
        return stored.to(theta.dtype)
    p = theta.shape[-1]
    size = p if group is None else check_count("group", group)
    parts = [_round_group(part, format) for part in theta.split(size, dim=-1)]
    return torch.cat(parts, dim=-1)


def _round_group(theta: Tensor, format: str) -> Tensor:
    """One group of each row, (C, h), with one scale a row."""
    if format == "sign":
        scale = theta.abs().mean(-1, keepdim=True)
        return torch.where(theta < 0, -scale, scale)
    steps = 2 ** (BITS[format] - 1) - 1
    scale = theta.abs().amax(-1, keepdim=True) / steps
    # Zero for a row of zeros, and where the dtype has no number so small.
    scale = torch.where(scale > 0, scale, 1)
    return (theta / scale).round().clamp(-steps, steps) * scale
