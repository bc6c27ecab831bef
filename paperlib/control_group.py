"""How much memory a control group leaves, such as Slurm and containers put their processes in.

The kernel ends a process that takes more than its group may, however much the machine has free.
"""

from __future__ import annotations

import math
from pathlib import Path

ROOT, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def bytes_left(root: Path = ROOT, own: Path = OWN) -> float:
    """Bytes that the groups of this process (version 2) still allow; infinity if none limits them.

    Args:
        root: where the groups are mounted.
        own: the file that names the group of this process.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return math.inf
    left = math.inf
    for path in (line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
        group = root / path
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                left = min(left, _left_in(folder))
    return left


def _left_in(folder: Path) -> float:
    """What one group allows; infinity where it has no limit."""
    try:
        limit = int((folder / "memory.max").read_text())  # "max" is no number
        used = int((folder / "memory.current").read_text())
        rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Pages of files that nobody uses are given back when memory is short.
        spare = int({name: value for name, value in rows}.get("inactive_file", 0))
    except (OSError, ValueError):
        return math.inf
    return max(limit - used + spare, 0)
