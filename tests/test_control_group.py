"""What a control group leaves, from files like those of the kernel."""

import math

import pytest
import torch

from paperlib import control_group
from paperlib.memory import free_bytes


def limit(folder, most, used, inactive=0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {inactive}\nslab 3\n")


@pytest.fixture
def own(tmp_path):
    """The file that names the group: one of a job in a queue."""
    path = tmp_path / "cgroup"
    path.write_text("4:memory:/old\n0::/slurm/job\n")
    return path


def test_the_tightest_of_all_groups_counts(tmp_path, own):
    limit(tmp_path / "root" / "slurm" / "job", "max", 50)
    assert control_group.bytes_left(tmp_path / "root", own) == math.inf
    limit(tmp_path / "root" / "slurm", 1000, 300)
    assert control_group.bytes_left(tmp_path / "root", own) == 700
    limit(tmp_path / "root" / "slurm" / "job", 500, 50, inactive=20)
    assert control_group.bytes_left(tmp_path / "root", own) == 470
    limit(tmp_path / "root", 100, 120)
    assert control_group.bytes_left(tmp_path / "root", own) == 0


def test_groups_beside_the_own_do_not_count(tmp_path, own):
    limit(tmp_path / "root" / "slurm" / "other", 10, 5)
    limit(tmp_path, 10, 5)  # above the mount
    assert control_group.bytes_left(tmp_path / "root", own) == math.inf


def test_without_groups_nothing_limits(tmp_path):
    assert control_group.bytes_left(tmp_path, tmp_path / "nothing") == math.inf


def test_free_memory_is_what_the_group_leaves(monkeypatch):
    free = free_bytes(torch.device("cpu"))
    assert free > 10**6
    monkeypatch.setattr(control_group, "bytes_left", lambda: 12_345)
    assert free_bytes(torch.device("cpu")) == 12_345
