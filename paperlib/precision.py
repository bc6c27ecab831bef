"""Which arithmetic the stages of a reconstruction use.

The bulk of the work needs few digits: candidates are found, duplicates merge and signs settle
long before the loss falls below 1e-5. The bulk stage computes features and Gauss-Newton products
in the fastest format of the device; the finish evaluates loss and gradient in the model's own
dtype and keeps the fast format for the products inside conjugate gradients only, which works like
iterative refinement.

What samples with a small |alpha| leave in the loss can lie below the rounding of bfloat16. Where
searches in it end and the finish does not explain the parameters, they go on in float32. With many
samples that is bound to happen, and they begin in float32 where bfloat16 is not much faster.

float16 is a way to store V, not to compute: it halves the memory on devices without fast
bfloat16. Rows of V are widened to float32 tile by tile, on their way into the product, and tiles
are small enough to stay in the cache; matrix units multiply them as they are, with sixteen digits
of the other factor (`few_rows.py`).

int8 is the other way round: for the products inside conjugate gradients only, in the bulk stage as
in the finish (see `int8.py`). Loss and gradient of the bulk stage are evaluated in float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from paperlib.feature_map import FeatureMap
from paperlib.instructions import bfloat16_units, fast_bfloat16, fast_int8, matrix_units

# Below this many multiplications a pass, conversion and launch overheads outweigh the gain.
WORTHWHILE = 5e8

# Rounding to 8 bits takes a few operations an entry of the features, next to 2 d of the product.
INT8_DIMENSION = 512

# Loss at which rounding the features to the format begins to show. At the samples it measures 1e-7
# to 2e-7 in float16, for all activations, and 2e-5 to 2e-4 in bfloat16, which rounds them too.
FLOOR = {torch.bfloat16: 3e-4, torch.float16: 2e-7, torch.float32: 1e-12, torch.float64: 1e-26}

# Loss at which the bulk stage has done its work: no candidate moves far any more.
SETTLED = {torch.bfloat16: 3e-5, torch.float16: 2e-7, torch.float32: 1e-9, torch.float64: 1e-9}

# The least of n random coefficients has a share of about 1 / n^3 in theta. With more samples, that
# is less than the loss at which bfloat16 settles.
FEW_SAMPLES = round(SETTLED[torch.bfloat16] ** (-1 / 3))


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The format in which features are computed where V is stored in `dtype`."""
    return torch.float32 if dtype in (torch.float16, torch.int8) else dtype


def storage(dtype: torch.dtype) -> torch.dtype:
    """The format in which the inputs X V^T wait for products in `dtype`."""
    return torch.float16 if dtype == torch.int8 else dtype


class Formats(NamedTuple):
    """What the bulk stage computes in.

    Attributes:
        bulk: the loss and its gradient.
        products: the Gauss-Newton products inside conjugate gradients, in the finish too.
    """

    bulk: torch.dtype
    products: torch.dtype


# All that the bulk stage can compute in.
CHOICES = [Formats(dtype, dtype) for dtype in FLOOR]
CHOICES += [Formats(dtype, torch.int8) for dtype in (torch.bfloat16, torch.float16, torch.float32)]


def bulk_formats(model: FeatureMap, n: int, candidates: int, bulk: str = "auto") -> Formats:
    """The formats of the bulk stage.

    Args:
        model: the feature map.
        n: how many samples.
        candidates: how many candidates the bulk stage has.
        bulk: "auto", "bfloat16", "float16" (V stored in it, arithmetic in float32), "float32",
            "float64", or "int8" (products in it; loss and gradient in float32). "auto" is
            bfloat16 where the device multiplies it fast, int8 where it multiplies that fast and d
            is large; elsewhere float32. A processor that has both takes int8 for the products,
            and for loss and gradient bfloat16 with few samples; with many, if it has no matrix
            units, float32. V is stored in float16 for float32 arithmetic if it fits the memory
            in that format only. What does not fit in bfloat16 may fit in int8, for the products,
            while V is drawn anew for loss and gradient. Where nothing of V fits, it is drawn in
            every pass and fewer digits gain no time: float32.

    Raises:
        ValueError: for another name, more digits than the model has, or int8 for a model whose
            weights cannot be rounded to it.
    """
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    named = {str(dtype).removeprefix("torch."): Formats(dtype, dtype) for dtype in dtypes}
    if bulk in named:
        if bulk == "float64" and model.dtype == torch.float32:
            raise ValueError("bulk='float64' needs a model of dtype float64, got float32")
        return named[bulk]
    if bulk not in ("auto", "int8"):
        names = sorted([*named, "int8"])
        raise ValueError(f"bulk must be 'auto' or one of {names}, got {bulk!r}")
    if bulk == "int8" and not model.rounds_to_int8:
        raise ValueError("bulk='int8' needs random features, whose weights can be rounded to it")
    if bulk == "auto":
        large = candidates * model.p * model.d >= WORTHWHILE
        if not model.has_weights or not large:
            return Formats(model.dtype, model.dtype)
        single = single_formats(model)
        sharp = n <= FEW_SAMPLES or bfloat16_units(model.device)
        half = fast_bfloat16(model.device) and model.fits(torch.bfloat16)
        if half and (sharp or single.products != torch.int8):
            int8 = multiplies_in_int8(model, torch.bfloat16)
            return Formats(torch.bfloat16, torch.int8 if int8 else torch.bfloat16)
        return single
    return single_formats(model, int8=True)


def single_formats(model: FeatureMap, *, int8: bool | None = None) -> Formats:
    """Loss and gradient of the bulk stage in float32.

    Args:
        model: the feature map.
        int8: whether products are in it; where that is fast, d is large and V fits, if None.
    """
    narrow = not model.fits(torch.float32) and model.fits(torch.float16)
    exact = torch.float16 if narrow else torch.float32
    if int8 is None:
        int8 = multiplies_in_int8(model, exact)
    return Formats(exact, torch.int8 if int8 else exact)


def search_products(device: torch.device, own: torch.dtype, multiplications: int) -> torch.dtype:
    """The format of products in a search in few dimensions; loss and gradient are in its own.

    Those tell samples with a small |alpha| from noise. 8 bits would take too long to round to.

    Args:
        device: of the search.
        own: dtype of the model.
        multiplications: of a pass of the search.
    """
    return torch.bfloat16 if multiplications >= WORTHWHILE and matrix_units(device) else own


def multiplies_in_int8(model: FeatureMap, exact: torch.dtype) -> bool:
    """Whether products in 8 bits are fast and fit beside V in the format of loss and gradient."""
    large = model.rounds_to_int8 and model.d >= INT8_DIMENSION
    if not large or not fast_int8(model.device):
        return False
    return torch.int8 in model.resident_formats([exact, torch.int8])


def agreed_formats(model: FeatureMap, formats: Formats) -> Formats:
    """These formats, if all processes that share the features would take them.

    Else those of the model: processes in different formats would take different steps.
    """
    votes = torch.zeros(len(CHOICES), dtype=torch.float64, device=model.device)
    votes[CHOICES.index(formats)] = 1
    model.sum_over_processes([votes])
    return formats if (votes > 0).sum() == 1 else Formats(model.dtype, model.dtype)
