"""How much autograd saves for the way back through a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(call: Callable[[], Tensor], weights: Iterable[Tensor]) -> tuple[int, Tensor]:
    """Bytes that autograd saves during a call, without the weights; and what the call returns.

    Tensors that share their memory count once.

    Args:
        call: runs the network on an input that requires a gradient.
        weights: tensors that are there in any case.
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = call()
    own = {tensor.untyped_storage().data_ptr() for tensor in weights}
    return sum(size for where, size in saved.items() if where not in own), out
