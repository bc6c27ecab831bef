"""What a sweep costs beside its cells: time per cell, and time to open a store of many cells.

    python benchmarks/sweep_overhead.py [--cells 500] [--stored 10000] [--out results.csv]

Each cell takes a fixed time asleep, so that the overhead is what the wall clock shows beyond it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import pandas

from paperlib.cluster import local_client
from paperlib.results import machine, read_store
from paperlib.store import Store
from paperlib.sweep import sweep


def asleep(index: int, pause: float) -> dict[str, float]:
    """One cell that does nothing for a while."""
    time.sleep(pause)
    return {"square": float(index) ** 2, "text": "some result", "curve": [0.1] * 20}


def overhead(cells: int, pause: float, *, workers: int, folder: Path) -> float:
    """Seconds of a worker's time for each cell beyond the cell's own."""
    grid = [{"index": i, "pause": pause} for i in range(cells)]
    if workers == 0:
        start = time.perf_counter()
        table = sweep(asleep, grid, store=folder, client=False, progress=False)
        wall = time.perf_counter() - start
    else:
        with local_client(cells, workers, threads=1, resources=None) as client:
            client.wait_for_workers(workers)
            client.gather(client.map(warm, range(workers * 4), pure=False))
            start = time.perf_counter()
            table = sweep(asleep, grid, store=folder, client=client, progress=False)
            wall = time.perf_counter() - start
    assert (table["status"] == "ok").all() and len(table) == cells
    return wall * max(workers, 1) / cells - table["seconds"].mean()


def whole_call(cells: int, pause: float, *, folder: Path) -> float:
    """Wall-clock seconds a cell of `sweep` as called by default, start of its processes included.

    The cells' own time is what it would be were they shared evenly by the processes.
    """
    grid = [{"index": i, "pause": pause} for i in range(cells)]
    start = time.perf_counter()
    table = sweep(asleep, grid, store=folder, progress=False)
    wall = time.perf_counter() - start
    assert (table["status"] == "ok").all() and len(table) == cells
    return (wall - table["seconds"].sum() / os.cpu_count()) / cells


def warm(_: int) -> None:
    """Have a worker import what its first cell would."""
    import paperlib.job  # noqa: F401

    time.sleep(0.1)


def forget(folder: Path) -> None:
    """Drop the records from the page cache, as after a restart."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def openings(stored: int, folder: Path) -> dict[str, float]:
    """Median seconds to open a store of that many cells by each of the ways there are."""
    grid = [{"index": i, "pause": 0.0} for i in range(stored)]
    sweep(asleep, grid, store=folder, client=False, progress=False)
    assert len(Store(folder).keys()) == stored

    def again() -> pandas.DataFrame:
        return sweep(asleep, grid, store=folder, client=False, progress=False)

    def read() -> pandas.DataFrame:
        return read_store(folder)

    def timed(function, cold: bool) -> float:
        times = []
        for _ in range(5):
            if cold:
                forget(folder)
            start = time.perf_counter()
            table = function()
            times.append(time.perf_counter() - start)
            assert len(table) == stored
        return statistics.median(times)

    return {
        "read_store, files in memory": timed(read, False),
        "read_store, files on disk": timed(read, True),
        "sweep with nothing missing": timed(again, False),
    }


def main() -> None:
    """Measure, print and perhaps save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--stored", type=int, default=10_000)
    parser.add_argument("--pause", type=float, default=0.02)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        for workers in (0, 1, 2):
            name = f"{workers} Dask workers" if workers else "in-process"
            cost = overhead(
                options.cells, options.pause, workers=workers, folder=Path(scratch, f"o{workers}")
            )
            rows.append((f"overhead per cell, {name}", options.cells, cost, 0.05))
            print(f"{rows[-1][0]}: {1e3 * cost:.2f} ms over {options.cells} cells", flush=True)
        cost = whole_call(options.cells, options.pause, folder=Path(scratch, "default"))
        rows.append(("overhead per cell, default call with start", options.cells, cost, 0.05))
        print(f"{rows[-1][0]}: {1e3 * cost:.2f} ms over {options.cells} cells", flush=True)
        for name, seconds in openings(options.stored, Path(scratch, "stored")).items():
            rows.append((f"opening, {name}", options.stored, seconds, 2.0))
            print(f"{rows[-1][0]}: {seconds:.3f} s for {options.stored} cells", flush=True)
    table = pandas.DataFrame(rows, columns=["quantity", "cells", "seconds", "bound"])
    kind = machine()
    table["processor"], table["cores"] = kind["processor"], kind["cores"]
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
