import json
import math
import multiprocessing
import os
import subprocess
import sys
import textwrap
import time
from importlib import metadata

import numpy as np
import pandas as pd
import pytest
import torch

from paperlib.grid import cell_key, check_grid, experiment_version, from_json, plain, to_json
from paperlib.results import export_results, machine, read_store, save_table
from paperlib.store import CorruptRecord, Store
from paperlib.sweep import sweep

KEY = "0" * 64


def half(n: int, p: float, seed: int = 0, name: str | None = None) -> dict:
    if n == 3:
        raise ValueError("no room in /some/folder/data.bin")
    return {
        "value": n * p,
        "bound": math.inf,
        "curve": [seed, math.nan],
        "odd": n if n < 2 else None,
    }


GRID = [{"n": n, "p": 0.5} for n in range(5)]


@pytest.fixture
def filled(tmp_path):
    with pytest.warns(UserWarning, match="1 of 5 cells failed"):
        sweep(half, GRID, store=tmp_path / "store", client=False, progress=False)
    return tmp_path / "store"


def put(store: Store, key: str = KEY, **more) -> dict:
    record = {"key": key, "value": 1.5, **more}
    with store.claim(key) as claim:
        claim.write(record)
    return record


def test_values_round_trip_exactly():
    value = {
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf],
        "nested": {"a": [None, True, 2**80, "\u00e9\ud800"]},
    }
    assert repr(from_json(to_json(value))) == repr(value)
    assert math.isnan(from_json(to_json([math.nan]))[0])
    json.loads(to_json(value), parse_constant=pytest.fail)  # strict JSON: no NaN, no Infinity


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.float32(0.1), float(np.float32(0.1))),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (torch.tensor(2.5, requires_grad=True), 2.5),
        (np.array(3), 3),
        ((1, (2.0, "x")), [1, [2.0, "x"]]),
    ],
)
def test_scalars_of_arrays_become_plain(given, expected):
    found = plain(given, "x")
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "value", [object(), 1j, np.zeros(2), torch.zeros(2), {1: 2}, {"$float": 1}, b"x", {1}]
)
def test_what_cannot_be_kept_is_refused_by_name(value):
    with pytest.raises(TypeError, match="alpha"):
        plain([value], "alpha")


def test_key_follows_values_and_version_not_order():
    assert cell_key({"a": 1, "b": 2}, "v") == cell_key({"b": 2, "a": 1}, "v")
    others = [({"a": 1, "b": 3}, "v"), ({"a": 1, "b": 2}, "w"), ({"a": 1.0, "b": 2}, "v")]
    assert len({cell_key(*other) for other in [*others, ({"a": 1, "b": 2}, "v")]}) == 4


def version_of(source: str, tmp_path, monkeypatch, name: str) -> str:
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__(name)
    return experiment_version(module.f).split("#")[1]


def test_version_follows_the_code_alone(tmp_path, monkeypatch):
    first = version_of("def f(a):\n    return {'b': a + 1}\n", tmp_path, monkeypatch, "v_one")
    dressed = """
        def f(a):
            "Said."
            # and explained
            return {"b": (a + 1)}
    """
    assert version_of(dressed, tmp_path, monkeypatch, "v_two") == first
    assert version_of("def f(a):\n    return {'b': a + 2}\n", tmp_path, monkeypatch, "v_3") != first
    assert experiment_version(half, "7") == f"{half.__module__}.half@7"


def test_version_asks_where_it_cannot_tell():
    factor = 3

    def scaled(a):
        return {"b": factor * a}

    with pytest.raises(ValueError, match="factor"):
        experiment_version(scaled)
    with pytest.raises(ValueError, match="version"):
        experiment_version(lambda a: {"b": a})
    with pytest.raises(ValueError, match="version"):
        experiment_version(math.sqrt)
    with pytest.raises(TypeError, match="version"):
        experiment_version(half, 1)


def test_a_whole_number_for_a_float_is_the_same_cell():
    one, other = check_grid(half, [{"n": 1, "p": 1}]), check_grid(half, [{"n": 1, "p": 1.0}])
    assert one[0].key == other[0].key and type(one[0].parameters["p"]) is float
    assert one[0].parameters == {"n": 1, "p": 1.0, "seed": 0, "name": None}


def shares(known: tuple[float, ...] = (0.0, 1.0), sizes: tuple[int, str] = (1, "a")) -> dict:
    return {}


def test_so_are_whole_numbers_in_a_tuple_of_floats():
    one, other = (check_grid(shares, [{"known": known}])[0] for known in ([0, 1], (0.0, 1.0)))
    assert one.key == other.key and type(one.parameters["known"][1]) is float
    with pytest.raises(TypeError, match=r"'known'\] must be tuple\[float, ...\], got \['a'\]"):
        check_grid(shares, [{"known": ["a"]}])
    assert check_grid(shares, [{"sizes": (2, "b")}])[0].parameters["sizes"] == [2, "b"]


def test_record_is_read_as_written_and_leaves_nothing_else(tmp_path):
    store = Store(tmp_path)
    assert store.read(KEY) is None
    record = put(store)
    assert Store(tmp_path).read(KEY) == record and Store(tmp_path).id == store.id
    assert sorted(os.listdir(tmp_path)) == [f"{KEY}.json", "store.json"]


def test_every_cut_and_every_changed_byte_is_found(tmp_path):
    store = Store(tmp_path)
    put(store)
    whole = (tmp_path / f"{KEY}.json").read_bytes()
    broken = [whole[:length] for length in range(len(whole))]
    broken += [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))]
    for data in [*broken, whole + b" "]:
        (tmp_path / f"{KEY}.json").write_bytes(data)
        with pytest.raises(CorruptRecord):
            store.read(KEY)
    (tmp_path / f"{'1' * 64}.json").write_bytes(whole)
    with pytest.raises(CorruptRecord, match="holds the cell 0"):
        store.read("1" * 64)


def test_a_claim_is_for_one_alone_and_ends(tmp_path):
    store = Store(tmp_path)
    with store.claim(KEY) as mine:
        assert mine is not None
        with Store(tmp_path).claim(KEY) as other:
            assert other is None
    with store.claim(KEY) as again:
        assert again is not None
    assert os.listdir(tmp_path) == ["store.json"]


def hold(path, ready):
    with Store(path).claim(KEY) as claim:
        ready.put(claim is not None)
        time.sleep(60)


def test_a_claim_ends_with_its_killed_owner(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Queue()
    owner = context.Process(target=hold, args=(tmp_path, ready))
    owner.start()
    try:
        assert ready.get(timeout=60)
        with Store(tmp_path).claim(KEY) as claim:
            assert claim is None
    finally:
        owner.kill()
        owner.join()
    with Store(tmp_path).claim(KEY) as claim:
        assert claim is not None


def test_a_forked_child_does_not_keep_the_claim(tmp_path):
    store = Store(tmp_path)
    with store.claim(KEY):
        child = subprocess.Popen(["sleep", "60"], close_fds=False)
        fork = os.fork()
        if fork == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with store.claim(KEY) as claim:
            assert claim is not None
    finally:
        for pid in (child.pid, fork):
            os.kill(pid, 9)
            os.waitpid(pid, 0)


def race(path, barrier, count, keys):
    store, wins = Store(path), 0
    barrier.wait()
    for key in keys:
        while store.read(key) is None:
            with store.claim(key) as claim:
                if claim is not None and store.read(key) is None:
                    claim.write({"key": key, "by": os.getpid()})
                    wins += 1
    count.put(wins)


def test_of_many_only_one_writes(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, count = context.Barrier(4), context.Queue()
    keys = [f"{i:064d}" for i in range(60)]
    racers = [context.Process(target=race, args=(tmp_path, barrier, count, keys)) for _ in range(4)]
    for racer in racers:
        racer.start()
    assert sum(count.get(timeout=60) for _ in racers) == len(keys)
    for racer in racers:
        racer.join()
    assert Store(tmp_path).keys() == keys


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="room cannot be kept here")
def test_no_room_shows_before_and_leaves_no_trace(tmp_path):
    limited = """
        import resource, sys
        from paperlib.store import Store
        store = Store(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with store.claim("0" * 64) as claim:
                print("claimed")
        except OSError as error:
            print("refused", error.errno)
    """
    command = [sys.executable, "-c", textwrap.dedent(limited), str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith("refused")
    assert os.listdir(tmp_path) == ["store.json"]


def test_many_records_are_read_and_the_corrupt_named(tmp_path):
    store = Store(tmp_path)
    keys = [f"{i:064d}" for i in range(450)]
    for key in keys:
        put(store, key)
    (tmp_path / f"{keys[207]}.json").write_bytes(b"")
    records, corrupt = store.read_all([*store.keys(), "f" * 64])
    assert corrupt == [keys[207]]
    assert list(records) == keys[:207] + keys[208:]


def test_read_store_is_the_tidy_table(filled):
    table = read_store(filled)
    assert list(table["n"]) == [0, 1, 2, 3, 4]
    assert list(table.columns) == [
        *("n", "p", "seed", "name", "value", "bound", "curve", "odd"),
        *("status", "error", "seconds", "version"),
    ]
    assert list(table["status"]) == ["ok"] * 3 + ["failed", "ok"]
    assert "ValueError: no room" in table["error"][3]
    assert table["odd"].dtype == "Int64" and list(table["odd"].isna()) == [0, 0, 1, 1, 1]
    assert table["value"].dtype == float and table["bound"][0] == math.inf


def test_read_store_leaves_out_the_corrupt_and_says_so(filled):
    file = next(file for file in filled.glob("*.json") if file.name != "store.json")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="1 corrupt"):
        assert len(read_store(filled)) == 4


def test_read_store_tells_versions_apart(filled):
    sweep(half, GRID[:2], store=filled, client=False, progress=False, version="2")
    assert len(read_store(filled)) == 7
    assert len(read_store(filled, version=f"{half.__module__}.half@2")) == 2
    with pytest.raises(ValueError, match="half@2"):
        read_store(filled, version="half@3")


def test_read_store_asks_for_a_store(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a store"):
        read_store(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "store.json").write_text("")
    with pytest.raises(ValueError, match="damaged"):
        read_store(tmp_path)


def test_a_table_is_saved_with_its_machine_beside_it(tmp_path):
    table = pd.DataFrame({"n": [1, 2], "loss": [0.5, 1e-9]})
    save_table(table, tmp_path / "new" / "growth.csv")
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "new" / "growth.csv"), table)
    beside = json.loads((tmp_path / "new" / "growth.machine.json").read_text())
    assert beside == machine()
    assert sorted(os.listdir(tmp_path / "new")) == ["growth.csv", "growth.machine.json"]


@pytest.mark.parametrize("export", [False, True])
def test_a_table_that_cannot_be_replaced_stays(filled, tmp_path, monkeypatch, export):
    def save(rows):
        if export:
            return export_results(filled, tmp_path / "half.csv")
        return save_table(pd.DataFrame({"n": rows}), tmp_path / "half.csv")

    save([1])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    written = []

    def full_disk(descriptor):
        written.append(descriptor)
        if len(written) == 2:  # the first file is whole, but not yet in place
            raise OSError("no space left on device")

    sweep(half, GRID[:1], store=filled, client=False, progress=False, version="2")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save([1, 2])
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_export_holds_results_and_where_they_come_from(filled, tmp_path):
    beside = export_results(filled, tmp_path / "out" / "half.csv")
    text = (tmp_path / "out" / "half.csv").read_text()
    table = pd.read_csv(tmp_path / "out" / "half.csv")
    assert list(table["value"][:3]) == [0.0, 0.5, 1.0]
    assert table["error"][3] == "ValueError: no room in data.bin"
    assert json.loads(table["curve"][0])[0] == 0
    found = json.loads(beside.read_text())
    assert found["cells"] == 5 and found["status"] == {"failed": 1, "ok": 4}
    assert found["machines"][0]["cells"] == 5
    assert found["machines"][0]["libraries"]["torch"] == metadata.version("torch")
    for private in (str(tmp_path), "/some/folder", os.uname().nodename):
        assert private not in text and private not in beside.read_text()
    assert sorted(os.listdir(tmp_path / "out")) == ["half.csv", "half.provenance.json"]
