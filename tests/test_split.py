"""Features split over two processes give what one process gives; streamed ones what resident do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import paperlib
from paperlib.exchange import split_directions
from paperlib.projection import Linearization

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("split")
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--master-addr=127.0.0.1", "--master-port=0", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", str(HERE / "split_program.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one_process():
    data = paperlib.sphere(6, 40, seed=3)
    model = paperlib.RandomFeatures(40, 3000, seed=5, block_rows=1024)
    theta = paperlib.fit_min_norm(model, data.X, data.y)
    found = paperlib.reconstruct(model, theta, 6, seed=1, progress=False)
    return data, model, theta, found


def test_each_process_holds_its_share_of_the_features(two_processes):
    assert [r["features_held"] for r in two_processes] == [1024, 1976]


def test_two_processes_find_what_one_finds(two_processes, one_process):
    data, model, theta, found = one_process
    first, second = two_processes
    assert first["samples"] == second["samples"], "the processes went separate ways"
    assert first["explained"] and found.explained
    torch.testing.assert_close(torch.tensor(first["theta"]), theta, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.tensor(first["features"]), model.features(data.X))
    comparison = paperlib.compare(found.samples, torch.tensor(first["samples"]))
    assert comparison.signed.max() < 1e-5


def test_two_processes_split_candidates_as_one_does(two_processes, one_process):
    _, model, theta, _ = one_process
    point = Linearization(model, theta, paperlib.sphere(4, 40, seed=6).X)
    directions, gains, _ = split_directions(
        model, point.residual, point.X, point.alpha, generator=torch.Generator().manual_seed(0)
    )
    for result in two_processes:
        found = torch.tensor(result["directions"])
        torch.testing.assert_close((found * directions).sum(1).abs(), torch.full((4,), 40.0))
        torch.testing.assert_close(
            torch.tensor(result["gains"], dtype=torch.float64), gains, rtol=1e-3, atol=1e-9
        )


def test_more_processes_than_blocks_is_an_error():
    class Group:
        def size(self):
            return 4

        def rank(self):
            return 0

    with pytest.raises(ValueError, match="3 blocks of 1024 features cannot be split over 4"):
        paperlib.RandomFeatures(40, 3000, block_rows=1024, group=Group())


def test_streamed_features_give_the_resident_result(one_process):
    data, model, theta, found = one_process
    streamed = paperlib.RandomFeatures(40, 3000, seed=5, block_rows=1024, placement="streamed")
    assert torch.equal(streamed.features(data.X), model.features(data.X))
    again = paperlib.reconstruct(streamed, theta, 6, seed=1, progress=False)
    assert not streamed._resident
    assert torch.equal(again.samples, found.samples)


def test_an_unknown_placement_is_an_error():
    with pytest.raises(ValueError, match="placement must be one of .*, got 'elsewhere'"):
        paperlib.RandomFeatures(4, 10, placement="elsewhere")
