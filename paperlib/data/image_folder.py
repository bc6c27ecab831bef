"""Pictures from a folder with one subfolder for each class, such as Tiny-ImageNet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from paperlib.checks import check_count
from paperlib.data.dataset import DataSet
from paperlib.data.selection import ClassPool, Item, build, check_labels, class_name, group_classes


def image_folder(
    n: int,
    root: str | os.PathLike[str],
    *,
    size: int | None = None,
    classes: Sequence[str | Sequence[str]] | None = None,
    labels: str = "binary",
    grey: bool = False,
    seed: int = 0,
    per_channel: bool = False,
    dtype: torch.dtype | None = None,
    source: str | None = None,
    licence: str = "that of the folder's pictures",
) -> DataSet:
    """Pictures below `root/<class>/`, at any depth, in the formats that torchvision knows.

    Only the chosen pictures are read, so that the folder may be large.

    Args:
        n: number of pictures.
        root: the folder, for example `tiny-imagenet-200/train`.
        size: side in pixels: the middle square of each picture is averaged down (or smoothly
            enlarged) to size x size. None keeps the pictures as they are; they must then be of
            one size.
        classes: subfolders, or tuples of subfolders that share a label; all when None.
        labels: "binary" (first class -1, second +1) or "one-hot".
        grey: one channel instead of three.
        seed: chooses the pictures.
        per_channel: standardise every colour channel by itself.
        dtype: torch.float32 (default) or torch.float64.
        source: what to say about where the pictures come from; the folder's name when None.
        licence: what to say about the terms of use.

    Returns:
        A DataSet with image_shape (H, W, 3), or (H, W) in grey.

    Raises:
        FileNotFoundError: when there is no such folder or no class folder in it.
        ValueError: for n below 1 or above what there is, an unknown class, pictures of several
            sizes, or a file that is no picture.
    """
    # Imported here: these libraries take seconds to load, in every process of a sweep.
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

    root = Path(root).expanduser()
    if size is not None:
        size = check_count("size", size, least=4)
    if not root.is_dir():
        raise FileNotFoundError(f"expected a folder with one subfolder for each class at {root}")
    try:
        known, _ = find_classes(root)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"expected one subfolder for each class in {root}, found none"
        ) from None
    groups = group_classes(known if classes is None else classes, known, "class")
    check_labels(labels, len(groups))
    found = make_dataset(
        root,
        {name: i for i, name in enumerate(known) if any(name in group for group in groups)},
        extensions=IMG_EXTENSIONS,
        allow_empty=True,
    )
    members = {name: [] for name in known}
    for path, i in found:
        members[known[i]].append(Item(f"{known[i]}: {Path(path).name}", path))
    return build(
        [ClassPool(class_name(g), tuple(tuple(members[m]) for m in g)) for g in groups],
        n,
        lambda path: _read(path, size=size, grey=grey),
        labels=labels,
        seed=seed,
        dtype=dtype,
        per_channel=per_channel,
        source=source or f"image folder {root.name}",
        licence=licence,
    )


def _read(path: str, *, size: int | None, grey: bool) -> np.ndarray:
    """A picture as an array in [0, 1], cut to its middle square and resized when size is given."""
    try:
        with Image.open(path) as file:
            picture = file.convert("L" if grey else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"not a readable picture: {path} ({error})") from error
    if size is not None:
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        shrink = side >= size
        picture = picture.resize(
            (size, size),
            Image.Resampling.BOX if shrink else Image.Resampling.BICUBIC,
            box=(left, top, left + side, top + side),
        )
    return np.asarray(picture, dtype=np.float64) / 255
