"""Sweeps that survive: every cell of a grid is run once, on one machine or on many.

The store decides what has been done, Dask only who does it next. A worker runs a cell when it
holds the cell's claim and no record is there, and writes the record itself. So a cell that Dask
sends out again, or that a second driver asks for, is read, not run; and whatever is killed,
finished cells stay.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from paperlib.checks import check_count
from paperlib.grid import check_grid, experiment_version
from paperlib.job import POLL, Job
from paperlib.progress import progress_bar
from paperlib.results import tabulate
from paperlib.store import Store

if TYPE_CHECKING:
    import pandas
    from distributed import Client

SCHEDULER = "PAPERLIB_SCHEDULER"


def sweep(
    function: Callable[..., Mapping[str, object]],
    grid: Iterable[Mapping[str, object]],
    *,
    store: str | os.PathLike | Store | None = None,
    client: Client | str | Literal[False] | None = None,
    version: str = "auto",
    check: Callable[..., object] | None = None,
    workers: int | None = None,
    threads: int | None = 1,
    resources: Mapping[str, float] | None = None,
    retries: int = 0,
    retry_failed: bool = False,
    allowed_failures: int = 10,
    progress: bool | None = None,
) -> pandas.DataFrame:
    """Run `function(**cell)` once for every cell of `grid` and return one tidy table.

    Finished cells are read from `store`; only missing and corrupt ones are run. The whole grid is
    checked before anything runs. A cell that raises is recorded with its traceback and stops no
    other; it counts as done until `retry_failed=True`.

    A script that lets `sweep` start its own workers needs `if __name__ == "__main__":` around its
    top level, as every program that starts Python processes does. Notebooks do not.

    Args:
        function: the experiment; returns a dict of numbers, text, None, and lists and dicts of
            these. Everything it needs comes as parameters, seeds too.
        grid: the cells, dicts of parameters. Parameters left out take their defaults.
        store: folder of the records, seen by all workers; `sweeps/<name of function>` for None.
        client: who runs the cells. None: the scheduler named by the environment variable
            PAPERLIB_SCHEDULER if it is set, else processes on this machine (a Dask LocalCluster,
            started only if a cell is missing). An address or a `distributed.Client`: its workers,
            on any number of machines. False or "in-process": this process, one cell after another.
        version: version of the experiment, part of each cell's name; "auto" for a hash of the
            source of `function`. See `paperlib.grid.experiment_version`.
        check: called as `check(**cell)` on every cell first; raises for values without sense.
        workers: number of local processes; by default one for `threads` processor cores each, or
            one a GPU where `resources` asks for {"GPU": 1}.
        threads: threads that PyTorch and BLAS may use within a cell, None to leave them alone.
            The same number everywhere makes results the same bit for bit on one type of device.
        resources: what a cell takes of its worker, such as {"GPU": 1}; workers elsewhere offer it
            by `dask worker --resources "GPU=1"`.
        retries: how often a cell that raises is run again before it is recorded as failed.
        retry_failed: run cells again that are recorded as failed.
        allowed_failures: how many workers may die under a cell before it is recorded as failed.
        progress: show a progress bar with the time left; if None, unless PAPERLIB_PROGRESS=0 is
            set.

    Returns:
        A row for every cell in the order of the grid: parameters, results, `status` ("ok",
        "failed", or "unsaved" where the record could not be written), `error`, `seconds`.

    Raises:
        TypeError: before any cell runs, for parameters that are unknown, missing, of the wrong
            type, or not storable.
        ValueError: before any cell runs, for an empty grid, repeated cells, refused values.
        OSError: before any cell runs, if the store cannot be made.
        ConnectionError: if no scheduler answers, or it is lost. What is finished is kept: call
            again.
    """
    if workers is not None:
        check_count("workers", workers)
    if threads is not None:
        check_count("threads", threads)
    check_count("retries", retries, least=0)
    check_count("allowed_failures", allowed_failures, least=0)
    if client is None:
        client = os.environ.get(SCHEDULER) or None
    cells = check_grid(function, grid, version=version, check=check)
    version = experiment_version(function, version)
    if not isinstance(store, Store):
        store = Store(Path("sweeps") / function.__name__ if store is None else store)

    records, corrupt = store.read_all(cell.key for cell in cells)
    if corrupt:
        warnings.warn(f"{len(corrupt)} corrupt records will be run again", stacklevel=2)
    jobs = []
    for cell in cells:
        record = records.get(cell.key)
        if record is None or (retry_failed and record["status"] == "failed"):
            seen = None if record is None else record["id"]
            common = (version, str(store.path), store.id, retries, threads)
            jobs.append(Job(function, cell, *common, supersedes=seen))

    with (
        progress_bar(
            progress,
            total=len(cells),
            initial=len(cells) - len(jobs),
            unit="cell",
            smoothing=0.05,
        ) as bar,
        closing(_run_all(jobs, client, workers, threads, resources, allowed_failures)) as running,
    ):
        for record in running:
            records[record["key"]] = record
            bar.update()
    table = [records[cell.key] for cell in cells]
    _warn_of_faults(table)
    return tabulate(table)


def _run_all(
    jobs: list[Job],
    client: Client | str | Literal[False] | None,
    workers: int | None,
    threads: int | None,
    resources: Mapping[str, float] | None,
    allowed_failures: int,
) -> Iterator[dict]:
    """Run the jobs where the caller wants them run; yields their records as they come."""
    if not jobs:
        return
    if client is False or client == "in-process":
        yield from _run_here(jobs)
        return
    from paperlib import cluster

    if client is None:
        wanted = cluster.local_client(len(jobs), workers, threads=threads, resources=resources)
    elif isinstance(client, str):
        wanted = cluster.client_at(client)
    elif isinstance(client, cluster.Client):
        wanted = nullcontext(client)
    else:
        raise TypeError(f"client must be None, False, an address or a Client, got {client!r}")
    with wanted as connected:
        cluster.prepare_scheduler(connected, allowed_failures, resources)
        yield from cluster.run_jobs(connected, jobs, resources=resources)


def _run_here(jobs: list[Job]) -> Iterator[dict]:
    busy = jobs
    while busy:
        jobs, busy = busy, []
        for job in jobs:
            record = job.run()
            if record is None:
                busy.append(job)
            else:
                yield record
        if len(busy) == len(jobs):
            time.sleep(POLL)


def _warn_of_faults(table: list[dict]) -> None:
    """Say in one line each how many cells failed and how many could not be saved."""
    advice = {
        "failed": "see the column error; retry_failed=True runs them again",
        "unsaved": "make room or repair the store and call again: only these will run",
    }
    for status, what_to_do in advice.items():
        errors = [record["error"] for record in table if record["status"] == status]
        if errors:
            last = errors[0].strip().splitlines()[-1]
            message = f"{len(errors)} of {len(table)} cells {status}, first: {last} ({what_to_do})"
            warnings.warn(message, stacklevel=3)
