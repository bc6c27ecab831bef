"""Random streams, one for each purpose, so that equal seeds never give equal numbers.

Without the purpose, data drawn with seed 0 and candidates drawn with seed 0 would be the same
points, and an attack would start at its answer.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def stream_seed(purpose: str, seed: int, *, index: int = 0) -> int:
    """A 32-bit seed for that purpose; consecutive indices give consecutive, distinct seeds.

    Raises:
        ValueError: for a seed below 0 or of 2^63 or more.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be at least 0 and below 2^63, got {seed}")
    words = np.random.SeedSequence((zlib.crc32(purpose.encode()), seed)).generate_state(1)
    return (int(words[0]) + index) % 2**32


def stream(purpose: str, seed: int, *, index: int = 0) -> torch.Generator:
    """A CPU generator for that purpose and seed."""
    return torch.Generator().manual_seed(stream_seed(purpose, seed, index=index))
