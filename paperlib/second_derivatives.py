"""What torch has no second derivative for, by the same functions of plain operations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class PlainHardsigmoid(nn.Module):
    """min(max(x + 3, 0), 6) / 6, which networks for phones gate their channels with."""

    def forward(self, x: Tensor) -> Tensor:
        """The same values, and derivatives of any order."""
        return nn.functional.relu6(x + 3) / 6


def differentiable_layers(module: nn.Module) -> nn.Module:
    """The module, with its layers of that kind replaced in place; itself, if it is one."""
    if isinstance(module, nn.Hardsigmoid):
        return PlainHardsigmoid().train(module.training)
    # Not `named_children`, which names a layer that is used twice once.
    for name, layer in list(module._modules.items()):
        if layer is not None:
            setattr(module, name, differentiable_layers(layer))
    return module


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Attention by plain operations: its fused kernels have no second derivative."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
