"""How much memory there is, and how much a reconstruction will take."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from paperlib.feature_map import FeatureMap

# The share of the free memory that the weights may take; the rest is for features and products.
SHARE = 0.6


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            entries = dict(line.split(":", 1) for line in lines)
        return 1024 * int(entries["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        # Not Linux: all of the memory is the best guess there is.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def bytes_of(dtype: torch.dtype, *shape: int) -> int:
    """Bytes of a tensor of that dtype and shape."""
    total = torch.empty(0, dtype=dtype).element_size()
    for size in shape:
        total *= size
    return total


def stage_bytes(candidates: int, features: int, outputs: int, dtypes: list[torch.dtype]) -> int:
    """Bytes that one Gauss-Newton model keeps beside the weights.

    Features and slopes, (n^, p) each, in every dtype that they are kept in; the residual and the
    parameters, (C, p), in float32 or wider; all twice, since a trial step is evaluated before the
    model it starts from is given up.
    """
    kept = sum(2 * bytes_of(dtype, candidates, features) for dtype in dtypes)
    return 2 * (kept + 2 * bytes_of(torch.float64, outputs, features))


def predicted_bytes(
    model: FeatureMap, candidates: int, outputs: int, bulk: torch.dtype
) -> dict[str, int]:
    """What a reconstruction will allocate at its peak, part by part.

    Args:
        model: the feature map.
        candidates: candidates of the bulk stage.
        outputs: rows of theta.
        bulk: dtype of the bulk stage.
    """
    dtypes = [model.dtype] if bulk == model.dtype else [model.dtype, bulk]
    held = getattr(model, "rows_held", model.p)
    parts = {"features": stage_bytes(candidates, held, outputs, dtypes)}
    if hasattr(model, "keeps"):
        parts["weights"] = sum(
            bytes_of(dtype, held, model.d)
            for dtype in dtypes
            if model.keeps(dtype) and not model.holds(dtype)
        )
        # V^T V, its inverse and its factor in float64.
        parts["lift"] = bytes_of(torch.float64, 4, model.d, model.d)
    return parts


def check_memory(
    model: FeatureMap, candidates: int, outputs: int, bulk: torch.dtype
) -> dict[str, int]:
    """The predicted peak, refused if it cannot fit.

    Raises:
        MemoryError: with the parts, what is free, and what to change.
    """
    parts = predicted_bytes(model, candidates, outputs, bulk)
    free = free_bytes(model.device)
    if sum(parts.values()) > free:
        listed = ", ".join(f"{name} {readable(size)}" for name, size in parts.items())
        raise MemoryError(
            f"needs {readable(sum(parts.values()))} more ({listed}) and {readable(free)} are free "
            f"on {model.device}: use placement='streamed', split the features over processes, or "
            "lower p or n"
        )
    return parts


def readable(size: float) -> str:
    """A size in words, for messages."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
