"""Faces of 25 x 25 grey pixels, shipped with scikit-image."""

from __future__ import annotations

import numpy as np
import torch

from paperlib.checks import check_count
from paperlib.data.dataset import DataSet
from paperlib.data.selection import ClassPool, Item, build

LEAST_TEXTURE = 0.03  # standard deviation of the grey values in [0, 1]


def faces(
    n: int,
    *,
    faces_only: bool = False,
    labels: str = "binary",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> DataSet:
    """Faces (+1) against what is no face (-1), d = 625.

    Args:
        n: number of pictures, at most 168, or 100 with `faces_only`.
        faces_only: faces alone. The labels are then a balanced toss of a coin, decided by `seed`:
            what a model memorises need not mean anything.
        labels: "binary" or "one-hot".
        seed: chooses the pictures.
        dtype: torch.float32 (default) or torch.float64.

    Returns:
        A DataSet with image_shape (25, 25).

    Raises:
        ValueError: for n below 1 or above what there is.
    """
    # Imported here: these libraries take seconds to load, in every process of a sweep.
    from skimage.data import lfw_subset

    images = lfw_subset()  # 100 faces, then 100 pieces of background
    face = [Item(f"face {i + 1}", i) for i in range(100)]
    if faces_only:
        order = np.random.default_rng(check_count("seed", seed, least=0)).permutation(100)
        pools = [
            ClassPool(f"faces, label {sign}", (tuple(face[i] for i in order[start::2]),))
            for start, sign in ((0, "-1"), (1, "+1"))
        ]
    else:
        # Some pieces of background are all but black: on the sphere they would be one point.
        textured = [i for i in range(100, 200) if images[i].std() >= LEAST_TEXTURE]
        background = tuple(Item(f"background {i - 99}", i) for i in textured)
        pools = [ClassPool("no face", (background,)), ClassPool("face", (tuple(face),))]
    return build(
        pools,
        n,
        lambda i: images[i],
        labels=labels,
        seed=seed,
        dtype=dtype,
        source="lfw_subset of scikit-image (Labeled Faces in the Wild, Huang et al.)",
        licence="Labeled Faces in the Wild, University of Massachusetts: for research",
    )
