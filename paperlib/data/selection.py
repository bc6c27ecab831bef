"""Choosing n balanced, distinct pictures, and their labels.

A *class* is what a label stands for. It may gather several *members* (photographs, digits), which
then take turns, so that a class is not drawn from one member alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paperlib.checks import check_count, check_dtype
from paperlib.data.dataset import DataSet, standardise

LABELS = ("binary", "one-hot")


@dataclass(frozen=True)
class Item:
    """One picture that may be chosen: its name, and whatever `load` needs to read it.

    A `principal` picture is chosen before the others of its member.
    """

    name: str
    key: Any
    principal: bool = False


@dataclass(frozen=True)
class ClassPool:
    """A class: its name, and the pictures of each of its members."""

    name: str
    members: tuple[tuple[Item, ...], ...]

    @property
    def size(self) -> int:
        """Number of pictures in the class."""
        return sum(map(len, self.members))


def check_labels(labels: str, classes: int) -> str:
    """A known kind of label that fits the number of classes.

    Raises:
        ValueError: for an unknown kind, or binary labels for other than two classes.
    """
    if labels not in LABELS:
        raise ValueError(f"labels must be one of {', '.join(LABELS)}, got {labels!r}")
    if labels == "binary" and classes != 2:
        raise ValueError(
            f"binary labels need exactly two classes, got {classes}: "
            'name two of them, or ask for labels="one-hot"'
        )
    return labels


def group_classes(
    classes: Sequence[Hashable | Sequence[Hashable]], known: Sequence[Hashable], what: str
) -> list[tuple[Hashable, ...]]:
    """Reads `classes`, whose entries are members or tuples of members, against the known ones.

    Raises:
        ValueError: for an unknown member (the known ones are listed), one named twice, or none.
        TypeError: for a string in place of a sequence.
    """
    if isinstance(classes, str):
        raise TypeError(f"classes must be a sequence of {what} names, got {classes!r}")
    groups = [tuple(c) if isinstance(c, tuple | list) else (c,) for c in classes]
    members = [member for group in groups for member in group]
    for member in members:
        if member not in known:
            listed = ", ".join(map(str, known))
            raise ValueError(f"unknown {what} {member!r}: known are {listed}")
    if not members or any(not group for group in groups):
        raise ValueError(f"classes must name at least one {what}, got {classes!r}")
    if len(set(members)) != len(members):
        raise ValueError(f"classes must name each {what} once, got {classes!r}")
    return groups


def class_name(group: Sequence[Hashable]) -> str:
    """A readable name for a class made of these members."""
    return " or ".join(map(str, group))


def most_available(pools: Sequence[ClassPool]) -> int:
    """The largest n for which the classes can be balanced.

    Row i belongs to class i mod C, so class c runs out at row C * size_c + c.
    """
    return min(len(pools) * pool.size + c for c, pool in enumerate(pools))


def choose(
    pools: Sequence[ClassPool], n: int, load: Callable[[Any], np.ndarray], *, seed: int
) -> tuple[list[Item], list[np.ndarray], np.ndarray]:
    """Chooses n distinct pictures, row i from class i mod C.

    The first rows do not depend on n: a larger choice with the same seed extends a smaller one.

    Returns:
        The chosen items, their pictures as arrays, and the class of each, shape (n,).

    Raises:
        ValueError: when n is below 1 or above what there is; the message says how many there are.
    """
    n = check_count("n", n)
    rng = np.random.default_rng(check_count("seed", seed, least=0))
    available = most_available(pools)
    if n > available:
        sizes = ", ".join(f"{pool.size} of {pool.name}" for pool in pools)
        raise ValueError(
            f"n = {n} pictures asked for, {available} are available when the classes are balanced "
            f"({sizes})"
        )
    queues = [_taking_turns(pool, rng) for pool in pools]
    items, images, seen = [], [], set()
    for row in range(n):
        queue = queues[row % len(pools)]
        while True:
            item = next(queue, None)
            if item is None:
                raise ValueError(
                    f"n = {n} pictures asked for, only {row} different ones could be chosen: "
                    f"the others of {pools[row % len(pools)].name} are copies"
                )
            image = load(item.key)
            key = (image.shape, image.tobytes())
            if key not in seen:
                break
        seen.add(key)
        items.append(item)
        images.append(image)
    return items, images, np.arange(n) % len(pools)


def _taking_turns(pool: ClassPool, rng: np.random.Generator):
    """The pictures of a class in random order, one member after the other in turn."""
    members = [pool.members[i] for i in rng.permutation(len(pool.members))]
    queues = [[member[i] for i in rng.permutation(len(member))] for member in members]
    for queue in queues:
        queue.sort(key=lambda item: not item.principal)  # a stable sort: the rest stays shuffled
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue):
                yield queue[turn]


def encode_labels(
    class_index: np.ndarray, classes: int, labels: str, dtype: torch.dtype | None
) -> Tensor:
    """Labels as floats: (n,) of -1 for the first class and +1 for the second, or (n, C) one-hot."""
    dtype = check_dtype(dtype)
    index = torch.from_numpy(class_index)
    if labels == "binary":
        return (2 * index - 1).to(dtype)
    return torch.nn.functional.one_hot(index, classes).to(dtype)


def build(
    pools: Sequence[ClassPool],
    n: int,
    load: Callable[[Any], np.ndarray],
    *,
    labels: str,
    seed: int,
    dtype: torch.dtype | None,
    source: str,
    licence: str,
    per_channel: bool = False,
) -> DataSet:
    """Chooses n pictures from the pools and makes a DataSet of them.

    `load` returns a picture as an array, (H, W) or (H, W, 3), in [0, 1].

    Raises:
        ValueError: for labels that do not fit the pools, or images that differ in size.
    """
    check_labels(labels, len(pools))
    check_dtype(dtype)
    items, images, class_index = choose(pools, n, load, seed=seed)
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise ValueError(f"the images differ in size, got {shapes}: pass size=...")
    return DataSet(
        **standardise(np.stack(images), per_channel=per_channel, dtype=dtype),
        y=encode_labels(class_index, len(pools), labels, dtype),
        class_index=torch.from_numpy(class_index),
        class_names=tuple(pool.name for pool in pools),
        names=tuple(item.name for item in items),
        source=source,
        licence=licence,
        seed=seed,
    )
