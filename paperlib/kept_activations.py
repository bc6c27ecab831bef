"""What one evaluation of the loss leaves for the passes after it, see `Linearization`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from paperlib.feature_map import FeatureBlock, FeatureMap
from paperlib.memory import INPUTS, NOTHING
from paperlib.precision import arithmetic, storage


class KeptActivations:
    """Features and Jacobian states of all blocks at n candidates, or what they follow from.

    Where there are weights, what is kept lies in whole arrays, one row a candidate: they are
    allocated at once, and later passes may cut them into tiles of another height. What modules
    keep lies block by block.
    """

    def __init__(self, model: FeatureMap, n: int, keep: str):
        """Nothing is kept yet.

        Args:
            model: the feature map.
            n: how many candidates there are.
            keep: "features and slopes", "inputs" or "nothing".
        """
        self.keep, self.n = keep, n
        self.first, self.width = model.held.start, model.features_held
        self.arrays: list[Tensor] = []
        self.parts: dict[int, tuple[Tensor, Any]] = {}

    def put(self, block: FeatureBlock, inputs: Tensor | None, features: Tensor, state: Any) -> None:
        """Keep a block; blocks come in order."""
        if inputs is None:
            self.parts[block.start] = features, state
            return
        if self.keep == NOTHING:
            return
        found = [inputs] if self.keep == INPUTS else [features, state]
        if not self.arrays:
            self.arrays = [part.new_empty(self.n, self.width) for part in found]
        for array, part in zip(self._cut(block), found, strict=True):
            array.copy_(part)

    def inputs(self, block: FeatureBlock, X: Tensor) -> Tensor | None:
        """X V^T of a block, (n, h), as it is kept or anew; None where what follows is kept."""
        if self.arrays:
            return self._cut(block)[0] if self.keep == INPUTS else None
        return None if block.start in self.parts else block.inputs(X)

    def open(self, block: FeatureBlock, X: Tensor, *, lifted: bool) -> tuple[Tensor, Any]:
        """Features of a block at the candidates X and the state of its Jacobian."""
        inputs = self.inputs(block, X)
        if inputs is not None:
            return block.activate(inputs, lifted=lifted)
        return tuple(self._cut(block)) if self.arrays else self.parts[block.start]

    def lower(self, dtype: torch.dtype) -> None:
        """Round what is kept to what products in `dtype` need."""
        kept = storage(dtype) if self.keep == INPUTS else arithmetic(dtype)
        for k in range(len(self.arrays)):  # one after another: both forms of one are there at once
            self.arrays[k] = self.arrays[k].to(kept)

    def forget(self) -> None:
        """Give everything up."""
        self.arrays, self.parts = [], {}

    def _cut(self, block: FeatureBlock) -> list[Tensor]:
        part = slice(block.start - self.first, block.stop - self.first)
        return [array[:, part] for array in self.arrays]
