"""What benchmarks keep of their rows when a later one fails; nothing is measured here."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import stand_in
import torch

import paperlib

ROW = {"n": 1, "measured": 2.5}


def program(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def once(row):
    """A measurement that gives this row, and fails when it is asked for another."""
    rows = [row]

    def measure(*_, **__):
        if not rows:
            raise RuntimeError("the second one fails")
        return rows.pop()

    return measure


@pytest.mark.parametrize(
    ("name", "function", "row"),
    [
        ("recovery", "attack", ROW),
        ("growth", "measure", ROW),
        ("preconditioners", "measure", ROW),
        ("products", "measure", [ROW]),
    ],
)
def test_rows_are_saved_as_they_come(tmp_path, monkeypatch, name, function, row):
    module, out = program(name), tmp_path / "rows.csv"
    monkeypatch.setattr(module, function, once(row))
    threads = str(torch.get_num_threads())
    monkeypatch.setattr(sys, "argv", [name, "--threads", threads, "--out", str(out)])
    with pytest.raises(RuntimeError, match="the second one fails"):
        module.main()
    assert pd.read_csv(out).to_dict("records") == [ROW]


def test_memory_keeps_its_rows_when_a_child_fails(tmp_path, monkeypatch, capsys):
    module, out = program("memory"), tmp_path / "rows.csv"
    names = "predicted", "measured", "peak of the process", "V in float32"
    row = {f"{name} (MB)": 1.5 for name in names} | {"seconds": 1.5, "recovered (0.001)": 2, "n": 3}
    children = [
        subprocess.CompletedProcess([], 1, stderr="killed for memory"),
        subprocess.CompletedProcess([], 0, stdout=json.dumps(row)),
    ]
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: children.pop())
    monkeypatch.setattr(sys, "argv", ["memory", "--out", str(out)])
    with pytest.raises(SystemExit, match="killed for memory"):
        module.main()
    assert pd.read_csv(out).to_dict("records") == [row]


def test_committed_results_are_replaced_only_when_asked_for(monkeypatch):
    module = program("against_published")
    row = dict.fromkeys(("passes", "steps", "recovered (0.001)", "recovered (0.05)"), 1)
    row |= dict.fromkeys(("seconds", "loss", "tolerance", "mean error", "seconds a step"), 1.0)

    def measure(*_, solver="default", **__):
        return {"solver": solver, "seed": 0, "reached": True, **row}

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "CASES", {"synthetic": (2, 20, "synthetic")})
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: pytest.fail("a table was saved"))
    monkeypatch.setattr(sys, "argv", ["against_published", "--seeds", "1"])
    module.main()


def test_photographs_change_with_the_seed():
    load = program("against_published").load
    assert not torch.equal(load("photographs", 3, 0).X, load("photographs", 3, 1).X)


# Beside the processor


@pytest.mark.parametrize(
    ("dtype", "n", "expected"),
    [
        (torch.bfloat16, 3, {"linearize", "Gauss-Newton product"}),
        (torch.bfloat16, None, {"V^T V"}),
        (torch.float32, 3, {"linearize", "Gauss-Newton product"}),
        (torch.float32, None, {"V^T V"}),
        (torch.int8, 3, {"Gauss-Newton product"}),
    ],
)
def test_products_are_measured_on_a_device(monkeypatch, dtype, n, expected):
    module = program("products")
    for name, value in {"SIDE": 64, "READ": 99, "ROUNDS": 2, "LEAST_SECONDS": 1e-4}.items():
        monkeypatch.setattr(module, name, value)
    rows = module.measure(n, 2048, 20, dtype, str(stand_in.device()))
    assert {row["product"] for row in rows} == expected
    assert {row["kernels"] for row in rows} == {"libraries"}


def test_pictures_come_back_on_a_device(monkeypatch, tmp_path):
    monkeypatch.setattr(paperlib, "cifar10", paperlib.digits)
    device = str(stand_in.device())
    arguments = ["--n", "3", "--device", device, "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["hundred_images", *arguments])
    program("hundred_images").main()
    assert pd.read_csv(tmp_path / "3_images_3dn.csv").signed_error.max() < 1e-3
    assert len(pd.read_csv(tmp_path / "3_images_3dn_stages.csv"))


def test_solvers_are_compared_on_a_device(monkeypatch, tmp_path):
    module, out = program("against_published"), tmp_path / "rows.csv"
    monkeypatch.setattr(module, "CASES", {"synthetic": (2, 1000, "synthetic")})
    arguments = ["--seeds", "1", "--published-steps", "5", "--out", str(out)]
    monkeypatch.setattr(
        sys, "argv", ["against_published", "--device", str(stand_in.device()), *arguments]
    )
    module.main()
    assert len(pd.read_csv(out)) == 2
