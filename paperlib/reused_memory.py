"""Memory for arrays that are made, used and forgotten one after another.

From the system it comes page by page, which takes longer than to draw the numbers that go into it.
"""

from __future__ import annotations

import weakref
from math import prod

import numpy as np
import torch
from torch import Tensor


class ReusedMemory:
    """Gives tensors, and takes their memory back once nothing refers to them or a part of them."""

    def __init__(self):
        """Begin with none."""
        self._free: list[np.ndarray] = []

    def take(self, *shape: int) -> Tensor:
        """A float32 tensor of that shape on the CPU, with whatever is in it."""
        count = prod(shape)
        found = next((k for k, memory in enumerate(self._free) if len(memory) >= count), None)
        # NumPy asks the system for large pages.
        memory = np.empty(count, dtype=np.float32) if found is None else self._free.pop(found)
        held = memory[:count]  # by the tensor, and by all that share its memory
        weakref.finalize(held, self._free.append, memory).atexit = False
        return torch.from_numpy(held).view(shape)
