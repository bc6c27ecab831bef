"""Attacks that go on where they were stopped: the state of each, kept in a folder while it runs.

The file of an attack is named by a checksum of all that defines it, with what the feature map does
at a few points, so that many attacks share a folder and none goes on from another's state. It is
replaced in one step: a process that dies while it writes leaves the state of before. When the
attack has ended, its file holds the result.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from paperlib.block_height import LEAST_TILE_ROWS
from paperlib.damaged_files import DAMAGED
from paperlib.feature_map import FeatureMap
from paperlib.replace_file import replace_file
from paperlib.results import machine
from paperlib.sphere import to_sphere
from paperlib.streams import stream

# Seconds between two writings: what is lost at most, besides the step under way.
INTERVAL = 30.0

FORMAT = 1


def fingerprint(theta: Tensor, **problem: Any) -> str:
    """A name for an attack: a checksum of the parameters (C, p) and of all that defines it."""
    digest = hashlib.sha256(json.dumps(problem, sort_keys=True, default=str).encode())
    digest.update(theta.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def behaviour(model: FeatureMap) -> list[str]:
    """What the first features are at three fixed points, and how they change, to three digits.

    Two modules with the same layers and weights may still differ in what they do with them, and two
    activations in more than their name. More digits would differ between numbers of threads.
    """
    generator = stream("behaviour", 0)
    X, directions = torch.randn(2, 3, model.d, generator=generator, dtype=torch.float64)
    X = to_sphere(X).to(model.device, model.dtype)
    model.reserve(())  # nothing is kept for this
    try:
        block = next(iter(model.blocks()))
        features, state = block.linearize(X)
        given = features.detach(), block.jvp(state, directions.to(X)).detach()
    finally:
        model.reserve(None)
    # Blocks may be higher elsewhere, but hold as many at least.
    rows = (row[:LEAST_TILE_ROWS].double() for part in given for row in part)
    return [f"{float(row.norm()):.2e}" for row in rows]


def open_attack(
    folder: str | os.PathLike | None, theta: Tensor, model: FeatureMap, /, **problem: Any
) -> SavedAttack:
    """The attack on theta (C, p) that all of `problem` defines, of this version of the package.

    Raises:
        OSError: if the folder cannot be made.
    """
    if folder is None:
        return SavedAttack()
    version = machine()["libraries"].get("paperlib")
    name = fingerprint(theta, **problem, behaviour=behaviour(model), version=version)
    return SavedAttack(folder, name, group=model.group, device=theta.device)


class SavedAttack:
    """The state of one attack in a file; without a folder, of one that is not kept.

    Where the features are split over processes, all of them begin at the state that the first
    one reads, and it alone writes.

    Attributes:
        path: the file that this process writes, None if it writes none.
        state: what the solver kept last, None at first.
        result: what the solver returned, None while it has not.
    """

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        name: str = "",
        *,
        group: ProcessGroup | None = None,
        device: torch.device | None = None,
    ):
        """Read the state, if there is one.

        Args:
            folder: made if it is not there; None keeps nothing.
            name: the attack's `fingerprint`.
            group: the processes that share it.
            device: of this process, through which it gets what another has read.

        Raises:
            OSError: if the folder cannot be made.
        """
        writes = folder is not None and (group is None or group.rank() == 0)
        self.path = Path(folder) / f"{name}.attack" if writes else None
        self._begun = self._written = time.perf_counter()
        found: dict[str, Any] | None = None
        refused: OSError | None = None
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                found = self._read()
            except OSError as error:
                refused = error
        if group is not None:
            everyone = [found, refused]
            torch.distributed.broadcast_object_list(
                everyone, group=group, group_src=0, device=device
            )
            found, refused = everyone
        if refused is not None:  # in all processes, lest the others wait for this one
            raise refused
        found = found or {}
        self._seconds_before = found.get("seconds", 0.0)
        self.state: dict[str, Any] | None = found.get("state")
        self.result: dict[str, Any] | None = found.get("result")

    @property
    def seconds(self) -> float:
        """How long the attack has run, interruptions left out."""
        return self._seconds_before + time.perf_counter() - self._begun

    def begin(self, state: dict[str, Any]) -> None:
        """Write for the first time.

        Raises:
            OSError: if that fails, before any work is done.
        """
        self._write({"state": state})

    def keep(self, state: dict[str, Any]) -> None:
        """Write the state: tensors on any device, numbers, strings, lists and dicts."""
        self._try({"state": state})

    def offer(self, state: Callable[[], dict[str, Any]]) -> None:
        """Make and write the state, if the last writing was long enough ago."""
        if self.path is not None and time.perf_counter() - self._written >= INTERVAL:
            self.keep(state())

    def finish(self, result: dict[str, Any]) -> None:
        """Put the result in the place of the state."""
        self._try({"result": result})

    def _try(self, content: dict[str, Any]) -> None:
        """Write; a full disk is only a warning, for the attack is worth more than its copy."""
        try:
            self._write(content)
        except OSError as error:
            warnings.warn(f"the attack could not be kept: {error}", stacklevel=3)
            self._written = time.perf_counter()

    def _write(self, content: dict[str, Any]) -> None:
        if self.path is None:
            return
        buffer = io.BytesIO()
        torch.save({"format": FORMAT, "seconds": self.seconds, **content}, buffer)
        replace_file(self.path, buffer.getvalue())
        self._written = time.perf_counter()

    def _read(self) -> dict[str, Any] | None:
        if not self.path.exists():
            return None
        try:
            content = io.BytesIO(self.path.read_bytes())
            found = torch.load(content, map_location="cpu", weights_only=True)
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']}, expected {FORMAT}")
        except DAMAGED as error:
            name = self.path.name
            warnings.warn(f"{name} is damaged, the attack begins anew: {error}", stacklevel=3)
            return None
        return found
