"""How much memory there is, and how much a reconstruction will take."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import torch

from paperlib import control_group
from paperlib.precision import Formats, arithmetic, storage

if TYPE_CHECKING:
    from paperlib.feature_map import FeatureMap

# The share of the free memory that the weights may take; the rest is for features and products.
SHARE = 0.6

# What this process may take of the memory of a device, such as "4 GB"; all that is free without it.
LIMIT_VARIABLE = "PAPERLIB_MEMORY"

# What stays of the activations of a block between passes (see `Linearization`).
PRODUCTS, INPUTS, NOTHING = KEPT = ("features and slopes", "inputs", "nothing")

# From this dimension on only the inputs are kept: what follows from them costs less than 5% of a
# product with V.
INPUTS_DIMENSION = 512


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, within what PAPERLIB_MEMORY allows.

    Raises:
        ValueError: for a PAPERLIB_MEMORY that is no size.
    """
    if device.type == "cuda":
        taken = torch.cuda.memory_allocated(device)
        # What torch has of the device's memory but no tensor is in, it gives out again.
        spare = torch.cuda.memory_reserved(device) - taken
        free = torch.cuda.mem_get_info(device)[0] + spare
    else:
        taken = psutil.Process().memory_info().rss
        free = min(psutil.virtual_memory().available, control_group.bytes_left())
    allowed = os.environ.get(LIMIT_VARIABLE)
    if allowed:
        free = min(free, max(_size(allowed) - taken, 0))
    return int(free)


def _size(words: str) -> int:
    """A number of bytes from words such as "4 GB"."""
    from dask.utils import parse_bytes  # takes a moment to import

    try:
        return parse_bytes(words)
    except ValueError:
        raise ValueError(f'{LIMIT_VARIABLE} must be a size such as "4 GB", got {words!r}') from None


def bytes_of(dtype: torch.dtype, *shape: int) -> int:
    """Bytes of a tensor of that dtype and shape."""
    total = torch.empty(0, dtype=dtype).element_size()
    for size in shape:
        total *= size
    return total


def make_room(model: FeatureMap, formats: Formats) -> None:
    """Give V in the model's dtype up where the copies of the bulk stage do not fit beside it.

    The bulk stage does nearly all of the work; the few exact passes of the finish draw V again.
    """
    if getattr(model, "placement", "resident") != "auto" or model.dtype in formats:
        return
    if model.holds(model.dtype) and len(model.resident_formats(formats)) < len(set(formats)):
        if all(model.fits(dtype) for dtype in formats):
            model.release(model.dtype)


def activation_bytes(
    candidates: int, n: int, features: int, keep: str, own: torch.dtype, formats: Formats
) -> int:
    """Bytes of what the passes of a stage leave for one another, all features together.

    A trial step is evaluated before the point that it starts from is given up. The trial is in the
    format of its evaluation, which in the finish is the model's own; the point is in that of the
    products.

    Args:
        candidates: n^, in the bulk stage.
        n: candidates of the finish.
        features: of this process.
        keep: "features and slopes", "inputs" or "nothing", see `Linearization`.
        own: dtype of the model.
        formats: of the bulk stage.
    """
    if keep == NOTHING:
        return 0

    def trial(dtype: torch.dtype) -> int:
        return (1 if keep == INPUTS else 2) * bytes_of(arithmetic(dtype), features)

    def point(dtype: torch.dtype) -> int:
        return bytes_of(storage(dtype), features) if keep == INPUTS else trial(dtype)

    def rounding(dtype: torch.dtype) -> int:
        """An array that is rounded to the format of the products is there in both formats."""
        rounded = storage(formats.products) if keep == INPUTS else arithmetic(formats.products)
        return 0 if rounded == arithmetic(dtype) else bytes_of(rounded, features)

    left = point(formats.products)
    return max(
        candidates * (trial(formats.bulk) + rounding(formats.bulk) + left),
        n * (trial(own) + rounding(own) + left),
    )


def predicted_bytes(
    model: FeatureMap,
    candidates: int,
    outputs: int,
    formats: Formats,
    *,
    n: int | None = None,
    keep: str = PRODUCTS,
    starts: int = 0,
    exact: bool = True,
) -> dict[str, int]:
    """What a reconstruction will allocate at its peak, part by part.

    Args:
        model: the feature map.
        candidates: n^, candidates of the bulk stage.
        outputs: rows of theta.
        formats: of the bulk stage.
        n: candidates of the finish, `candidates` if not given.
        keep: what stays of the activations between passes, see `Linearization`.
        starts: bytes that other starts than at random take, in turn with the descents.
        exact: whether V may stay in the model's own dtype, too.
    """
    held = model.features_held
    n = candidates if n is None else n
    activations = activation_bytes(candidates, n, held, keep, model.dtype, formats)
    parts = {
        "activations": max(activations, starts),
        # Parameters without their linear part, and the residuals of two points.
        "parameters": 3 * bytes_of(model.dtype, outputs, model.p),
    }
    if hasattr(model, "keeps"):
        parts["weights"] = sum(model.resident_formats(_wanted(model, formats, exact)).values())
        # V^T V, its inverse, its factor and what making them takes, in float64.
        parts["lift"] = bytes_of(torch.float64, 4, model.d, model.d)
        # Rows being drawn, and the arrays of one tile: about a dozen of (n^, rows).
        drawn = bytes_of(torch.float32, 2 * min(model.block_rows, held), model.d)
        tile = max(
            bytes_of(torch.promote_types(arithmetic(dtype), torch.float32), model.tile_rows(dtype))
            for dtype in (model.dtype, *formats)
        )
        parts["tiles"] = drawn + 12 * candidates * tile
    return parts


def choose_kept(
    model: FeatureMap, candidates: int, outputs: int, formats: Formats, *, n: int
) -> str:
    """What is to stay of the activations between passes: all that fits and is worth its memory.

    Features and slopes follow from their inputs X V^T by a few operations an entry, which is
    little beside the 2 d of a product with V where d is large; a product more is the last resort.
    """
    if not hasattr(model, "keeps"):
        return PRODUCTS
    ways = [INPUTS, NOTHING] if model.d >= INPUTS_DIMENSION else [PRODUCTS, INPUTS, NOTHING]
    free = free_bytes(model.device)
    for keep in ways:
        parts = predicted_bytes(model, candidates, outputs, formats, n=n, keep=keep)
        if parts["activations"] <= SHARE * (free - parts["weights"]):
            break
    return keep


def check_memory(
    model: FeatureMap, candidates: int, outputs: int, formats: Formats, **options: Any
) -> dict[str, int]:
    """The predicted peak, refused if it cannot fit; arguments as of `predicted_bytes`.

    Raises:
        MemoryError: with the parts, what is free, and what to change.
    """
    parts = predicted_bytes(model, candidates, outputs, formats, **options)
    check_fits(parts, model.device)
    return parts


def check_fits(parts: dict[str, int], device: torch.device) -> None:
    """Refuse what the device has no room for.

    Args:
        parts: bytes, by the name of what they are for.
        device: where they are to be allocated.

    Raises:
        MemoryError: with the parts, what is free, and what to change.
    """
    free = free_bytes(device)
    if sum(parts.values()) > free:
        listed = ", ".join(f"{name} {readable(size)}" for name, size in parts.items())
        raise MemoryError(
            f"needs {readable(sum(parts.values()))} more ({listed}) and {readable(free)} are free "
            f"on {device}: use placement='streamed', split the features over processes, or "
            "lower p or n"
        )


class Allotment(NamedTuple):
    """What a reconstruction gets.

    Attributes:
        keep: what stays of the activations between passes.
        resident: the formats in which V stays; in others it is drawn, or rounded, in every pass.
    """

    keep: str
    resident: frozenset[torch.dtype]


def allot(
    model: FeatureMap,
    candidates: int,
    outputs: int,
    formats: Formats,
    *,
    n: int,
    keep: str = "auto",
    starts: int = 0,
) -> Allotment:
    """Make room for a reconstruction.

    Args:
        model: the feature map; it may give V in its own dtype up.
        candidates: n^, candidates of the bulk stage.
        outputs: rows of theta.
        formats: of the bulk stage.
        n: candidates of the finish.
        keep: one of `KEPT`, or "auto" for `choose_kept`.
        starts: bytes that other starts than at random take.

    Raises:
        MemoryError: as `check_memory`.
    """
    make_room(model, formats)
    sizes = (candidates, outputs, formats)
    if keep == "auto":
        keep = choose_kept(model, *sizes, n=n)
    options = {"n": n, "keep": keep, "starts": starts}
    # The few exact passes can draw V, if it is their copy that does not fit.
    parts = predicted_bytes(model, *sizes, **options)
    exact = sum(parts.values()) <= free_bytes(model.device)
    check_memory(model, *sizes, **options, exact=exact)
    return Allotment(keep, frozenset(model.resident_formats(_wanted(model, formats, exact))))


def _wanted(model: FeatureMap, formats: Formats, exact: bool) -> list[torch.dtype]:
    """The formats in which a reconstruction would keep V, in order of need."""
    return [*formats, model.dtype] if exact else [*formats]


def readable(size: float) -> str:
    """A size in words, for messages."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
