"""Features act(V x) with weights V that are given: the hidden layer of a trained network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from paperlib.activations import Activation, activation
from paperlib.block_height import default_block_rows, tile_rows
from paperlib.checks import check_count, check_dtype, check_finite
from paperlib.feature_map import FeatureBlock, FeatureMap
from paperlib.random_feature_block import RandomFeatureBlock

_activation = activation


class GivenFeatures(FeatureMap):
    """phi(x) = act(V x) in R^p for a given V (p, d).

    The products are those of `RandomFeatures`, so that the linear part can be lifted and the bulk
    of the work can run in bfloat16.
    """

    def __init__(
        self, V: Tensor, activation: str | Activation = "relu", *, block_rows: int | None = None
    ):
        """Keep a copy of V.

        Args:
            V: (p, d) weights, float32 or float64.
            activation: a name of `activation_names()` or an `Activation`.
            block_rows: rows of V used at a time, at most: on a CPU, as many as fit its cache; as
                suits the device if not given.

        Raises:
            TypeError: if V is not a tensor of float32 or float64.
            ValueError: for another shape, values that are not finite, an unknown activation.
        """
        if not isinstance(V, Tensor):
            raise TypeError(f"V must be a torch tensor, got {type(V).__name__}")
        if V.ndim != 2 or 0 in V.shape:
            raise ValueError(f"V must have shape (p, d), got {tuple(V.shape)}")
        self.p, self.d = V.shape
        self.dtype = check_dtype(V.dtype)
        self.device = V.device
        self.activation = _activation(activation)
        self.linear_coefficient = self.activation.linear_coefficient
        self.odd = self.activation.odd
        if block_rows is None:
            block_rows = default_block_rows(self.device, self.p, self.d)
        self.block_rows = check_count("block_rows", block_rows)
        self.V = check_finite("V", V.detach().clone())
        self._copies: dict[torch.dtype, Tensor] = {self.dtype: self.V}

    def weight_blocks(self, *, dtype: torch.dtype | None = None) -> Iterator[tuple[int, Tensor]]:
        """Pairs (first row, rows of V) in order, in the format of the arithmetic."""
        for block in self.blocks(dtype=dtype):
            yield block.start, block.weights

    def _stored_tiles(self, dtype: torch.dtype | None) -> Iterator[tuple[int, Tensor]]:
        """The same as they are stored."""
        dtype = self.dtype if dtype is None else dtype
        if dtype not in self._copies:
            self._copies[dtype] = self.V.to(dtype)
        height = tile_rows(self.device, dtype, self.d, self.block_rows, own=self.dtype)
        starts = range(0, self.p, height)
        yield from zip(starts, self._copies[dtype].split(height), strict=True)

    def release(self, dtype: torch.dtype) -> None:
        """Forget the copy of V in that dtype; its own dtype stays."""
        if dtype != self.dtype:
            self._copies.pop(dtype, None)

    def blocks(self, *, dtype: torch.dtype | None = None) -> Iterator[FeatureBlock]:
        """Blocks of at most `block_rows` features each."""
        for start, V in self._stored_tiles(dtype):
            yield GivenFeatureBlock(start, V, self.activation, self.linear_coefficient)

    def describe(self) -> dict[str, Any]:
        """Sizes, and a checksum that tells whether V is the same."""
        digest = hashlib.sha256(self.V.cpu().contiguous().numpy().tobytes())
        return {
            "model": "GivenFeatures",
            "d": self.d,
            "p": self.p,
            "activation": self.activation.name,
            "sha256": digest.hexdigest()[:16],
            "dtype": str(self.dtype).removeprefix("torch."),
        }


class GivenFeatureBlock(RandomFeatureBlock):
    """The features act(v_k . x) of given rows v_k, which may differ in length."""

    def slope_gram(self, state: Tensor) -> Tensor:
        """sum_k act'(u_ik) act'(u_jk) ||v_k||^2 / d, (n, n)."""
        wide = state if state.dtype == torch.float64 else state.float()
        squares = self.weights.to(wide.dtype).square().sum(1)
        return (wide * squares) @ wide.T / self.weights.shape[1]
