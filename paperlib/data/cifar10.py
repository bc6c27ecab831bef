"""CIFAR-10, the paper's pictures: from a folder of pictures, or downloaded by torchvision."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch

from paperlib.checks import check_count, check_dtype
from paperlib.data.dataset import DataSet
from paperlib.data.image_folder import image_folder
from paperlib.data.selection import ClassPool, Item, build, check_labels, class_name, group_classes

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
SOURCE = "CIFAR-10 (A. Krizhevsky, 2009)"
LICENCE = "no licence stated by its author; distributed for research"
ROOT_VARIABLE = "PAPERLIB_CIFAR10"


def cifar10(
    n: int,
    classes: Sequence[str | Sequence[str]] | str = ("frog", "truck"),
    root: str | os.PathLike[str] | None = None,
    *,
    labels: str = "binary",
    grey: bool = False,
    split: str = "train",
    seed: int = 0,
    per_channel: bool = False,
    dtype: torch.dtype | None = None,
) -> DataSet:
    """Pictures of CIFAR-10, d = 3,072; frog (-1) against truck (+1) as in the paper.

    Where they are read from, in this order: the folder `root`; the folder named by the
    environment variable PAPERLIB_CIFAR10; torchvision's download (170 MB, once) into
    `~/.cache/paperlib`. A folder holds either pictures in `train/<class>/` or torchvision's
    `cifar-10-batches-py`.

    Args:
        n: number of pictures.
        classes: names, or tuples of names that share a label; "all" for the ten classes.
        root: the folder; see above.
        labels: "binary" (first class -1, second +1) or "one-hot".
        grey: one channel instead of three.
        split: "train" or "test".
        seed: chooses the pictures.
        per_channel: standardise every colour channel by itself (the paper's residual network).
        dtype: torch.float32 (default) or torch.float64.

    Returns:
        A DataSet with image_shape (32, 32, 3), or (32, 32) in grey.

    Raises:
        FileNotFoundError: when the folder holds neither layout; the message says what was looked
            for. Without a folder, when there is no network to download it from.
        ValueError: for n below 1 or above what there is, a seed below 0, or an unknown class.
        TypeError: for n or a seed that is no whole number, or another dtype.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    groups = group_classes(CLASSES if classes == "all" else classes, CLASSES, "class")
    check_labels(labels, len(groups))
    # Before a download of minutes.
    check_count("n", n)
    check_count("seed", seed, least=0)
    check_dtype(dtype)
    common = {
        "labels": labels,
        "seed": seed,
        "per_channel": per_channel,
        "dtype": dtype,
        "source": SOURCE,
        "licence": LICENCE,
    }
    root = root or os.environ.get(ROOT_VARIABLE)
    folder = None if root is None else Path(root).expanduser()
    if folder is not None and (folder / split).is_dir():
        return image_folder(n, folder / split, classes=groups, grey=grey, **common)
    if folder is not None and not (folder / "cifar-10-batches-py").is_dir():
        raise FileNotFoundError(
            f"no CIFAR-10 at {folder}: looked for pictures in {folder / split}/<class>/ and for "
            f"torchvision's {folder / 'cifar-10-batches-py'}"
        )
    download = folder is None
    if download:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(cache) / "paperlib"
        folder.mkdir(parents=True, exist_ok=True)
    # Imported here: these libraries take seconds to load, in every process of a sweep.
    import torchvision

    try:
        stored = torchvision.datasets.CIFAR10(folder, train=split == "train", download=download)
    except URLError as error:
        raise FileNotFoundError(
            f"no CIFAR-10 at {folder}, and it cannot be downloaded ({error.reason}): give a folder "
            f"that holds it as root, or in the environment variable {ROOT_VARIABLE}"
        ) from None
    targets = np.asarray(stored.targets)

    def member(name: str) -> tuple[Item, ...]:
        rows = np.flatnonzero(targets == CLASSES.index(name))
        return tuple(Item(f"{name}: {split} {i}", int(i)) for i in rows)

    def load(i: int) -> np.ndarray:
        picture = torchvision.transforms.functional.to_pil_image(stored.data[i])
        return np.asarray(picture.convert("L") if grey else picture, dtype=np.float64) / 255

    pools = [ClassPool(class_name(g), tuple(member(m) for m in g)) for g in groups]
    return build(pools, n, load, **common)
