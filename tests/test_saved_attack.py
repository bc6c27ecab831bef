"""Attacks that are stopped at any step and go on."""

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from torch import nn

import paperlib
from paperlib import memory, saved_attack
from paperlib.activations import activation
from paperlib.lift import Lift

PUBLISHED = {"solver": "published", "learning_rate": 10.0, "max_steps": 1500, "restarts": 2}

# Name: p / (d n) and options, for each kind of start.
KINDS = {
    "searches": (5.0, {"start": "subspace"}),
    "random": (3.0, {"start": "random"}),
    "messages": (1.6, {}),
    "published": (10.0, PUBLISHED),
}


class Killed(Exception):
    """Stands for whatever ends a process between two steps."""


@pytest.fixture
def at_once(monkeypatch):
    """Write after every step."""
    monkeypatch.setattr(saved_attack, "INTERVAL", 0.0)


def problem(ratio, n=5, d=30):
    data = paperlib.sphere(n, d, 0)
    model = paperlib.RandomFeatures(d, round(ratio * d * n), "relu", seed=0)
    return data, model, paperlib.fit_min_norm(model, data.X, data.y)


def killed_after(steps):
    """A callback that ends the attack after so many steps."""
    seen = []

    def callback(*step):
        seen.append(step)
        if len(seen) > steps:
            raise Killed

    return callback


@pytest.mark.parametrize("kind", KINDS)
def test_an_attack_goes_on_from_any_step(kind, tmp_path, at_once):
    ratio, options = KINDS[kind]
    data, model, theta = problem(ratio)
    whole = paperlib.reconstruct(model, theta, data.n, **options)
    assert whole.explained
    total = len(whole.history)
    for k in sorted({0, 1, total // 4, total // 2, 3 * total // 4, total - 2}):
        folder = tmp_path / str(k)
        with pytest.raises(Killed):
            paperlib.reconstruct(
                model, theta, data.n, resume=folder, callback=killed_after(k), **options
            )
        on = paperlib.reconstruct(model, theta, data.n, resume=folder, **options)
        assert on.explained, (k, on)
        assert paperlib.compare(data.X, on.samples).recovered() == data.n
        assert sum(stage["passes"] for stage in on.stages) <= on.passes


@pytest.mark.parametrize("kind", ["searches", "random"])
def test_an_attack_that_is_killed_at_every_step_ends_all_the_same(kind, tmp_path, at_once):
    ratio, options = KINDS[kind]
    data, model, theta = problem(ratio)
    record, kills = None, 0
    while record is None:
        try:
            record = paperlib.reconstruct(
                model, theta, data.n, resume=tmp_path, callback=killed_after(3), **options
            )
        except Killed:
            kills += 1
            assert kills < 200
    assert kills >= 3
    assert record.explained
    assert paperlib.compare(data.X, record.samples).recovered() == data.n
    cut_off = [stage for stage in record.stages if stage["ended"] == "interrupted"]
    assert len(cut_off) == kills
    # Every step that was taken is on record, but the last of each process.
    assert len(record.history) >= 3 * kills


def test_the_published_descent_goes_on_as_if_nothing_had_been(tmp_path, at_once):
    ratio, options = KINDS["published"]
    data, model, theta = problem(ratio)
    options = options | {"max_steps": 150}
    whole = paperlib.reconstruct(model, theta, data.n, **options)
    assert len(whole.stages) == 2  # two restarts
    for k in (40, 199):
        with pytest.raises(Killed):
            paperlib.reconstruct(
                model, theta, data.n, resume=tmp_path / f"{k}", callback=killed_after(k), **options
            )
        on = paperlib.reconstruct(model, theta, data.n, resume=tmp_path / f"{k}", **options)
        assert torch.equal(on.samples, whole.samples)
        assert [h["loss"] for h in on.history] == [h["loss"] for h in whole.history]
        assert on.passes == whole.passes


def test_a_stopped_attack_does_not_start_over(tmp_path, at_once):
    data, model, theta = problem(3.0)
    losses = []

    def watch(stage, loss, X):
        losses.append(loss)
        if loss < 1e-2:
            raise Killed

    with pytest.raises(Killed):
        paperlib.reconstruct(model, theta, data.n, start="random", resume=tmp_path, callback=watch)
    begun = losses[0]
    on = paperlib.reconstruct(model, theta, data.n, start="random", resume=tmp_path)
    first = next(i for i, h in enumerate(on.history) if h["loss"] == losses[-2])
    assert on.history[first + 1]["loss"] < 0.1 * begun


def test_what_went_on_in_float32_does_not_fall_back_to_bfloat16(
    faint_pair, monkeypatch, tmp_path, at_once
):
    model, X, theta = faint_pair(0)
    options = {"start": "subspace", "bulk": "bfloat16", "restarts": 1, "resume": tmp_path}
    seen = []

    def kill_in_float32(stage, loss, candidates):
        seen.append(stage)
        if stage == "bulk" and "finish" in seen:
            raise Killed

    with pytest.raises(Killed):
        paperlib.reconstruct(model, theta, 8, callback=kill_in_float32, **options)
    lifts = []

    def watched(*problem, dtype):
        lifts.append(dtype)
        return Lift(*problem, dtype=dtype)

    monkeypatch.setattr("paperlib.second_order.Lift", watched)
    found = paperlib.reconstruct(model, theta, 8, **options)
    assert found.explained and paperlib.compare(X, found.samples).signed.max() < 1e-3
    assert lifts == [torch.float32]
    descents = [stage for stage in found.stages if stage["stage"] in ("bulk", "finish")]
    names = [stage["stage"] for stage in descents]
    later = descents[names.index("finish") + 1 :]
    assert "interrupted" in [stage["ended"] for stage in later]
    assert {stage["dtype"] for stage in later} == {"float32"}


def test_where_float32_does_not_fit_any_more_a_stopped_attack_goes_on_in_bfloat16(
    faint_pair, monkeypatch, tmp_path, at_once
):
    model, X, theta = faint_pair(0)
    options = {"start": "subspace", "bulk": "bfloat16", "restarts": 1, "resume": tmp_path}

    def kill_in_float32(stage, loss, candidates):
        if not model.holds(torch.bfloat16):
            raise Killed

    with pytest.raises(Killed):
        paperlib.reconstruct(model, theta, 8, callback=kill_in_float32, **options)
    check = memory.check_memory

    def full(model, candidates, outputs, formats, **rest):
        if formats.bulk == torch.float32:
            raise MemoryError("full")
        return check(model, candidates, outputs, formats, **rest)

    monkeypatch.setattr(memory, "check_memory", full)
    found = paperlib.reconstruct(model, theta, 8, **options)
    assert found.loss < 1e-3 and model.holds(torch.bfloat16)


def test_an_attack_that_has_ended_returns_its_result(tmp_path):
    data, model, theta = problem(5.0)
    first = paperlib.reconstruct(model, theta, data.n, resume=tmp_path)
    steps = []
    again = paperlib.reconstruct(
        model, theta, data.n, resume=tmp_path, callback=lambda *step: steps.append(step)
    )
    assert not steps
    assert torch.equal(again.samples, first.samples)
    assert (again.loss, again.status, again.seconds) == (first.loss, first.status, first.seconds)
    for part in ("history", "stages", "options"):  # as text, where NaN is NaN
        assert repr(getattr(again, part)) == repr(getattr(first, part))
    assert again.elimination_losses == first.elimination_losses


def test_other_attacks_have_files_of_their_own(tmp_path):
    data, model, theta = problem(5.0)
    paperlib.reconstruct(model, theta, data.n, resume=tmp_path)
    others = [
        (model, 2 * theta, data.n, {}),
        (paperlib.RandomFeatures(model.d, model.p, "relu", seed=1), theta, data.n, {}),
        (model, theta, data.n - 1, {}),
        (model, theta, data.n, {"seed": 1}),
        (model, theta, data.n, {"tolerance": 1e-3}),
        (model, theta, data.n, {"oversampling": 1.5}),
    ]
    for k, (features, parameters, n, options) in enumerate(others, 2):
        paperlib.reconstruct(
            features,
            parameters,
            n,
            resume=tmp_path,
            **{"max_steps": 3, "restarts": 1} | options,
        )
        assert len(list(tmp_path.glob("*.attack"))) == k


def test_what_a_module_does_tells_attacks_apart(tmp_path):
    """The same layers, weights and parameters, and another function of them."""

    class Body(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.layer = nn.Linear(20, 600)
            self.function = function

        def forward(self, x):
            return self.function(self.layer(x))

    data = paperlib.sphere(3, 20, 0)
    right, wrong = Body(nn.functional.gelu), Body(nn.functional.relu)
    wrong.load_state_dict(right.state_dict())
    maps = [paperlib.ModuleFeatures(body, 20) for body in (right, wrong)]
    assert maps[0].describe() == maps[1].describe()
    theta = paperlib.fit_min_norm(maps[0], data.X, data.y)
    for k, features in enumerate((*maps, *maps), 1):
        options = {"max_steps": 3, "restarts": 1, "resume": tmp_path}
        paperlib.reconstruct(features, theta, 3, **options)
        assert len(list(tmp_path.iterdir())) == min(k, 2)


def test_what_an_activation_does_tells_attacks_apart(tmp_path):
    data, _, _ = problem(5.0)
    relu = activation("relu")
    value = lambda u: torch.where(u > 0, u, 0.2 * u)  # noqa: E731
    leaky = dataclasses.replace(relu, value=value, two_slopes=None)
    for k, function in enumerate((relu, leaky), 1):
        model = paperlib.RandomFeatures(30, 750, function, seed=0)
        theta = torch.ones(1, 750)
        options = {"max_steps": 1, "restarts": 1, "start": "random", "resume": tmp_path}
        paperlib.reconstruct(model, theta, data.n, **options)
        assert len(list(tmp_path.iterdir())) == k


def test_telling_them_apart_keeps_nothing_in_memory():
    model = paperlib.RandomFeatures(30, 3000, "relu", seed=0)
    told = saved_attack.behaviour(model)
    assert not model.holds(torch.float32) and model.keeps(torch.float32)
    model.features(paperlib.sphere(1, 30, 0).X)
    assert model.holds(torch.float32) and saved_attack.behaviour(model) == told
    higher = paperlib.RandomFeatures(30, 3000, "relu", seed=0, block_rows=2048)
    assert saved_attack.behaviour(higher) == told
    other = paperlib.RandomFeatures(30, 3000, "relu", seed=1)
    assert saved_attack.behaviour(other) != told


def test_a_damaged_file_is_told_of_and_replaced(tmp_path):
    data, model, theta = problem(5.0)
    paperlib.reconstruct(model, theta, data.n, resume=tmp_path)
    (file,) = tmp_path.iterdir()
    for content in (b"", file.read_bytes()[:-100], b"{}", b"abc"):
        file.write_bytes(content)
        with pytest.warns(UserWarning, match="is damaged, the attack begins anew"):
            record = paperlib.reconstruct(model, theta, data.n, resume=tmp_path)
        assert record.explained
        assert file.read_bytes() != content


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    data, model, theta = problem(5.0)
    (tmp_path / "file").write_text("")
    steps = []
    with pytest.raises(OSError):
        paperlib.reconstruct(
            model,
            theta,
            data.n,
            resume=tmp_path / "file" / "folder",
            callback=lambda *step: steps.append(step),
        )
    assert not steps


def test_a_disk_that_fills_up_does_not_end_the_attack(tmp_path, at_once, monkeypatch):
    data, model, theta = problem(5.0)
    write = saved_attack.replace_file
    calls = []

    def full(path, content):
        calls.append(path)
        if len(calls) > 1:
            raise OSError("no space left on device")
        write(path, content)

    monkeypatch.setattr(saved_attack, "replace_file", full)
    with pytest.warns(UserWarning, match="could not be kept: no space left"):
        record = paperlib.reconstruct(model, theta, data.n, resume=tmp_path)
    assert record.explained and len(calls) > 2


def test_a_killed_process_loses_nothing(tmp_path):
    """A real process, killed in the middle, and another that goes on."""
    code = textwrap.dedent(
        """
        import sys, time
        import paperlib
        from paperlib import saved_attack
        saved_attack.INTERVAL = 0.0
        data = paperlib.sphere(5, 30, 0)
        model = paperlib.RandomFeatures(30, 450, "relu", seed=0)
        theta = paperlib.fit_min_norm(model, data.X, data.y)
        slow = lambda *step: (print("step", flush=True), time.sleep(float(sys.argv[2])))
        record = paperlib.reconstruct(
            model, theta, 5, start="random", resume=sys.argv[1], callback=slow
        )
        cut = [stage["ended"] for stage in record.stages].count("interrupted")
        print("explained", record.explained, cut)
        """
    )
    environment = {**os.environ, "PAPERLIB_PROGRESS": "0"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(
        [*command, "0.2"], stdout=subprocess.PIPE, text=True, env=environment
    )
    for _ in range(6):
        assert process.stdout.readline() == "step\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    done = subprocess.run(
        [*command, "0"], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.splitlines()[-1] == "explained True 1"


def test_a_folder_that_the_first_process_cannot_make_is_refused_by_all(tmp_path, monkeypatch):
    class Group:
        def __init__(self, rank):
            self.rank = lambda: rank

    (tmp_path / "file").write_text("")
    sent = []

    def broadcast(objects, *, group, **_):
        sent.append(list(objects))
        objects[:] = sent[0]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    for rank in (0, 1):
        with pytest.raises(OSError):
            saved_attack.SavedAttack(tmp_path / "file" / "folder", "name", group=Group(rank))
    assert sent[1] == [None, None]


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_begin_at_what_the_first_one_read(rank, tmp_path, monkeypatch):
    class Group:
        def rank(self):
            return rank

    saved_attack.SavedAttack(tmp_path, "name").begin({"step": 3})
    devices = []

    def broadcast(objects, *, group, group_src, device):
        devices.append(device)
        assert group_src == 0 and (objects[0] is None) == (rank > 0)
        objects[0] = {"state": {"step": 3}, "seconds": 5.0}

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    mine = saved_attack.SavedAttack(tmp_path, "name", group=Group(), device=torch.device("cpu"))
    assert mine.state == {"step": 3} and mine.seconds >= 5 and devices == [torch.device("cpu")]
    assert (mine.path is None) == (rank > 0)
