import errno
import importlib.util
import os
import sys
import threading
import time
from pathlib import Path
from typing import Literal

import dask
import pytest
import torch
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError

from paperlib import cluster, store
from paperlib.grid import check_grid
from paperlib.job import Job
from paperlib.results import read_store
from paperlib.store import Store
from paperlib.sweep import SCHEDULER, sweep

RUNS = "PAPERLIB_TEST_RUNS"


def fit(p: int, seed: int, scale: float = 1.0, kind: Literal["relu", "tanh"] = "relu") -> dict:
    with open(os.environ[RUNS], "a") as runs:
        runs.write(f"{p} {seed}\n")
    if seed == 13:
        raise ValueError("thirteen")
    X = torch.randn(12, p, generator=torch.Generator().manual_seed(seed)) * scale
    theta = torch.linalg.lstsq(getattr(torch, kind)(X), torch.ones(12, 1)).solution
    return {"norm": theta.norm(), "sum": (X @ X.T).sum(), "threads": torch.get_num_threads()}


GRID = [{"p": p, "seed": seed} for p in (24, 48) for seed in range(3)]


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch):
    monkeypatch.setenv(RUNS, str(tmp_path / "runs"))
    monkeypatch.delenv(SCHEDULER, raising=False)

    def read() -> list[str]:
        path = tmp_path / "runs"
        return path.read_text().splitlines() if path.exists() else []

    return read


def run(grid, store, function=fit, **options):
    options = {"client": False, "progress": False, **options}
    return sweep(function, grid, store=store, **options)


def results(table):
    return [[repr(value) for value in row] for row in table.drop(columns="seconds").to_numpy()]


def test_table_is_in_the_order_of_the_grid(tmp_path):
    table = run(GRID[::-1], tmp_path / "s")
    assert [(row.p, row.seed) for row in table.itertuples()] == [
        (cell["p"], cell["seed"]) for cell in GRID[::-1]
    ]
    assert list(table.columns) == [
        *("p", "seed", "scale", "kind", "norm", "sum", "threads", "status", "error", "seconds")
    ]
    X = torch.randn(12, 48, generator=torch.Generator().manual_seed(2))
    assert table["sum"][0] == pytest.approx((X @ X.T).sum().item(), rel=1e-5)


def test_a_second_call_runs_only_what_is_missing(tmp_path, runs):
    run(GRID[:4], tmp_path / "s")
    table = run(GRID, tmp_path / "s")
    assert len(runs()) == 6 and (table["status"] == "ok").all()
    assert results(run(GRID, tmp_path / "s")) == results(table)
    assert len(runs()) == 6


def test_another_version_runs_again(tmp_path, runs):
    run(GRID[:2], tmp_path / "s")
    run(GRID[:2], tmp_path / "s", version="2")
    assert len(runs()) == 4
    run(GRID[:2], tmp_path / "s", version="2")
    assert len(runs()) == 4


def test_corrupt_and_half_written_records_are_run_again(tmp_path, runs):
    before = run(GRID, tmp_path / "s")
    store = Store(tmp_path / "s")
    first, second, third = (Path(store.file(key)) for key in store.keys()[:3])
    first.write_bytes(first.read_bytes()[:40])
    second.write_bytes(second.read_bytes().replace(b'"norm":', b'"norm":1'))
    third.rename(store.part(third.stem))
    with pytest.warns(UserWarning, match="2 corrupt"):
        after = run(GRID, tmp_path / "s")
    assert len(runs()) == 9
    assert results(after) == results(before)
    assert not list((tmp_path / "s").glob("*.part"))


def test_a_failed_cell_stops_no_other_and_is_retried_when_asked(tmp_path, runs):
    grid = [{"p": 24, "seed": 13}, *GRID]
    with pytest.warns(UserWarning, match="1 of 7 cells failed, first: ValueError: thirteen"):
        table = run(grid, tmp_path / "s")
    assert list(table["status"]) == ["failed"] + ["ok"] * 6
    assert "Traceback" in table["error"][0] and "in fit" in table["error"][0]
    with pytest.warns(UserWarning, match="1 of 7"):
        run(grid, tmp_path / "s")
    assert len(runs()) == 7
    with pytest.warns(UserWarning, match="1 of 7"):
        run(grid, tmp_path / "s", retry_failed=True, retries=2)
    assert len(runs()) == 10
    assert runs()[-3:] == ["24 13"] * 3


def test_of_two_that_retry_a_failed_cell_one_runs_it(tmp_path, runs):
    store = Store(tmp_path / "s")
    with pytest.warns(UserWarning):
        run([{"p": 24, "seed": 13}], store)
    (key,) = store.keys()
    seen = store.read(key)
    cell = check_grid(fit, [{"p": 24, "seed": 13}])[0]
    job = Job(fit, cell, seen["version"], str(store.path), store.id, 0, 1, supersedes=seen["id"])
    assert job.run()["id"] == job.run()["id"] != seen["id"]
    assert len(runs()) == 2


def bad_list(n):
    return [n]


def bad_value(n):
    return {"x": torch.zeros(3)}


def bad_name(n):
    return {"n": n}


def changes(n, items):
    items.append(n)
    return {"count": len(items)}


@pytest.mark.parametrize(
    ("function", "said"),
    [(bad_list, "must return a dict"), (bad_value, "tolist"), (bad_name, "another column")],
)
def test_results_that_make_no_table_fail_clearly(tmp_path, function, said):
    with pytest.warns(UserWarning, match="1 of 1"):
        table = run([{"n": 1}], tmp_path / "s", function)
    assert said in table["error"][0]


def test_the_record_keeps_the_parameters_that_were_asked_for(tmp_path):
    table = run([{"n": 1, "items": (1, 2)}], tmp_path / "s", changes)
    assert table["items"][0] == [1, 2] and table["count"][0] == 3


@pytest.mark.parametrize(
    ("cell", "error", "said"),
    [
        ({"p": 24, "sead": 1}, TypeError, "did you mean 'seed'"),
        ({"p": 24}, TypeError, r"grid\[6\] lacks the parameters \['seed'\]"),
        ({"p": 24, "seed": "1"}, TypeError, "must be int, got '1'"),
        ({"p": 24.5, "seed": 1}, TypeError, "must be int, got 24.5"),
        ({"p": True, "seed": 1}, TypeError, "must be int, got True"),
        ({"p": 24, "seed": 1, "scale": "1e-3"}, TypeError, "must be float, got '1e-3'"),
        ({"p": 24, "seed": 1, "kind": "gelu"}, TypeError, "Literal"),
        ({"p": 24, "seed": 1, "scale": object()}, TypeError, "scale"),
        ({"p": 24, "seed": 0}, ValueError, r"grid\[6\] is the same cell as grid\[0\]"),
        ({"p": 24, "seed": 0, "scale": 1}, ValueError, "the same cell"),
        ({"p": 7, "seed": 0}, ValueError, r"grid\[6\]: p must be even"),
        ([24, 0], TypeError, "dict of parameters"),
    ],
)
def test_a_wrong_cell_is_an_error_before_any_runs(tmp_path, runs, cell, error, said):
    def check(p, **_):
        if p % 2:
            raise ValueError(f"p must be even, got {p}")

    with pytest.raises(error, match=said):
        run([*GRID, cell], tmp_path / "s", check=check)
    assert runs() == [] and not (tmp_path / "s").exists()


def reserved(status):
    return {}


def positional(n, /):
    return {}


@pytest.mark.parametrize(
    ("function", "grid", "options", "error", "said"),
    [
        (fit, [], {}, ValueError, "at least one cell"),
        (fit, {"p": 1}, {}, TypeError, "list of dicts"),
        (reserved, [{"status": 1}], {}, ValueError, "column of every table"),
        (positional, [{"n": 1}], {}, TypeError, "by name"),
        (fit, GRID, {"workers": 0}, ValueError, "workers"),
        (fit, GRID, {"retries": -1}, ValueError, "retries"),
        (fit, GRID, {"threads": 1.5}, TypeError, "threads"),
        (fit, GRID, {"client": 5}, TypeError, "client"),
        (fit, GRID, {"client": "nonsense"}, ConnectionError, "nonsense"),
    ],
)
def test_wrong_use_is_an_error_before_any_runs(
    tmp_path, runs, function, grid, options, error, said
):
    with pytest.raises(error, match=said):
        run(grid, tmp_path / "s", function, **options)
    assert runs() == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be kept here")
def test_a_full_disk_is_told_and_costs_only_the_missing(tmp_path, runs, monkeypatch):
    run(GRID[:2], tmp_path / "s")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.warns(UserWarning, match="4 of 6 cells unsaved.*No space left"):
            table = run(GRID, tmp_path / "s")
    assert list(table["status"]) == ["ok"] * 2 + ["unsaved"] * 4
    assert len(runs()) == 2  # no work is done that could not be kept
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.warns(UserWarning, match="4 of 6 cells unsaved.*No space left"):
            table = run(GRID, tmp_path / "s")
    assert list(table["status"]) == ["ok"] * 2 + ["unsaved"] * 4
    assert table["norm"].notna().all()  # what was computed is handed over all the same
    assert len(os.listdir(tmp_path / "s")) == 3
    table = run(GRID, tmp_path / "s")
    assert (table["status"] == "ok").all() and len(runs()) == 10


def test_a_result_outlives_whatever_fails_after_it(tmp_path, runs, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    Store(tmp_path / "s")
    with monkeypatch.context() as patch:
        patch.setattr(store, "_sync_folder", fail)
        assert list(run(GRID[:1], tmp_path / "s")["status"]) == ["ok"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        patch.setattr(os, "unlink", fail)
        with pytest.warns(UserWarning, match="1 of 2 cells unsaved.*not saved"):
            table = run(GRID[:2], tmp_path / "s")
    assert table["norm"].notna().all() and not store._held
    assert list(run(GRID[:2], tmp_path / "s")["status"]) == ["ok"] * 2 and len(runs()) == 3


def test_a_worker_without_the_shared_folder_says_so(tmp_path, runs):
    store = Store(tmp_path / "here")
    cell = check_grid(fit, GRID[:1])[0]
    elsewhere = Job(fit, cell, "v", str(tmp_path / "there"), store.id, 0, 1).run()
    Store(tmp_path / "other")
    unshared = Job(fit, cell, "v", str(tmp_path / "other"), store.id, 0, 1).run()
    for record in (elsewhere, unshared):
        assert record["status"] == "unsaved" and "must see it" in record["error"]
    assert runs() == []


def test_what_another_process_runs_is_waited_for(tmp_path, runs):
    store = Store(tmp_path / "s")
    cells = check_grid(fit, GRID)
    claimed, release = threading.Event(), threading.Event()

    def other():
        with store.claim(cells[0].key) as claim:
            claimed.set()
            release.wait(60)
            record = Job(fit, cells[0], "v", str(store.path), store.id, 0, 1).record(
                "ok", {"norm": 1.0, "sum": 2.0, "threads": 1}
            )
            claim.write(record)

    thread = threading.Thread(target=other)
    thread.start()
    assert claimed.wait(60)
    threading.Timer(0.6, release.set).start()
    table = run(GRID, store)
    thread.join()
    assert table["norm"][0] == 1.0 and len(runs()) == 5


def test_threads_are_limited_and_given_back(tmp_path):
    torch.set_num_threads(2)
    assert list(run(GRID[:1], tmp_path / "one")["threads"]) == [1]
    assert list(run(GRID[:1], tmp_path / "own", threads=None)["threads"]) == [2]
    assert torch.get_num_threads() == 2


def test_a_finished_sweep_starts_no_processes(tmp_path, monkeypatch):
    first = run(GRID, tmp_path / "s")
    monkeypatch.setattr(cluster, "local_client", pytest.fail)
    monkeypatch.setattr(cluster, "client_at", pytest.fail)
    assert results(run(GRID, tmp_path / "s", client=None)) == results(first)
    assert results(run(GRID, tmp_path / "s", client="tcp://127.0.0.1:1")) == results(first)


def test_the_bar_counts_what_is_done(tmp_path, capsys, monkeypatch):
    run(GRID[:3], tmp_path / "s")
    run(GRID, tmp_path / "s", progress=True)
    assert "6/6" in capsys.readouterr().err
    monkeypatch.setenv("PAPERLIB_PROGRESS", "0")
    run(GRID, tmp_path / "t", progress=None)
    assert "6/6" not in capsys.readouterr().err


def die(n: int) -> dict:
    with open(os.environ[RUNS], "a") as runs:
        runs.write(f"{n}\n")
    if n == 1:
        os._exit(1)
    return {"pid": os.getpid()}


def place(n: int) -> dict:
    time.sleep(0.3)
    return {"devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()}


def test_three_workers_over_loopback_give_the_same_bits(tmp_path, runs, monkeypatch):
    grid = [*GRID, {"p": 24, "seed": 13}, {"p": 24, "seed": 3, "kind": "tanh"}]
    with pytest.warns(UserWarning):
        here = run(grid, tmp_path / "here")
    with cluster.local_client(len(grid), 3, threads=1, resources={"memory": 1}) as client:
        client.wait_for_workers(3)
        address = client.scheduler.address
        assert "127.0.0.1" in address
        with pytest.warns(UserWarning, match="1 of 8"):
            there = run(grid, tmp_path / "a", client=client, resources={"memory": 1})
        monkeypatch.setenv(SCHEDULER, address)
        with pytest.warns(UserWarning, match="1 of 8"):
            named = run(grid, tmp_path / "b", client=None)
        assert len(runs()) == 24
        # Sent out again by Dask, a recorded cell is read and not run.
        with pytest.warns(UserWarning, match="1 of 8"):
            run(grid, tmp_path / "b", client=address)
        assert len(runs()) == 24
    for other in (there, named):
        ours, theirs = here.drop(columns="error"), other.drop(columns="error")
        assert results(ours) == results(theirs) and list(here.columns) == list(other.columns)
    assert "ValueError: thirteen" in there["error"][6]


def test_a_cell_that_kills_its_workers_is_recorded_and_stops_no_other(tmp_path, runs):
    grid = [{"n": n} for n in range(4)]
    options = {"client": None, "workers": 2, "allowed_failures": 1}
    with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
        with pytest.warns(UserWarning, match="1 of 4 cells failed, first: KilledWorker: 2 workers"):
            table = run(grid, tmp_path / "s", die, **options)
    assert list(table["status"]) == ["ok", "failed", "ok", "ok"]
    assert runs().count("1") == 2 and len(runs()) == 5
    assert len(read_store(tmp_path / "s")) == 4


class Ended:
    def __init__(self, status, error):
        self.status, self.error = status, error

    def result(self):
        raise self.error


def test_a_broken_connection_is_no_outcome_and_a_job_that_cannot_start_is_an_error(tmp_path):
    store = Store(tmp_path / "s")
    job = Job(fit, check_grid(fit, GRID[:1])[0], "v", str(store.path), store.id, 0, 1)
    for broken in (
        Ended("finished", CommClosedError("closed while the record was on its way")),
        Ended("cancelled", FutureCancelledError("key", "scheduler-connection-lost")),
        Ended("lost", TimeoutError()),
    ):
        assert cluster._outcome(job, broken) is None
    with pytest.raises(RuntimeError, match="could not start.*no module"):
        cluster._outcome(job, Ended("error", ModuleNotFoundError("no module")))


def test_local_gpus_are_shared_out_one_each(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="this machine has"):
        run([{"n": 0}], tmp_path / "s", place, client=None, resources={"GPU": 99})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    grid = [{"n": n} for n in range(4)]
    table = run(grid, tmp_path / "s", place, client=None, resources={"GPU": 1})
    assert set(table["devices"]) == {"4", "7"}
    assert table.groupby("pid")["devices"].nunique().max() == 1


@pytest.fixture
def survival(monkeypatch):
    path = Path(__file__).parents[1] / "benchmarks" / "sweep_survival.py"
    spec = importlib.util.spec_from_file_location("sweep_survival", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sweep_survival", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_sweeps_survive_kills_of_worker_scheduler_driver_and_a_full_disk(survival):
    table = survival.survive(4, 30, seed=3, size=1, pairs=(1,), shown=False)
    events = table[table["kind"] != "whole"]
    assert len(events) == 4 and set(table[table["kind"] == "whole"]["finished"]) == {30}
    # Where two rounds end early a third is needed, whose drivers have no scheduler to lose.
    if "own" not in set(table["engine"]):
        assert set(events["kind"]) == {"worker", "scheduler", "driver", "disk"}
