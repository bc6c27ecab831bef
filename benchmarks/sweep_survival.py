"""Kill what runs a sweep, at random moments, and hold the sweep to its promises.

    python benchmarks/sweep_survival.py [--kills 24] [--seed 0] [--out results/sweep_survival.csv]

Rounds of sweeps run on a Dask scheduler and three workers in processes of their own, or on the
driver's own workers. At random moments a worker, the scheduler or the driver gets signal 9, or
the disk of the store fills up; then the driver is started again, at times twice at once, until
the sweep is whole. Every cell notes when it starts and ends in a log. Then, for each round:

1. no finished cell is lost: a record seen once stays, byte for byte in the same file;
2. none is run twice: no cell starts after its record was written or while another process runs
   it, and one that ended again did so because its process was killed before the record was there;
3. the table equals, bit for bit, that of one undisturbed process.
"""

from __future__ import annotations

import argparse
import collections
import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pandas
import torch

from paperlib.results import machine
from paperlib.store import Store
from paperlib.sweep import sweep

LOG, FULL = "PAPERLIB_SURVIVAL_LOG", "PAPERLIB_SURVIVAL_FULL"
HERE = Path(__file__).resolve().parent
KINDS = {"cluster": ("worker", "scheduler", "driver", "disk"), "own": ("worker", "driver", "disk")}


# ------------------------------------------------------------------ what runs in the processes


def note(what: str, cell: str, run: str) -> None:
    """Append one line to the log, in one write, so that no kill leaves half of another's."""
    line = {"what": what, "cell": cell, "run": run, "pid": os.getpid(), "time": time.time()}
    descriptor = os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (json.dumps(line) + "\n").encode())
    os.close(descriptor)


def min_norm(n: int, p: int, seed: int) -> dict[str, object]:
    """Fit n random labels by p random ReLU features; long enough to be killed within."""
    cell, run = f"{n} {p} {seed}", uuid.uuid4().hex
    note("start", cell, run)
    draw = torch.Generator().manual_seed(seed)
    X = torch.randn(n, 12, generator=draw)
    Y = torch.randn(n, 1, generator=draw)
    features = torch.relu(X @ torch.randn(12, p, generator=draw))  # (n, p)
    theta = torch.linalg.lstsq(features, Y, driver="gelsd").solution  # (p, 1)
    time.sleep(0.1 + 0.05 * (seed % 7))
    residual = (features @ theta - Y).norm()
    note("end", cell, run)
    return {"residual": residual, "norm": theta.norm(), "first": theta[:3, 0].tolist()}


def grid(cells: int) -> list[dict[str, int]]:
    """That many cells of three sizes."""
    return [{"n": 10, "p": (8, 16, 40)[i % 3], "seed": i} for i in range(cells)]


def drive(store: str, cells: int, address: str | None, table: str) -> None:
    """Run or resume the sweep and save its table: the whole of a driver process."""
    found = sweep(min_norm, grid(cells), store=store, client=address, workers=2, progress=False)
    found.to_pickle(table)


def fake_full_disk() -> None:
    """Where no small disk can be mounted: every reservation fails while a flag file is there."""
    real = os.posix_fallocate

    def posix_fallocate(descriptor: int, offset: int, length: int) -> None:
        if os.path.exists(os.environ[FULL]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor, offset, length)

    os.posix_fallocate = posix_fallocate


if FULL in os.environ:
    fake_full_disk()


# ------------------------------------------------------------------ what starts and kills them


class Disk:
    """The disk of a store: a small one of its own where that can be mounted, else a fake."""

    def __init__(self, scratch: Path) -> None:
        """Mount it."""
        self.path = scratch / "disk"
        self.path.mkdir()
        self.flag = scratch / "full"
        command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(self.path)]
        try:
            self.real = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            self.real = False

    def environment(self) -> dict[str, str]:
        """What the processes need to know of it."""
        return {} if self.real else {FULL: str(self.flag)}

    def fill(self) -> None:
        """Leave no byte."""
        if not self.real:
            self.flag.touch()
            return
        with open(self.path / "ballast", "ab", buffering=0) as ballast:
            for size in (2**16, 1):
                try:
                    while True:
                        ballast.write(b"\0" * size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise

    def clear(self) -> None:
        """Make room again."""
        (self.path / "ballast" if self.real else self.flag).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it."""
        if self.real:
            subprocess.run(["umount", "-l", str(self.path)], check=True)


# Its process, where it saves its table, and where what it says goes.
Driver = tuple[subprocess.Popen, Path, Path]


@dataclass
class Processes:
    """The processes of one round, each the head of a group of its own."""

    environment: dict[str, str]
    scratch: Path
    cells: int
    size: int  # workers of the cluster
    pairs: tuple[int, ...]  # how many drivers may be started at once
    scheduler: subprocess.Popen | None = None
    address: str | None = None
    workers: list[subprocess.Popen] = field(default_factory=list)
    drivers: list[Driver] = field(default_factory=list)
    cut_off: list[Driver] = field(default_factory=list)  # their scheduler was killed

    def start(self, *command: str, output: Path | None = None) -> subprocess.Popen:
        """Start Python on a command."""
        with open(output or os.devnull, "wb") as sink:
            return subprocess.Popen(
                [sys.executable, *command],
                env=os.environ | self.environment,
                cwd=self.scratch,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def start_cluster(self) -> None:
        """A scheduler and workers, each with a nanny that replaces it when it dies."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"tcp://127.0.0.1:{port}"
        where = ("--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
        self.scheduler = self.start("-m", "distributed.cli.dask_scheduler", *where)
        wait_for(lambda: answers(port), "the scheduler")
        for _ in range(self.size):
            options = ("--nthreads", "1", "--no-dashboard", "--local-directory", str(self.scratch))
            command = ("-m", "distributed.cli.dask_worker", self.address, *options)
            self.workers.append(self.start(*command))

    def start_driver(self, store: Path) -> None:
        """One more driver."""
        name = uuid.uuid4().hex
        table, output = self.scratch / f"{name}.pickle", self.scratch / f"{name}.txt"
        call = f"drive({str(store)!r}, {self.cells}, {self.address!r}, {str(table)!r})"
        code = f"import sweep_survival\nif __name__ == '__main__': sweep_survival.{call}"
        script = self.scratch / f"{name}.py"
        script.write_text(code)
        self.drivers.append((self.start(str(script), output=output), table, output))

    def kill(self, process: subprocess.Popen) -> None:
        """Signal 9 to the head of a group alone."""
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    def some_driver_ended(self) -> bool:
        """Whether a driver is through, or gave up."""
        return any(process.poll() is not None for process, _, _ in self.drivers)

    def stop(self) -> None:
        """Signal 9 to all."""
        drivers = [process for process, _, _ in [*self.drivers, *self.cut_off]]
        for process in [*self.workers, *([self.scheduler] if self.scheduler else []), *drivers]:
            kill_group(process)


def answers(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def kill_group(process: subprocess.Popen) -> None:
    """Signal 9 to a process we started and all it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def alive(pid: int) -> bool:
    """Whether a process runs (and is not a zombie)."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def read_log(path: Path) -> list[dict]:
    """The lines of the log, in order of time."""
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted((json.loads(line) for line in lines), key=lambda line: line["time"])


def busy(log: Path) -> list[int]:
    """The processes that are within a cell."""
    lines = read_log(log)
    ended = {line["run"] for line in lines if line["what"] == "end"}
    open_runs = {line["pid"] for line in lines if line["run"] not in ended}
    return sorted(pid for pid in open_runs if alive(pid))


def wait_for(condition, what: str, seconds: float = 120.0) -> None:
    """Wait until something holds.

    Raises:
        TimeoutError: if it does not come to hold.
    """
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.02)


# ------------------------------------------------------------------ one round and what it shows


@dataclass
class Witness:
    """What has been seen of the records of a store."""

    store: Path
    seen: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    compared: int = 0

    def look(self) -> int:
        """Compare what is there with what was there; the number of whole records.

        Raises:
            AssertionError: if a finished cell is lost or written again.
        """
        now = {}
        if (self.store / "store.json").exists():
            store = Store(self.store)
            records, corrupt = store.read_all(store.keys())
            assert not corrupt, f"records found half-written: {corrupt}"
            for key in records:
                file = Path(store.file(key))
                now[key] = (file.stat().st_ino, file.read_bytes())
        for key, was in self.seen.items():
            assert key in now, f"finished cell {key} is lost"
            assert now[key] == was, f"finished cell {key} was written again"
            self.compared += 1
        self.seen = now
        return len(now)


def check_runs(log: Path, store: Path, cells: int) -> collections.Counter:
    """Hold the log to the promise that none is run twice.

    Raises:
        AssertionError: if it is broken.
    """
    lines, counts = read_log(log), collections.Counter()
    last_sign = {line["pid"]: line["time"] for line in lines}
    written = {}
    opened = Store(store)
    for key, record in opened.read_all(opened.keys())[0].items():
        named = " ".join(str(record["parameters"][name]) for name in ("n", "p", "seed"))
        written[named] = os.stat(opened.file(key)).st_mtime
        assert record["status"] == "ok"
    assert len(written) == cells
    by_cell = collections.defaultdict(list)
    for line in lines:
        by_cell[line["cell"]].append(line)
    assert by_cell.keys() == written.keys()
    for cell, its_lines in by_cell.items():
        starts = [line for line in its_lines if line["what"] == "start"]
        ends = {line["run"]: line for line in its_lines if line["what"] == "end"}
        counts["starts"] += len(starts)
        counts["ends"] += len(ends)
        assert starts[-1]["run"] in ends, f"{cell}: recorded, but its last run did not end"
        # 10 ms: the clock of file times is coarser than the log's.
        assert starts[-1]["time"] <= written[cell] + 0.01, f"{cell}: started when recorded"
        for earlier, later in zip(starts, starts[1:], strict=False):
            end = ends.get(earlier["run"])
            if end is not None:
                assert end["time"] <= later["time"], f"{cell}: run by two at once"
                # Its process was killed between the end of the cell and the record, so that it
                # never gave another sign.
                assert last_sign[earlier["pid"]] == end["time"], f"{cell}: run twice"
                assert not alive(earlier["pid"]), f"{cell}: run twice"
                counts["ended, killed before the record"] += 1
            else:
                sign = last_sign[earlier["pid"]]
                assert sign == earlier["time"], f"{cell}: given up by a live process"
                assert not alive(earlier["pid"]), f"{cell}: given up by a live process"
                counts["killed within the cell"] += 1
    return counts


def same(table: pandas.DataFrame, reference: pandas.DataFrame) -> bool:
    """Whether two tables are equal bit for bit, their times aside."""
    left, right = (
        t.drop(columns="seconds").to_json(double_precision=15) for t in (table, reference)
    )
    exact = all(
        [repr(value) for value in table[name]] == [repr(value) for value in reference[name]]
        for name in reference.columns.drop("seconds")
    )
    return left == right and exact and list(table.columns) == list(reference.columns)


def one_round(
    engine: str,
    kinds: list[str],
    cells: int,
    size: int,
    pairs: tuple[int, ...],
    reference: pandas.DataFrame,
    chance: random.Random,
) -> list[dict]:
    """Run one sweep to its end through some of `kinds`, which lose what has been done.

    Returns:
        A row for every event; the last also holds the counts of the log.
    """
    with places() as (scratch, disk):
        log, store = scratch / "log", disk.path / "store"
        environment = disk.environment() | {
            LOG: str(log),
            "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path[1:]]),
            "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "20s",
        }
        processes = Processes(environment, scratch, cells, size, pairs)
        witness, events = Witness(store), []
        try:
            if engine == "cluster":
                processes.start_cluster()
            processes.start_driver(store)
            since = 0  # lines of the log when the drivers were last started
            while not processes.some_driver_ended() and kinds:
                wait_for(
                    lambda since=since: processes.some_driver_ended() or len(read_log(log)) > since,
                    "a cell to start",
                )
                moment = time.monotonic() + chance.uniform(0.0, 1.0)
                wait_for(
                    lambda moment=moment: (
                        processes.some_driver_ended()
                        or (time.monotonic() > moment and (kinds[-1] != "worker" or busy(log)))
                    ),
                    "the moment",
                )
                if processes.some_driver_ended():
                    break
                event = strike(kinds[-1], engine, processes, disk, store, log, witness, chance)
                if event is None:
                    continue
                kinds.pop()
                since = len(read_log(log)) if event["drivers started"] else since
                events.append(event)
            tables = finish(processes.drivers)
            finish(processes.cut_off, lost=True)
            witness.look()
            for table in tables:
                assert (table["status"] == "ok").all(), table[["status", "error"]]
                assert same(table, reference), "the table is not that of an undisturbed run"
            counts = check_runs(log, store, cells)
            counts["records seen again unchanged"] = witness.compared
        finally:
            processes.stop()
        for event in events:
            event["full disk"] = "tmpfs" if disk.real else "fake"
        return [*events, {"engine": engine, "kind": "whole", "finished": cells, **counts}]


@contextmanager
def places() -> Iterator[tuple[Path, Disk]]:
    """A folder and a disk for one round."""
    scratch = Path(tempfile.mkdtemp(prefix="survival-"))
    disk = Disk(scratch)
    try:
        yield scratch, disk
    finally:
        disk.close()
        shutil.rmtree(scratch, ignore_errors=True)


def strike(
    kind: str,
    engine: str,
    processes: Processes,
    disk: Disk,
    store: Path,
    log: Path,
    witness: Witness,
    chance: random.Random,
) -> dict | None:
    """Let one thing happen, and start again what does not start itself; None if it could not."""
    event = {"engine": engine, "kind": kind, "finished": witness.look(), "drivers started": 0}
    event["within a cell"] = len(busy(log))
    if kind == "worker":
        victims = busy(log)
        if not victims:  # between two cells: another moment
            return None
        os.kill(chance.choice(victims), signal.SIGKILL)
        return event
    if kind == "disk":
        disk.fill()
        short = finish(processes.drivers)  # it ends, and says which cells could not be saved
        for table in short:
            unsaved = table[table["status"] == "unsaved"]
            assert set(table["status"]) <= {"ok", "unsaved"}, table
            assert unsaved["error"].str.contains("No space left on device").all(), table
            event["unsaved"] = max(event.get("unsaved", 0), len(unsaved))
        disk.clear()
    elif kind == "scheduler":
        # The workers are left to end their cells, if they do, while others ask for the same.
        processes.kill(processes.scheduler)
        processes.cut_off += processes.drivers
        processes.drivers.clear()
        processes.start_cluster()
    elif kind == "driver":
        for driver, _, _ in processes.drivers:
            processes.kill(driver)
        processes.drivers.clear()
    witness.look()
    event["drivers started"] = chance.choice(processes.pairs)
    for _ in range(event["drivers started"]):
        processes.start_driver(store)
    return event


def finish(drivers: list[Driver], *, lost: bool = False) -> list[pandas.DataFrame]:
    """Wait for drivers to end and forget them; their tables.

    Raises:
        AssertionError: if one does not end with a table, or, where its scheduler is lost, with
            neither a table nor a clear error.
    """
    tables = []
    for process, table, output in drivers:
        wait_for(lambda process=process: process.poll() is not None, "a driver to end")
        said = output.read_text()
        if process.returncode == 0:
            tables.append(pandas.read_pickle(table))
        else:
            assert lost and "ConnectionError" in said, said
        kill_group(process)
    drivers.clear()
    return tables


def survive(
    kills: int,
    cells: int,
    seed: int,
    *,
    size: int = 3,
    pairs: tuple[int, ...] = (1, 2),
    shown: bool = True,
) -> pandas.DataFrame:
    """Rounds until that many things have happened, the kinds in turn; a row for each.

    Raises:
        AssertionError: if a promise is broken.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ[LOG] = f"{scratch}/log"
        reference = sweep(min_norm, grid(cells), store=f"{scratch}/s", client=False, progress=False)
        del os.environ[LOG]
    rows: list[dict] = []
    done, number = 0, 0
    bags: dict[str, list[str]] = {engine: [] for engine in KINDS}
    while done < kills:
        engine = ("cluster", "cluster", "own")[number % 3]
        while len(bags[engine]) < 12:  # more than fit into a round; the rest is for the next
            bags[engine] = [*chance.sample(KINDS[engine], k=len(KINDS[engine])), *bags[engine]]
        start = time.monotonic()
        now = bags[engine][-(kills - done) :]
        del bags[engine][-(kills - done) :]
        events = one_round(engine, now, cells, size, pairs, reference, chance)
        bags[engine] += now
        number += 1
        done += len(events) - 1
        rows += [{"round": number, **event} for event in events]
        if shown:
            names = ", ".join(event["kind"] for event in events)
            print(
                f"round {number}, {engine}: {names}; {time.monotonic() - start:.0f} s", flush=True
            )
    return pandas.DataFrame(rows)


def main() -> None:
    """Run the rounds, print what was seen, and perhaps save it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--cells", type=int, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    table = survive(options.kills, options.cells, options.seed)
    happened = table[table["kind"].isin(KINDS["cluster"])]
    whole = table[table["kind"] == "whole"]
    print(f"{len(happened)} events: {happened['kind'].value_counts().to_dict()}")
    print(f"{len(whole)} rounds of {options.cells} cells, every table that of an undisturbed run")
    for name in whole.columns[list(whole.columns).index("starts") :]:
        if whole[name].notna().any() and name != "full disk":
            print(f"{name}: {int(whole[name].fillna(0).sum())}")
    if options.out:
        table.to_csv(options.out, index=False)
        options.out.with_suffix(".machine.json").write_text(json.dumps(machine(), indent=2) + "\n")


if __name__ == "__main__":
    main()
