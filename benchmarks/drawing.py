"""What it takes to draw V anew, as every pass does where V does not fit the memory.

    python benchmarks/drawing.py [--d 3072] [--p 65536] [--threads 1 2] [--out results/drawing.csv]

By the kernel of this package and by torch, in memory that is used again and fresh from the system;
beside them, one reading of as many numbers. All take turns; the least of twelve rounds counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path

import pandas
import torch
from products import least_seconds

from paperlib import gaussian_draws
from paperlib.block_height import ROWS_PER_DRAW
from paperlib.results import save_table

KERNELS = {"own": gaussian_draws.fill_by_kernel, "torch": gaussian_draws.fill_by_torch}


def measure(p: int, d: int, threads: int) -> list[dict]:
    """A row for each way to draw V (p, d), and one for reading it."""
    torch.set_num_threads(threads)
    shape = p // ROWS_PER_DRAW, ROWS_PER_DRAW * d
    again = torch.zeros(shape)
    works: dict[Hashable, Callable[[], object]] = {("read", "used again"): again.sum}
    for name, kernel in KERNELS.items():
        draw = partial(kernel, purpose="V", seed=0, first=0, std=d**-0.5)
        works[name, "used again"] = partial(draw, again)
        works[name, "fresh"] = lambda draw=draw: draw(torch.empty(shape))
    took = least_seconds(works)
    return [
        {
            "by": name,
            "memory": memory,
            "p": p,
            "d": d,
            "threads": threads,
            "seconds": seconds,
            "nanoseconds a number": 1e9 * seconds / (p * d),
            "readings": seconds / took["read", "used again"],
        }
        for (name, memory), seconds in took.items()
    ]


def main() -> None:
    """Measure, save as rows come and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=3072)
    parser.add_argument("--p", type=int, default=65536)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not gaussian_draws.available():
        parser.error("there is no kernel here: it needs AVX2 and a C++ compiler")
    rows = []
    for threads in dict.fromkeys(options.threads):
        rows += measure(options.p, options.d, threads)
        if options.out:
            save_table(pandas.DataFrame(rows), options.out)
    print(pandas.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
