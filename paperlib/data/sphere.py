"""The paper's synthetic data: random directions on the sphere of radius sqrt(d)."""

from __future__ import annotations

import math
import numbers

import torch

from paperlib.checks import check_count, check_dtype
from paperlib.data.dataset import DataSet
from paperlib.sphere import random_on_sphere


def sphere(
    n: int, d: int, seed: int = 0, *, noise: float = 0.5, dtype: torch.dtype | None = None
) -> DataSet:
    """Gaussian directions scaled to ||x_i|| = sqrt(d), with noisy linear labels.

        y = X g + noise * e,   g ~ N(0, I / d),   e ~ N(0, I)     (the paper takes noise = 0.5)

    Drawn in float64 and then rounded, so that the values do not depend on `dtype`.

    Args:
        n: number of samples.
        d: dimension.
        seed: of the data.
        noise: standard deviation of the noise in the labels.
        dtype: torch.float32 (default) or torch.float64.

    Returns:
        A DataSet with real labels y of shape (n,), and no pictures.

    Raises:
        ValueError: for n below 1, d below 2 (the sphere of dimension 1 has two points), a seed
            below 0 or of 2^32 or more, or noise that is negative or not finite.
    """
    n, d = check_count("n", n), check_count("d", d, least=2)
    dtype = check_dtype(dtype)
    if not isinstance(noise, numbers.Real) or not (0 <= noise < math.inf):
        raise ValueError(f"noise must be a finite number of at least 0, got {noise!r}")
    if check_count("seed", seed, least=0) >= 2**32:
        # The generator keeps 32 bits: 2^32 would give the data of seed 0.
        raise ValueError(f"seed must be at least 0 and below 2^32, got {seed}")
    generator = torch.Generator().manual_seed(int(seed))
    draw = {"generator": generator, "dtype": torch.float64}
    X = random_on_sphere(n, d, generator=generator)
    g = torch.randn(d, **draw) / math.sqrt(d)
    y = X @ g + noise * torch.randn(n, **draw)
    return DataSet(
        X=X.to(dtype),
        y=y.to(dtype),
        class_index=torch.zeros(n, dtype=torch.int64),
        class_names=(),
        names=tuple(f"sample {i + 1}" for i in range(n)),
        image_shape=None,
        source=f"random directions in dimension {d}",
        licence="none needed: drawn from a seed",
        seed=seed,
    )
