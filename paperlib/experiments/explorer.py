"""One attack as the explorer poses it: small pictures, one output, noise on the parameters."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paperlib.activations import activation_names
from paperlib.checks import check_count, check_named, check_positive, check_range
from paperlib.data import DataSet, digits, faces, photographs
from paperlib.frames import Frames
from paperlib.min_norm import fit_min_norm
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import reconstruct
from paperlib.record import Reconstruction
from paperlib.streams import stream


def _grey_photographs(n: int, *, seed: int) -> DataSet:
    return photographs(n, grey=True, seed=seed)


DATA_SETS: dict[str, Callable[..., DataSet]] = {
    "digits": digits,
    "faces": faces,
    "photographs": _grey_photographs,
}

# Entries of V, 1 GB in float32: what a laptop or a shared notebook server has to spare.
MOST_WEIGHTS = 250_000_000


@dataclass(frozen=True)
class Problem:
    """What the attack is given, and the data it never sees.

    Attributes:
        data: the training set.
        model: the features.
        theta: the parameters as published, noise added, (1, p).
    """

    data: DataSet
    model: RandomFeatures
    theta: Tensor


@dataclass(frozen=True)
class Setting:
    """What can be chosen in the explorer.

    Attributes:
        dataset: "digits" (d = 64), "faces" (d = 625) or "photographs" (grey, d = 1,024).
        n: number of pictures.
        p_over_dn: parameters per number in the data.
        activation: one of `activation_names()`.
        noise: norm of Gaussian noise on the parameters, relative to theirs.
        seed: of data, features, noise and candidates.
    """

    dataset: str = "digits"
    n: int = 10
    p_over_dn: float = 5.0
    activation: str = "relu"
    noise: float = 0.0
    seed: int = 0

    def data(self) -> DataSet:
        """The training set.

        Raises:
            ValueError: for an unknown data set, or n or a seed without sense.
        """
        check_named("dataset", self.dataset, DATA_SETS)
        check_count("n", self.n)
        check_count("seed", self.seed, least=0)
        return DATA_SETS[self.dataset](self.n, seed=self.seed)

    def parameters(self, data: DataSet) -> int:
        """p, the number of parameters of the model.

        Raises:
            ValueError: for p_over_dn that is not positive, p < n, or features that take more than
                1 GB.
        """
        check_positive("p_over_dn", self.p_over_dn)
        p = round(self.p_over_dn * data.d * self.n)
        if p < self.n:
            raise ValueError(f"p = {p} parameters cannot fit {self.n} labels: raise p / (d n)")
        if p * data.d > MOST_WEIGHTS:
            raise ValueError(
                f"p = {p:,} features of d = {data.d:,} take {4e-9 * p * data.d:.1f} GB, more than "
                "the explorer has to spare: lower n or p / (d n)"
            )
        return p

    def problem(self) -> Problem:
        """Load the data, train the model, add the noise.

        Raises:
            ValueError: for a value without sense, in words.
        """
        check_named("activation", self.activation, activation_names())
        check_range("noise", self.noise, least=0)
        data = self.data()
        p = self.parameters(data)
        model = RandomFeatures(data.d, p, self.activation, seed=self.seed)
        theta = fit_min_norm(model, data.X, data.y)
        noise = torch.randn(theta.shape, generator=stream("noise on theta", self.seed))
        return Problem(data, model, theta + self.noise * theta.norm() * noise / p**0.5)

    def attack(
        self, problem: Problem, callback: Callable[..., Any] | None = None
    ) -> Reconstruction:
        """Read the data back; `callback` as in `reconstruct`."""
        return reconstruct(
            problem.model,
            problem.theta,
            self.n,
            seed=self.seed,
            restarts=3,
            progress=False,
            callback=callback,
        )

    def describe(self) -> dict[str, Any]:
        """The choices as plain values."""
        return asdict(self)


def store_run(
    setting: Setting, path: str | os.PathLike[str], *, frames: int = 64
) -> Reconstruction:
    """Run an attack and keep its course for the explorer to show at once.

    Args:
        setting: the problem.
        path: of the file, ending in .npz.
        frames: most frames that are kept.

    Raises:
        ValueError: for a path that does not end in .npz, or a value without sense.
    """
    if Path(path).suffix != ".npz":  # before the attack, not after it
        raise ValueError(f"path must end in .npz, got {Path(path).name!r}")
    problem, course = setting.problem(), Frames(most=frames)
    record = setting.attack(problem, course)
    course("result", record.loss, record.samples)
    course.save(path, about=setting.describe())
    return record
