"""How many rows of V are drawn, stored and multiplied at a time; no result depends on it."""

from __future__ import annotations

import torch

from paperlib import matrix_units
from paperlib.memory import bytes_of

# V is a function of (seed, draw index), each draw this many rows: part of the definition of V,
# so that it comes out the same whether it is resident, streamed or split over processes.
ROWS_PER_DRAW = 1024

CPU_ROWS = 8192

# Beside a processor, the host calls two dozen operations for a block in every product, and five
# dozen for a linearisation, at some microseconds each. With so many rows the arithmetic for a
# hundred samples outlasts that; with more, the arrays of a block would fill a small GPU.
ACCELERATOR_ROWS = 65_536

# Nor do rows that are drawn take more memory of the host than this, unless d is so large that
# CPU_ROWS do.
DRAWN_BYTES = 2**30

# On a CPU, rows of V are handed out in tiles of about this many bytes, so that the second product
# of a pass finds in the cache what the first has read. On a GPU the whole block is one tile, and
# for matrix units, whose kernels cut it themselves.
TILE_BYTES = 2**24
LEAST_TILE_ROWS = 256
# A tile in int8 has so many times the rows.
INT8_ROWS = 4


def default_block_rows(device: torch.device, p: int, d: int, *, processes: int = 1) -> int:
    """Rows of a block of V (p, d) if nobody asks for another height: whole draws.

    Processes that share the features get as many blocks each, and of one height but for the last.
    """
    most = CPU_ROWS
    if device.type != "cpu":
        within = _whole_draws(DRAWN_BYTES // bytes_of(torch.float32, d))
        most = max(most, min(within, ACCELERATOR_ROWS))
    if processes == 1:
        return most
    share = p // processes
    return _whole_draws(share // max(-(-share // most), 1))


def _whole_draws(rows: int) -> int:
    """The most rows up to so many that are whole draws, and one draw at least."""
    return max(rows // ROWS_PER_DRAW, 1) * ROWS_PER_DRAW


def tile_rows(
    device: torch.device, dtype: torch.dtype, d: int, block_rows: int, *, own: torch.dtype
) -> int:
    """Rows of V (p, d) of a tile in `dtype`, at most `block_rows`, for a model of dtype `own`."""
    units = dtype != torch.float64 and matrix_units.available()
    if device.type != "cpu" or units:
        return block_rows
    rows = TILE_BYTES // (bytes_of(own, d) * LEAST_TILE_ROWS) * LEAST_TILE_ROWS
    rows = max(rows, LEAST_TILE_ROWS) * (INT8_ROWS if dtype == torch.int8 else 1)
    return min(block_rows, rows)
