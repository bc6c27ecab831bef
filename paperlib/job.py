"""One cell of a sweep with all that a worker needs to run it once and record it."""

from __future__ import annotations

import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from paperlib.grid import RESERVED, Cell, plain
from paperlib.results import machine
from paperlib.store import Claim, CorruptRecord, Store

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

# Seconds between looks at a cell that another process is running.
POLL = 0.25


@dataclass(frozen=True)
class Job:
    """One cell with all that a worker needs to run it."""

    function: Callable[..., Mapping]
    cell: Cell
    version: str
    folder: str
    store_id: str
    retries: int
    threads: int | None
    supersedes: str | None = None  # the id of the failed record that this run is to replace

    def run(self) -> dict | None:
        """Run the cell unless it is recorded; its record, or None while another runs it.

        The status of the record is "ok", "failed" (the function raised), or "unsaved" (the
        record could not be written, and is in no store).
        """
        try:
            if not os.path.isfile(os.path.join(self.folder, "store.json")):
                raise OSError("the store's folder is not there: every worker must see it")
            store = Store(self.folder)
            if store.id != self.store_id:
                raise OSError("the store's folder is another one here: every worker must see it")
            with store.claim(self.cell.key) as claim:
                if claim is None:
                    return None
                done = self.recorded(store)
                return done if done is not None else self._run(claim)
        except OSError as error:
            return self.record("unsaved", error=f"not run: {type(error).__name__}: {error}")

    def recorded(self, store: Store) -> dict | None:
        """The record that makes running this cell needless."""
        try:
            record = store.read(self.cell.key)
        except CorruptRecord:
            return None
        return None if record is None or record["id"] == self.supersedes else record

    def _run(self, claim: Claim) -> dict:
        for attempt in range(1, self.retries + 2):
            # A copy: what the function does to its arguments is not to reach the record.
            parameters = plain(self.cell.parameters, "parameters")
            with threads_limited(self.threads):
                start = time.perf_counter()
                try:
                    results = self._checked(self.function(**parameters))
                    status, error = "ok", None
                except (Exception, SystemExit):
                    status, results, error = "failed", None, traceback.format_exc()
                seconds = time.perf_counter() - start
            record = self.record(status, results, error=error, seconds=seconds, attempts=attempt)
            if status == "ok":
                break
        try:
            claim.write(record)
        except OSError as error:
            lost = f"not saved: {type(error).__name__}: {error}"
            earlier = f"\nafter\n{record['error']}" if record["error"] else ""
            record |= {"status": "unsaved", "error": lost + earlier}
        return record

    def _checked(self, results: object) -> dict[str, object]:
        if not isinstance(results, Mapping):
            raise TypeError(f"the function must return a dict, got {type(results).__name__}")
        for name in results:
            if not isinstance(name, str):
                raise TypeError(f"the function must name its results by text, got {name!r}")
            if name in self.cell.parameters or name in RESERVED:
                raise ValueError(f"the result {name!r} is named like another column of the table")
        return plain(results, "results")

    def record(
        self,
        status: Literal["ok", "failed", "unsaved"],
        results: dict | None = None,
        *,
        error: str | None = None,
        seconds: float = 0.0,
        attempts: int = 0,
    ) -> dict:
        """What is kept of this cell."""
        return {
            "key": self.cell.key,
            "id": uuid.uuid4().hex,
            "version": self.version,
            "position": self.cell.position,
            "parameters": self.cell.parameters,
            "results": results or {},
            "status": status,
            "error": error,
            "seconds": seconds,
            "attempts": attempts,
            "finished": time.time(),
            "machine": machine(),
        }


@contextmanager
def threads_limited(threads: int | None) -> Iterator[None]:
    """PyTorch, BLAS and OpenMP with that many threads; with None, as they are."""
    if threads is None:
        yield
        return
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else None
    with _thread_pools(len(sys.modules)).limit(limits=threads):
        if torch:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if torch:
                torch.set_num_threads(before)


@lru_cache(maxsize=1)
def _thread_pools(modules: int) -> ThreadpoolController:
    """The thread pools of the libraries that are loaded: looked up again after imports only.

    Searching the process for them takes longer than all else that a cell costs beside its own time.
    """
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
