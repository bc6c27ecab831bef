"""What an attack needs of a model: its feature map phi: R^d -> R^p, in blocks of features.

The solvers never see a model, only its features phi(X) and the two products with the Jacobians
J_i = d phi / d x (x_i). A feature map hands them out block by block, a block being a range of the
p features, so that nothing larger than (n, block height) has to exist at once and so that blocks
can be streamed or live on several processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from paperlib.checks import check_rows


class FeatureBlock(ABC):
    """The features start, .., stop - 1 of a feature map.

    Attributes:
        start: first feature of the block.
        stop: one past the last feature.
        weights: (stop - start, d), the rows v_k of V where the features are act(v_k . x); None
            for a general module. Only with weights can the linear part be lifted.
    """

    start: int
    stop: int
    weights: Tensor | None = None

    @abstractmethod
    def linearize(self, X: Tensor, *, lifted: bool = False) -> tuple[Tensor, Any]:
        """Features of the block at X, (n, h), and a state that `jvp` and `vjp` need.

        Args:
            X: (n, d) points.
            lifted: leave out the linear part mu_1 V x of the features.
        """

    def inputs(self, X: Tensor) -> Tensor | None:
        """What the features at X follow from by a few operations an entry, (n, h).

        The inputs u_ik = v_k . x_i of the activations where there are weights; None where only
        `linearize` gives the features.
        """
        return None

    def activate(self, inputs: Tensor, *, lifted: bool = False) -> tuple[Tensor, Any]:
        """The same as `linearize`, from `inputs`."""
        raise NotImplementedError

    def project(self, A: Tensor) -> Tensor:
        """A V^T, (m, h), for A of shape (m, d); only with weights."""
        raise NotImplementedError

    def combine(self, W: Tensor) -> Tensor:
        """W V, (m, d), for W of shape (m, h); only with weights."""
        raise NotImplementedError

    @abstractmethod
    def jvp(self, state: Any, dX: Tensor) -> Tensor:
        """Row i is J_i dx_i restricted to the block, (n, h)."""

    @abstractmethod
    def vjp(self, state: Any, W: Tensor) -> Tensor:
        """Row i is J_i^T w_i summed over the block, (n, d), for W of shape (n, h)."""

    @abstractmethod
    def slope_gram(self, state: Any) -> Tensor:
        """The matrix tr(J_i^T J_j) / d of the block, (n, n), or an estimate of it."""


class FeatureMap(ABC):
    """A feature map phi: R^d -> R^p with Jacobian products.

    Attributes:
        d: dimension of an input.
        p: number of features.
        dtype: dtype of the features.
        device: where they are computed.
        linear_coefficient: mu_1 of the activation when blocks carry weights, else 0.
        odd: whether phi(-x) = -phi(x), so that a sample is known only up to its sign.
        rounds_to_int8: whether `blocks` can round their weights to 8 bits.
        gaussian_weights: whether the weights are i.i.d. N(0, 1/d), never trained.
        projected_off: (r, p) orthonormal rows whose span was taken out of the features, if any.
        group: the processes that the features are split over, None for one process.

    Features act(v_k . x) with weights V, whose linear part can be lifted, are `RandomFeatures` or
    `GivenFeatures`: solvers ask those for their `activation` and for rows of V (`weight_blocks`).
    Any other feature map only has to hand out blocks.
    """

    d: int
    p: int
    dtype: torch.dtype
    device: torch.device
    linear_coefficient: float = 0.0
    odd: bool = False
    rounds_to_int8: bool = False
    gaussian_weights: bool = False
    projected_off: Tensor | None = None
    group: ProcessGroup | None = None

    @property
    def has_weights(self) -> bool:
        """Whether the features are act(v_k . x), with rows v_k that `weight_blocks` hands out."""
        return hasattr(self, "weight_blocks")

    @property
    def random_features(self) -> FeatureMap | None:
        """What these features are but for `projected_off`, where that has weights V."""
        return self if self.has_weights else None

    @property
    def held(self) -> slice:
        """Which of the p features this process holds: the columns of its blocks."""
        return slice(0, self.p)

    @property
    def features_held(self) -> int:
        """How many of the p features this process holds."""
        return self.held.stop - self.held.start

    @abstractmethod
    def blocks(self, *, dtype: torch.dtype | None = None) -> Iterator[FeatureBlock]:
        """The blocks that this process holds, in order, computing in `dtype` (default: own)."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What is needed to build the same feature map again, as plain values."""

    def sum_over_processes(self, tensors: Sequence[Tensor]) -> None:  # noqa: B027 - a hook
        """Add up partial sums in place where the features are split over processes."""

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether what does not depend on X can be kept in that dtype; nothing to keep fits."""
        return True

    def resident_formats(self, formats: Iterable[torch.dtype]) -> dict[torch.dtype, int]:
        """Which of these formats it will be kept in, and the bytes still to be allocated."""
        return {}

    def reserve(self, dtypes: Iterable[torch.dtype] | None) -> None:  # noqa: B027 - a hook
        """Keep it in these formats only; None ends such a plan."""

    def features(self, X: Tensor) -> Tensor:
        """phi(X), (n, p), for X of shape (n, d)."""
        check_rows("X", X, self)
        return self._gather(X, ((b, b.linearize(X)[0]) for b in self.blocks()))

    def jvp(self, X: Tensor, dX: Tensor) -> Tensor:
        """Jacobian-vector products, (n, p): row i is J_i dx_i."""
        check_rows("X", X, self)
        check_rows("dX", dX, self, rows=len(X))
        return self._gather(X, ((b, b.jvp(b.linearize(X)[1], dX)) for b in self.blocks()))

    def _gather(self, X: Tensor, parts: Iterable[tuple[FeatureBlock, Tensor]]) -> Tensor:
        """The blocks of all processes side by side, (n, p)."""
        whole = torch.zeros(len(X), self.p, dtype=self.dtype, device=self.device)
        for block, part in parts:
            whole[:, block.start : block.stop] = part
        self.sum_over_processes([whole])
        return whole

    def vjp(self, X: Tensor, W: Tensor) -> Tensor:
        """Vector-Jacobian products, (n, d): row i is J_i^T w_i, for W of shape (n, p)."""
        check_rows("X", X, self)
        check_rows("W", W, self, rows=len(X), columns=self.p)
        total = torch.zeros_like(X)
        for block in self.blocks():
            total += block.vjp(block.linearize(X)[1], W[:, block.start : block.stop])
        self.sum_over_processes([total])
        return total
