"""Jobs on the workers of a Dask cluster, of this machine or of many."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import queue
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import dask
from distributed import Client, Future, KilledWorker, LocalCluster, WorkerPlugin
from distributed.comm import CommClosedError

from paperlib.job import POLL, Job
from paperlib.store import Store

if TYPE_CHECKING:
    from distributed import Scheduler, Worker


LOST = "the scheduler is lost; finished cells are kept, call again to run the others"

# What Dask raises when a future's, or any, connection to the scheduler breaks.
CANCELLED = (asyncio.CancelledError, concurrent.futures.CancelledError)
BROKEN = (*CANCELLED, CommClosedError, TimeoutError)


class OneGPUEach(WorkerPlugin):
    """Each local worker, also one that replaces a dead one, sees the GPUs of its own number."""

    name = "paperlib-one-gpu-each"

    def __init__(self, per_worker: int) -> None:
        """Give each worker that many GPUs."""
        self.per_worker = per_worker

    def setup(self, worker: Worker) -> None:
        """Choose the devices before the worker's first cell starts CUDA."""
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        first = int(worker.name) * self.per_worker
        mine = range(first, first + self.per_worker)
        devices = given.split(",") if given else None
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(
            devices[i] if devices else str(i) for i in mine
        )


@contextmanager
def local_client(
    cells: int, workers: int | None, *, threads: int | None, resources: Mapping[str, float] | None
) -> Iterator[Client]:
    """A client of a cluster of processes on this machine, one cell at a time in each.

    Raises:
        ValueError: if the machine has too few GPUs for what the cells ask for.
    """
    gpus = math.ceil((resources or {}).get("GPU", 0))
    if gpus:
        import torch

        room = torch.cuda.device_count() // gpus
        if (workers or 1) > room:
            raise ValueError(
                f"{workers or 1} workers of {gpus} GPUs each were asked for, "
                f"this machine has {torch.cuda.device_count()}"
            )
    else:
        room = max(1, (os.cpu_count() or 1) // (threads or 1))
    count = workers or min(room, cells)
    settings = {
        # A cell waits in the queue, not behind another on a worker that may die with both.
        "distributed.scheduler.worker-saturation": 1.0,
        # A cell that keeps the interpreter for minutes is not a dead worker; a dead process is
        # seen by its nanny.
        "distributed.scheduler.worker-ttl": None,
        # The bar is the sweep's; those of its cells would write over it.
        "distributed.nanny.pre-spawn-environ.PAPERLIB_PROGRESS": 0,
    }
    if threads is not None:
        for library in ("OMP", "MKL", "OPENBLAS"):
            settings[f"distributed.nanny.pre-spawn-environ.{library}_NUM_THREADS"] = threads
    with (
        dask.config.set(settings),
        LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            resources=dict(resources or {}),
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # any free port: two sweeps may run at once
        ) as cluster,
        Client(cluster) as client,
    ):
        if gpus:
            client.register_plugin(OneGPUEach(gpus))
        yield client


@contextmanager
def client_at(address: str) -> Iterator[Client]:
    """A client of the scheduler at an address such as "tcp://10.0.0.1:8786".

    Raises:
        ConnectionError: if none answers.
    """
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise ConnectionError(f"no scheduler answers at {address!r}: {error}") from error
    with client:
        yield client


@contextmanager
def _lost_if_broken() -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise ConnectionError(LOST) from error


def prepare_scheduler(client: Client, failures: int, resources: Mapping[str, float] | None) -> None:
    """Let a task outlive at least that many workers (Dask: 3), and see who could run a cell.

    A scheduler without fit workers is no error, for they may still come; a warning says so.
    """

    # Defined here, it travels whole: the scheduler's machine need not have paperlib.
    def prepare(dask_scheduler: Scheduler) -> list[dict[str, float]]:
        dask_scheduler.allowed_failures = max(failures, dask_scheduler.allowed_failures)
        return [dict(worker.resources) for worker in dask_scheduler.workers.values()]

    with _lost_if_broken():
        offers = client.run_on_scheduler(prepare)
    if not offers:
        warnings.warn("the scheduler has no workers yet: waiting for some", stacklevel=2)
    for name, amount in (resources or {}).items():
        if offers and not any(offer.get(name, 0) >= amount for offer in offers):
            warnings.warn(
                f"no worker offers {name}={amount:g} yet: waiting for one started with "
                f'--resources "{name}={amount:g}"',
                stacklevel=2,
            )


def run_jobs(
    client: Client, jobs: list[Job], *, resources: Mapping[str, float] | None = None
) -> Iterator[dict]:
    """Run jobs on the workers of a client; yields their records as they come.

    Raises:
        ConnectionError: if the scheduler is lost for longer than the client tries to reach it.
        RuntimeError: if a worker cannot load the function of a job.
    """
    finished: queue.SimpleQueue[Future] = queue.SimpleQueue()
    running: dict[str, tuple[Job, Future]] = {}
    waiting: list[tuple[float, Job]] = []  # cells to ask for again, and not before when

    def submit(some: list[Job]) -> None:
        if not some:
            return
        # A name of its own for each try: a name known to the scheduler is not run again.
        names = [f"{job.function.__name__}-{uuid.uuid4().hex}" for job in some]
        options = {"pure": False, "resources": dict(resources) if resources else None}
        for job, future in zip(some, client.map(Job.run, some, key=names, **options), strict=True):
            running[future.key] = job, future
            future.add_done_callback(finished.put)

    try:
        with _lost_if_broken():
            submit(jobs)
        while running or waiting:
            try:
                key = finished.get(timeout=POLL).key
            except queue.Empty:
                key = None
            if key is not None:
                job, future = running.pop(key)
                record = _outcome(job, future)
                if record is None:
                    waiting.append((time.monotonic() + POLL, job))
                else:
                    yield record
            if waiting and client.status == "running":
                due = [job for when, job in waiting if when <= time.monotonic()]
                waiting = [(when, job) for when, job in waiting if when > time.monotonic()]
                with _lost_if_broken():
                    submit(due)
            if client.status in ("closing", "closed"):
                raise ConnectionError(LOST)
    finally:
        if running and client.status == "running":
            with suppress(*BROKEN):  # what made us stop is what the caller is to see
                client.cancel([future for _, future in running.values()])


def _outcome(job: Job, future: Future) -> dict | None:
    """The record of a job that ended, None if it is to be asked for again."""
    try:
        return future.result()
    except CANCELLED:  # the scheduler is gone
        return None
    except KilledWorker as error:
        return _record_killed(job, error)
    except Exception as error:
        if future.status != "error":  # the connection broke while the record was on its way
            return None
        raise RuntimeError(f"a worker could not start {job.cell.parameters}: {error}") from error


def _record_killed(job: Job, error: KilledWorker) -> dict | None:
    """Record a cell as failed under which too many workers died."""
    text = (
        f"KilledWorker: {error.allowed_failures + 1} workers died while they had this cell; if "
        "the machine ran out of memory, use fewer workers"
    )
    record = job.record("failed", error=text)
    store = Store(job.folder)
    try:
        with store.claim(job.cell.key) as claim:
            if claim is None:
                return None
            done = job.recorded(store)
            if done is None:
                claim.write(record)
            return done or record
    except OSError as fault:
        return record | {"status": "unsaved", "error": f"not saved: {fault}\nafter\n{text}"}
