"""Which arithmetic the stages of a reconstruction use.

The bulk of the work needs few digits: candidates are found, duplicates merge and signs settle
long before the loss falls below 1e-5. The bulk stage computes features and Gauss-Newton products
in the fastest format of the device; the finish evaluates loss and gradient in the model's own
dtype and keeps the fast format for the products inside conjugate gradients only, which works like
iterative refinement.
"""

from __future__ import annotations

import torch

from paperlib.feature_map import FeatureMap

# Below this many multiplications a pass, conversion and launch overheads outweigh the gain.
WORTHWHILE = 5e8

# Loss at which rounding the features to the format begins to show.
FLOOR = {torch.bfloat16: 3e-4, torch.float32: 1e-12, torch.float64: 1e-26}

# Loss at which the bulk stage has done its work: no candidate moves far any more.
SETTLED = {torch.bfloat16: 3e-5, torch.float32: 1e-9, torch.float64: 1e-9}


def bulk_dtype(model: FeatureMap, candidates: int, bulk: str = "auto") -> torch.dtype:
    """The dtype of the bulk stage.

    Args:
        model: the feature map.
        candidates: how many candidates the bulk stage has.
        bulk: "auto", "bfloat16", "float32" or "float64".

    Raises:
        ValueError: for another name, or more digits than the model has.
    """
    named = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
    if bulk in named:
        if bulk == "float64" and model.dtype == torch.float32:
            raise ValueError("bulk='float64' needs a model of dtype float64, got float32")
        return named[bulk]
    if bulk != "auto":
        raise ValueError(f"bulk must be 'auto' or one of {sorted(named)}, got {bulk!r}")
    if not hasattr(model, "weight_blocks"):
        return model.dtype
    work = candidates * model.p * model.d
    if work < WORTHWHILE or not fast_bfloat16(model.device):
        return model.dtype if work < WORTHWHILE else torch.float32
    return torch.bfloat16


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Absent before torch 2.10 or so: then the safe answer is no.
        features = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False
