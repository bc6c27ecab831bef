"""The course of a reconstruction as frames: what the candidates were, step after step.

`Frames` is a callback of `reconstruct`. It keeps every loss, and so many evenly spaced sets of
candidates that a film can be made of them, however long the run is.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paperlib.checks import check_count
from paperlib.damaged_files import DAMAGED
from paperlib.grid import plain
from paperlib.replace_file import replace_file


@dataclass(frozen=True)
class Frame:
    """The candidates after one step.

    Attributes:
        step: number of the step, counted over all stages from 1.
        stage: name of the stage, such as "bulk" or "finish".
        loss: projection loss of that stage.
        samples: (m, d) candidates, m >= n while there are more candidates than samples.
    """

    step: int
    stage: str
    loss: float
    samples: Tensor


class Frames:
    """A record of steps: all losses, and at most `most` sets of candidates, evenly spaced.

    Use it as the callback: `reconstruct(..., callback=frames)`.

    Attributes:
        losses: the loss after each step.
        stages: the stage of each step.
    """

    def __init__(self, *, most: int = 64):
        """Start empty.

        Args:
            most: how many frames are kept, at least 4. When there are more, every other one goes.

        Raises:
            ValueError: if `most` is below 4.
        """
        self.most = check_count("most", most, least=4)
        self.losses: list[float] = []
        self.stages: list[str] = []
        self._kept: list[Frame] = []
        self._last: Frame | None = None
        self._stride = 1

    def __call__(self, stage: str, loss: float, X: Tensor) -> None:
        """Note a step. Candidates are copied to the CPU only when they are kept."""
        self.losses.append(float(loss))
        self.stages.append(stage)
        step = len(self.losses)
        self._last = Frame(step, stage, float(loss), X)
        if (step - 1) % self._stride == 0:
            # A new list each time: another thread may be reading the old one.
            kept = [*self._kept, Frame(step, stage, float(loss), X.detach().cpu().clone())]
            if len(kept) >= self.most:
                self._stride *= 2
                kept = [frame for frame in kept if (frame.step - 1) % self._stride == 0]
            self._kept = kept

    def __len__(self) -> int:
        """Number of frames, the last step among them."""
        return len(self.all())

    def all(self) -> list[Frame]:
        """The frames in order; the last step is always among them."""
        kept, last = self._kept, self._last
        if last is not None and (not kept or kept[-1].step < last.step):
            kept = [*kept, Frame(last.step, last.stage, last.loss, last.samples.detach().cpu())]
        return kept

    def save(self, path: str | os.PathLike[str], *, about: Mapping[str, Any]) -> Path:
        """Write frames and losses to one compressed file, samples in float16.

        Args:
            path: ends in .npz; replaced only when the new file is whole.
            about: what the run was: plain values, kept as JSON.

        Raises:
            ValueError: if there is no frame, or the name does not end in .npz.
            TypeError: if `about` holds something that JSON cannot.
        """
        path, frames = Path(path), self.all()
        if path.suffix != ".npz":
            raise ValueError(f"path must end in .npz, got {path.name!r}")
        if not frames:
            raise ValueError("there is no frame to save: the run took no step")
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        np.savez_compressed(
            content,
            about=json.dumps(plain(dict(about), "about")),
            losses=np.array(self.losses),
            stages=np.array(self.stages),
            steps=np.array([frame.step for frame in frames]),
            sizes=np.array([len(frame.samples) for frame in frames]),
            samples=np.concatenate([f.samples.numpy().astype(np.float16) for f in frames]),
        )
        replace_file(path, content.getvalue())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> tuple[Frames, dict[str, Any]]:
        """Frames that were saved, and what was said about them.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or holds something else.
        """
        name = Path(path).name
        try:
            with np.load(path, allow_pickle=False) as stored:
                missing = {"about", "losses", "stages", "steps", "sizes", "samples"} - set(stored)
                values = {} if missing else {key: stored[key] for key in stored}
        except FileNotFoundError:
            raise
        except DAMAGED as error:
            raise ValueError(
                f"{name} is damaged, or no file of Frames.save: {type(error).__name__}: {error}"
            ) from error
        if missing:
            raise ValueError(f"{name} holds no frames: {', '.join(sorted(missing))} missing")
        try:
            return cls._of(values)
        except DAMAGED as error:
            raise ValueError(
                f"{name} holds frames that do not fit together: {type(error).__name__}: {error}"
            ) from error

    @classmethod
    def _of(cls, values: Mapping[str, np.ndarray]) -> tuple[Frames, dict[str, Any]]:
        """The frames of a file's arrays; raises some error of `DAMAGED` where they do not fit."""
        frames = cls(most=max(4, len(values["steps"]) + 1))
        frames.losses = values["losses"].tolist()
        frames.stages = values["stages"].tolist()
        rows = torch.from_numpy(values["samples"]).float().split(values["sizes"].tolist())
        count = len(frames.losses)
        outside = [step for step in values["steps"].tolist() if not 1 <= step <= count]
        if outside:
            raise ValueError(f"steps must lie between 1 and {count}, got {outside[0]}")
        frames._kept = [
            Frame(step, frames.stages[step - 1], frames.losses[step - 1], samples)
            for step, samples in zip(values["steps"].tolist(), rows, strict=True)
        ]
        about = json.loads(str(values["about"]))
        if not isinstance(about, dict):
            raise TypeError(f"about must be a dictionary, got {type(about).__name__}")
        return frames, about
