"""Handwritten digits of 8 x 8 pixels, shipped with scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from paperlib.data.dataset import DataSet
from paperlib.data.selection import ClassPool, Item, build, class_name, group_classes

PIXELS = 64

EVEN_AGAINST_ODD = ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9))


def digits(
    n: int,
    *,
    classes: Sequence[int | Sequence[int]] | None = None,
    labels: str = "binary",
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> DataSet:
    """Handwritten digits, d = 64.

    Args:
        n: number of digits, at most 1,797 (fewer where the classes must be balanced).
        classes: digits, or tuples of digits that share a label. When None: even (-1) against odd
            (+1) for binary labels, the ten digits for one-hot labels.
        labels: "binary" or "one-hot".
        seed: chooses the digits.
        dtype: torch.float32 (default) or torch.float64.

    Returns:
        A DataSet with image_shape (8, 8).

    Raises:
        ValueError: for n below 1 or above what there is, or an unknown class.
    """
    if classes is None:
        classes = range(10) if labels == "one-hot" else EVEN_AGAINST_ODD
    groups = group_classes(classes, range(10), "digit")
    # Imported here: these libraries take seconds to load, in every process of a sweep.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    members = [
        tuple(Item(f"digit {digit}", int(i)) for i in np.flatnonzero(bunch.target == digit))
        for digit in range(10)
    ]
    names = [class_name(group) for group in groups]
    if tuple(groups) == EVEN_AGAINST_ODD:
        names = ["even", "odd"]
    return build(
        [
            ClassPool(name, tuple(members[digit] for digit in group))
            for name, group in zip(names, groups, strict=True)
        ],
        n,
        lambda i: bunch.images[i] / 16,
        labels=labels,
        seed=seed,
        dtype=dtype,
        source="digits of scikit-learn (E. Alpaydin and C. Kaynak, UCI, 1998)",
        licence="CC BY 4.0",
    )
