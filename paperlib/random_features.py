"""Random features: phi(x) = act(V x) with V drawn once and never trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from paperlib.activations import Activation, activation
from paperlib.block_height import ROWS_PER_DRAW, default_block_rows, tile_rows
from paperlib.checks import check_count, check_device, check_dtype
from paperlib.feature_map import FeatureBlock, FeatureMap
from paperlib.gaussian_draws import fill
from paperlib.int8 import Int8Rows
from paperlib.memory import SHARE, bytes_of, free_bytes
from paperlib.random_feature_block import RandomFeatureBlock
from paperlib.reused_memory import ReusedMemory
from paperlib.streams import stream_seed

PLACEMENTS = ("auto", "resident", "streamed")


class RandomFeatures(FeatureMap):
    """phi(x) = act(V x) in R^p, V of shape (p, d) with i.i.d. N(0, 1/d) entries.

    The model of the paper's theorems (its Section 3). With U = X V^T (n, p), the products are
    phi = act(U), J dX = act'(U) * (dX V^T), J^T W = (act'(U) * W) V.
    """

    rounds_to_int8 = True
    gaussian_weights = True

    def __init__(
        self,
        d: int,
        p: int,
        activation: str | Activation = "relu",
        *,
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        block_rows: int | None = None,
        placement: str = "auto",
        group: ProcessGroup | None = None,
    ):
        """Describe V; it is drawn when it is first needed.

        Args:
            d: dimension of an input.
            p: number of features, which is the number of parameters of the model.
            activation: a name of `activation_names()` or an `Activation`.
            seed: seed of V. V depends on nothing else: not on the device, the dtype or the
                block height.
            device: where V lives; the CPU if not given.
            dtype: float32 (if not given) or float64. V is drawn in float32 in either case.
            block_rows: rows of V drawn and stored at a time, a multiple of 1024; as many as suit
                the device if not given.
            placement: "resident" keeps V on the device, "streamed" draws it again block by block
                in every pass, "auto" keeps it (in each dtype that is used) if it fits into the
                free memory, of which PAPERLIB_MEMORY=4GB and the like allow no more than that.
            group: a torch.distributed process group over which the features are split: every
                process holds its own blocks, and sums over features are all-reduced.

        Raises:
            ValueError: for d, p or block_rows that are not positive, a seed below 0 or of 2^63 or
                more, an unknown activation or placement, a device that is not there.
            TypeError: for a number that is not whole, or a dtype that is not a real floating type.
        """
        self.d = check_count("d", d)
        self.p = check_count("p", p)
        self.seed = check_count("seed", seed, least=0)
        stream_seed("V", self.seed)  # raises for one that is too large
        self.device = check_device(device)
        self.dtype = check_dtype(dtype)
        self.activation = _activation(activation)
        self.linear_coefficient = self.activation.linear_coefficient
        self.odd = self.activation.odd
        if block_rows is None:
            processes = 1 if group is None else group.size()
            block_rows = default_block_rows(self.device, self.p, self.d, processes=processes)
        check_count("block_rows", block_rows, least=0)
        if block_rows < ROWS_PER_DRAW or block_rows % ROWS_PER_DRAW:
            raise ValueError(
                f"block_rows must be a positive multiple of {ROWS_PER_DRAW}, got {block_rows}"
            )
        self.block_rows = block_rows
        if placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {PLACEMENTS}, got {placement!r}")
        self.placement = placement
        self.group = group
        self.starts = self._own_starts()
        self._resident: dict[torch.dtype, list[Tensor | Int8Rows]] = {}
        self._planned: frozenset[torch.dtype] | None = None

    def draw(self, start: int, stop: int, *, memory: ReusedMemory | None = None) -> Tensor:
        """Rows start, .., stop - 1 of V, float32 on the CPU; `start` on a draw's boundary.

        Args:
            start: first row.
            stop: row after the last.
            memory: where to put them.

        Raises:
            ValueError: for a start that is no multiple of `ROWS_PER_DRAW`.
        """
        if start % ROWS_PER_DRAW:
            raise ValueError(f"rows are drawn from multiples of {ROWS_PER_DRAW}, got {start}")
        draws = -(-(stop - start) // ROWS_PER_DRAW)
        memory = ReusedMemory() if memory is None else memory
        rows = memory.take(draws, ROWS_PER_DRAW * self.d)
        fill(rows, "V", self.seed, first=start // ROWS_PER_DRAW, std=self.d**-0.5)
        return rows.view(-1, self.d)[: stop - start]

    def _own_starts(self) -> range:
        """First rows of the blocks that this process holds: a range of neighbours."""
        blocks = -(-self.p // self.block_rows)
        if self.group is None:
            return range(0, self.p, self.block_rows)
        ranks, rank = self.group.size(), self.group.rank()
        if blocks < ranks:
            raise ValueError(
                f"{blocks} blocks of {self.block_rows} features cannot be split over {ranks} "
                "processes: use fewer processes or a smaller block_rows"
            )
        low, high = blocks * rank // ranks, blocks * (rank + 1) // ranks
        return range(low * self.block_rows, min(high * self.block_rows, self.p), self.block_rows)

    @property
    def held(self) -> slice:
        """Which of the p features this process holds."""
        return slice(self.starts[0], min(self.starts[-1] + self.block_rows, self.p))

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether V is resident in that dtype already."""
        return dtype in self._resident

    def keeps(self, dtype: torch.dtype, *, free: int | None = None) -> bool:
        """Whether V is (or would be, with `free` bytes of memory) resident in that dtype."""
        if dtype in self._resident:
            return True
        if free is None and self._planned is not None:
            return dtype in self._planned
        if self.placement != "auto":
            return self.placement == "resident"
        free = free_bytes(self.device) if free is None else free
        return bytes_of(dtype, self.features_held, self.d) <= SHARE * free

    def resident_formats(self, formats: Iterable[torch.dtype]) -> dict[torch.dtype, int]:
        """The formats in which V will be resident, and the bytes still to be allocated for each.

        They come in order of need; one that does not fit beside the earlier is streamed: drawn
        again, or rounded from another resident one, in every pass.
        """
        free, found = free_bytes(self.device), {}
        for dtype in dict.fromkeys(formats):
            size = 0 if self.holds(dtype) else bytes_of(dtype, self.features_held, self.d)
            if self.keeps(dtype, free=free):
                found[dtype] = size
                free -= size
        return found

    def reserve(self, dtypes: Iterable[torch.dtype] | None) -> None:
        """Keep V in these formats from their first use on, and in no other, whatever is free then.

        Whoever counts what an attack takes leaves room for these. None ends such a plan.
        """
        self._planned = None if dtypes is None else frozenset(dtypes)

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether V can be resident in that dtype, if need be in place of the model's own."""
        held = bytes_of(self.dtype, self.features_held, self.d) if self.holds(self.dtype) else 0
        return self.keeps(dtype, free=free_bytes(self.device) + held)

    def tile_rows(self, dtype: torch.dtype) -> int:
        """Rows of V in `dtype` that are handed out at a time."""
        return tile_rows(self.device, dtype, self.d, self.block_rows, own=self.dtype)

    def weight_blocks(
        self, *, dtype: torch.dtype | None = None
    ) -> Iterator[tuple[int, Tensor | Int8Rows]]:
        """Pairs (first row, rows of V) of the tiles of this process, in order.

        V is rounded to `dtype` and stored in it, and handed out in the format of the arithmetic
        that goes with it: float32 for float16, `Int8Rows` for int8.
        """
        for block in self.blocks(dtype=dtype):
            yield block.start, block.weights

    def _stored_tiles(self, dtype: torch.dtype | None) -> Iterator[tuple[int, Tensor | Int8Rows]]:
        """The same as they are stored."""
        dtype = self.dtype if dtype is None else dtype
        if dtype not in self._resident and self.keeps(dtype):
            self._resident[dtype] = [V for _, V in self._fresh_blocks(dtype)]
        if dtype in self._resident:
            blocks = zip(self.starts, self._resident[dtype], strict=True)
        else:
            blocks = self._fresh_blocks(dtype)
        rows = self.tile_rows(dtype)
        for first, V in blocks:
            for tile in V.split(rows):
                yield first, tile
                first += len(tile)

    def _fresh_blocks(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor | Int8Rows]]:
        """The blocks of this process, cast from V in the model's dtype or drawn.

        For 8 bits, the 16 of float16 are as good and are there at once.
        """
        kept = self._resident.get(self.dtype)
        if kept is None and dtype == torch.int8:
            kept = self._resident.get(torch.float16)
        memory = ReusedMemory()
        for k, start in enumerate(self.starts):
            if kept is None:
                V = self.draw(start, min(start + self.block_rows, self.p), memory=memory)
            else:
                V = kept[k].to(self.dtype)
            V = V.to(self.device)
            yield start, Int8Rows.of(V) if dtype == torch.int8 else V.to(dtype)

    def sum_over_processes(self, tensors: Sequence[Tensor]) -> None:
        """All-reduce partial sums over the processes that share the features, in place."""
        if self.group is not None:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor, group=self.group)

    def release(self, dtype: torch.dtype) -> None:
        """Forget the copy of V in that dtype; it is made again when it is next needed."""
        self._resident.pop(dtype, None)

    @property
    def V(self) -> Tensor:
        """The rows of V that this process holds, (p, d) without a group; a copy, for tests."""
        return torch.cat([V for _, V in self.weight_blocks()])

    def blocks(self, *, dtype: torch.dtype | None = None) -> Iterator[FeatureBlock]:
        """Blocks of `tile_rows` features each."""
        for start, V in self._stored_tiles(dtype):
            yield RandomFeatureBlock(start, V, self.activation, self.linear_coefficient)

    def describe(self) -> dict[str, Any]:
        """The arguments that build this feature map."""
        return {
            "model": "RandomFeatures",
            "d": self.d,
            "p": self.p,
            "activation": self.activation.name,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


_activation = activation
