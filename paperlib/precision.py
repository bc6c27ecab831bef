"""Which arithmetic the stages of a reconstruction use.

The bulk of the work needs few digits: candidates are found, duplicates merge and signs settle
long before the loss falls below 1e-5. The bulk stage computes features and Gauss-Newton products
in the fastest format of the device; the finish evaluates loss and gradient in the model's own
dtype and keeps the fast format for the products inside conjugate gradients only, which works like
iterative refinement.

float16 is a way to store V, not to compute: it halves the memory on devices without fast
bfloat16. Rows of V are widened to float32 tile by tile, on their way into the product, and tiles
are small enough to stay in the cache.
"""

from __future__ import annotations

import torch

from paperlib.feature_map import FeatureMap

# Below this many multiplications a pass, conversion and launch overheads outweigh the gain.
WORTHWHILE = 5e8

# Loss at which rounding the features to the format begins to show.
FLOOR = {torch.bfloat16: 3e-4, torch.float16: 1e-6, torch.float32: 1e-12, torch.float64: 1e-26}

# Loss at which the bulk stage has done its work: no candidate moves far any more.
SETTLED = {torch.bfloat16: 3e-5, torch.float16: 3e-7, torch.float32: 1e-9, torch.float64: 1e-9}


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The format in which V stored in `dtype` is multiplied."""
    return torch.float32 if dtype == torch.float16 else dtype


def bulk_dtype(model: FeatureMap, candidates: int, bulk: str = "auto") -> torch.dtype:
    """The dtype of the bulk stage.

    Args:
        model: the feature map.
        candidates: how many candidates the bulk stage has.
        bulk: "auto", "bfloat16", "float16" (V stored in it, arithmetic in float32), "float32" or
            "float64". "auto" is bfloat16 where the device multiplies it fast; elsewhere float32,
            or float16 if V fits the memory in that format only.

    Raises:
        ValueError: for another name, or more digits than the model has.
    """
    formats = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    named = {str(dtype).removeprefix("torch."): dtype for dtype in formats}
    if bulk in named:
        if bulk == "float64" and model.dtype == torch.float32:
            raise ValueError("bulk='float64' needs a model of dtype float64, got float32")
        return named[bulk]
    if bulk != "auto":
        raise ValueError(f"bulk must be 'auto' or one of {sorted(named)}, got {bulk!r}")
    if not hasattr(model, "weight_blocks"):
        return model.dtype
    if candidates * model.p * model.d < WORTHWHILE:
        return model.dtype
    if fast_bfloat16(model.device):
        return torch.bfloat16
    fits = getattr(model, "keeps", lambda dtype: True)
    if not fits(torch.float32) and fits(torch.float16):
        return torch.float16
    return torch.float32


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Absent before torch 2.10 or so: then the safe answer is no.
        features = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False
