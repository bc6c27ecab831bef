"""Small colour pictures cut from the photographs that ship with the scientific Python packages.

Nothing is downloaded: four photographs come with scikit-image, two with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image

from paperlib.checks import check_count
from paperlib.data.dataset import DataSet
from paperlib.data.selection import (
    ClassPool,
    Item,
    build,
    check_labels,
    class_name,
    group_classes,
    most_available,
)

SOURCES = {
    "astronaut": "scikit-image (NASA, Eileen Collins), public domain",
    "chelsea": "scikit-image (Stefan van der Walt), CC0",
    "flower": "scikit-learn (vultilion, Flickr 6056698931), CC BY 2.0",
    "coffee": "scikit-image (Rachel Michetti, Pikolo Espresso Bar), CC0",
    "rocket": "scikit-image (SpaceX), public domain",
    "china": "scikit-learn (danielbuechele, Flickr 6061409035), CC BY 2.0",
}

# Living things against things made by hand: two classes of three photographs each.
GROUPS = {
    "living": ("astronaut", "chelsea", "flower"),
    "made by hand": ("coffee", "rocket", "china"),
}

# Split by photograph, not by patch: neighbouring patches share edges and light.
SPLITS = {
    "all": tuple(SOURCES),
    "train": ("astronaut", "chelsea", "coffee", "china"),
    "other": ("flower", "rocket"),
}

# Squares around what one recognises in each photograph: top, left, side in pixels. The first of
# each is what the photograph shows, and is chosen first. The sides are multiples of 32, so that a
# 32 x 32 picture is an exact average over blocks of pixels.
SUBJECTS = {
    "astronaut": {
        "face": (0, 128, 192),
        "space shuttle": (88, 316, 192),
        "badge": (320, 106, 128),
        "helmet": (320, 320, 192),
        "flag": (0, 0, 128),
    },
    "chelsea": {"cat": (6, 90, 288), "eye": (64, 128, 128)},
    "flower": {"dahlia": (80, 164, 288), "petals": (331, 272, 96)},
    "coffee": {"cup": (0, 160, 256), "spoon": (224, 304, 128)},
    "rocket": {"rocket": (120, 176, 288), "lights": (331, 80, 96), "tower": (140, 0, 128)},
    "china": {"pagoda": (24, 36, 352), "tree": (130, 512, 128), "lake": (160, 400, 128)},
}

GRID_SCALES = (4, 2, 1)
LEAST_TEXTURE = 0.03  # standard deviation of the grey values in [0, 1]; sky and shadow lie below


def photographs(
    n: int,
    *,
    size: int = 32,
    scale: int | str | None = None,
    classes: Sequence[str | Sequence[str]] | None = None,
    labels: str = "binary",
    grey: bool = False,
    split: str = "all",
    seed: int = 0,
    per_channel: bool = False,
    dtype: torch.dtype | None = None,
) -> DataSet:
    """Small pictures cut from six photographs; the label says which photograph.

    By default the labels are -1 for living things (astronaut, chelsea the cat, flower) and +1 for
    things made by hand (coffee, rocket, china). Classes are balanced, no two pictures are equal,
    and a larger n with the same seed extends a smaller one as long as `scale` is the same.

    Args:
        n: number of pictures.
        size: side in pixels; d = 3 size^2, or size^2 in grey.
        scale: "subjects" cuts around what one recognises (a face, a cup, a pagoda) and shrinks it
            to `size`; a whole number s averages the photograph over s x s blocks and cuts it into
            a grid of patches, leaving out those without texture. None takes "subjects" where
            there are enough of them, else the coarsest of 4, 2, 1 that holds n.
        classes: photographs, or tuples of photographs that share a label; two entries for binary
            labels. All six, each a class of its own, when None and labels are one-hot.
        labels: "binary" or "one-hot".
        grey: one channel (ITU-R 601 luma) instead of three.
        split: "all" photographs, or only those of "train" or of "other", which share none.
        seed: chooses the pictures.
        per_channel: standardise every colour channel by itself.
        dtype: torch.float32 (default) or torch.float64.

    Returns:
        A DataSet with image_shape (size, size, 3), or (size, size) in grey.

    Raises:
        ValueError: for n below 1 or above what there is, or an unknown class, split or scale.
    """
    n = check_count("n", n)
    size = check_count("size", size, least=4)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    members, names = SPLITS[split], None
    if classes is None and labels == "one-hot":
        classes = members
    elif classes is None:
        classes = [tuple(m for m in group if m in members) for group in GROUPS.values()]
        names = list(GROUPS)
    groups = group_classes(classes, members, f"photograph of split {split!r}")
    check_labels(labels, len(groups))
    names = names or [class_name(group) for group in groups]

    return build(
        _pools_for(n, dict(zip(names, groups, strict=True)), size, scale),
        n,
        lambda key: _cut(*key, size=size, grey=grey),
        labels=labels,
        seed=seed,
        dtype=dtype,
        per_channel=per_channel,
        source="photographs of scikit-image and scikit-learn",
        licence="; ".join(f"{m}: {SOURCES[m]}" for group in groups for m in group),
    )


def _pools_for(
    n: int, groups: dict[str, Sequence[str]], size: int, scale: int | str | None
) -> list[ClassPool]:
    """The pictures of each class at the scale asked for, or at the first scale that holds n."""
    if scale is not None and scale != "subjects":
        if isinstance(scale, str):
            raise ValueError(
                f'scale must be "subjects", a whole number such as {GRID_SCALES}, or None, '
                f"got {scale!r}"
            )
        scale = check_count("scale", scale)
    scales = ("subjects", *GRID_SCALES) if scale is None else (scale,)
    best, found = [], -1
    for candidate in scales:
        pools = [
            ClassPool(name, tuple(_items(member, size, candidate) for member in group))
            for name, group in groups.items()
        ]
        available = most_available(pools)
        if available > found:
            best, found = pools, available
        if found >= n:
            break
    if found < 1:
        raise ValueError(f"no picture of {size} x {size} fits into the photographs at this scale")
    return best


@cache
def _photograph(name: str) -> Image.Image:
    # Imported here: these libraries take seconds to load, in every process of a sweep.
    from skimage import data as skimage_data
    from sklearn.datasets import load_sample_image

    if name in ("china", "flower"):
        return Image.fromarray(load_sample_image(f"{name}.jpg"))
    return Image.fromarray(getattr(skimage_data, name)())


@cache
def _items(photograph: str, size: int, scale: int | str) -> tuple[Item, ...]:
    """Every picture that may be cut from a photograph; its key is (photograph, left, top, side)."""
    if scale == "subjects":
        boxes = SUBJECTS[photograph].items()
        return tuple(
            Item(f"{photograph}: {subject}", (photograph, left, top, side), principal=i == 0)
            for i, (subject, (top, left, side)) in enumerate(boxes)
            if side >= size
        )
    width, height = _photograph(photograph).size
    side = size * scale
    columns, rows = width // side, height // side
    left, top = (width - columns * side) // 2, (height - rows * side) // 2
    items = []
    for row in range(rows):
        for column in range(columns):
            key = (photograph, left + column * side, top + row * side, side)
            if _cut(*key, size=size, grey=True).std() >= LEAST_TEXTURE:
                items.append(Item(f"{photograph}: row {row + 1}, column {column + 1}", key))
    return tuple(items)


def _cut(photograph: str, left: int, top: int, side: int, *, size: int, grey: bool) -> np.ndarray:
    """A square of a photograph averaged down to size x size, in [0, 1]."""
    picture = _photograph(photograph).resize(
        (size, size), Image.Resampling.BOX, box=(left, top, left + side, top + side)
    )
    return np.asarray(picture.convert("L") if grey else picture, dtype=np.float64) / 255
