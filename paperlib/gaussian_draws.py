"""Many draws of normal numbers at once, each from a stream of its own, as torch would make them.

V is drawn anew in every pass where it does not fit the memory, and torch takes longer for it than
the products with it do. The kernel of `gaussian_draws.cpp` makes the same numbers. Without a
compiler, or should torch change how it draws, torch makes them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from paperlib.compiled import call, has
from paperlib.instructions import vector_instructions
from paperlib.streams import stream, stream_seed

SOURCE = "gaussian_draws.cpp"

# Numbers are made in groups of so many; torch makes what is left over otherwise.
GROUP = 16

# torch itself differs by 2e-6 standard deviations from processor to processor.
ROUNDING = 1e-5


def fill(rows: Tensor, purpose: str, seed: int, *, first: int, std: float) -> None:
    """Fill row k with N(0, std^2) numbers of the stream of that purpose and the index first + k.

    Args:
        rows: (draws, count), float32 on the CPU, contiguous.
        purpose: of the streams, see `stream`.
        seed: of the streams.
        first: index of the first.
        std: standard deviation.
    """
    if rows.shape[1] % GROUP == 0 and available():
        fill_by_kernel(rows, purpose, seed, first, std)
    else:
        fill_by_torch(rows, purpose, seed, first, std)


def fill_by_kernel(rows: Tensor, purpose: str, seed: int, first: int, std: float) -> None:
    """The same, by the kernel; see `available`."""
    call(SOURCE, "draw", stream_seed(purpose, seed, index=first), float(std), *rows.shape, rows)


def fill_by_torch(rows: Tensor, purpose: str, seed: int, first: int, std: float) -> None:
    """The same, by torch, a thread a draw."""

    def draw(k: int) -> None:
        rows[k].normal_(std=std, generator=stream(purpose, seed, index=first + k))

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(draw, range(len(rows))))


def compiles() -> bool:
    """Whether this machine has a kernel."""
    return vector_instructions(torch.device("cpu")) and has(SOURCE, "draw")


@lru_cache
def available() -> bool:
    """Whether this machine has a kernel, and it makes the numbers of torch."""
    if not compiles():
        return False
    ours, theirs = torch.empty(2, 2, 64 * GROUP, dtype=torch.float32, device="cpu")
    fill_by_kernel(ours, "V", 0, 0, 1.0)
    fill_by_torch(theirs, "V", 0, 0, 1.0)
    return torch.allclose(ours, theirs, rtol=0, atol=ROUNDING)
