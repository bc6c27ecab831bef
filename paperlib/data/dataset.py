"""What every data set returns: rows on the sphere, labels, and the way back to pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from paperlib.checks import check_dtype
from paperlib.sphere import to_sphere


@dataclass(frozen=True, eq=False, repr=False)
class DataSet:
    """n samples as rows of norm sqrt(d), with their labels and their way back to pictures.

    Pictures are standardised with one mean and one standard deviation over the chosen images (the
    paper's setting); then each row z_i is put exactly on the sphere, x_i = z_i / c_i with
    c_i = ||z_i|| / sqrt(d), the *contrast* of image i. A point on the sphere therefore says
    everything about a picture except its contrast, and

        pixels of image i = mean + scale * c_i * x_i.

    Unpacks as `X, y, images = photographs(10)`; everything else is an attribute.

    Attributes:
        X: (n, d) rows with ||x_i|| = sqrt(d).
        y: labels: (n,) of -1 / +1 or reals, or (n, C) one-hot.
        class_index: (n,) int64, the class of each row; all zero where there are no classes.
        class_names: the classes, in the order of `class_index`.
        names: one readable name for each row, usable as a picture's title or alternative text.
        image_shape: (H, W) or (H, W, 3); None when the rows are not pictures.
        mean: mean of the pixels in [0, 1], shape () or (3,).
        scale: standard deviation of the pixels, shape () or (3,).
        contrast: (n,) the factor c_i of each row; shape () where it is the same for all.
        source: where the data come from.
        licence: under which terms.
        seed: the seed that chose the rows.
    """

    X: Tensor
    y: Tensor
    class_index: Tensor
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    image_shape: tuple[int, ...] | None
    mean: np.ndarray = field(default_factory=lambda: np.array(0.0))
    scale: np.ndarray = field(default_factory=lambda: np.array(1.0))
    contrast: np.ndarray = field(default_factory=lambda: np.array(1.0))
    source: str = ""
    licence: str = ""
    seed: int = 0

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.X.shape[0]

    @property
    def d(self) -> int:
        """Dimension of a sample."""
        return self.X.shape[1]

    def __len__(self) -> int:
        """Number of samples."""
        return self.n

    def __iter__(self) -> Iterator[Tensor | Callable[..., np.ndarray]]:
        """Yields X, y and the method that undoes the standardisation."""
        yield self.X
        yield self.y
        yield self.images

    def __repr__(self) -> str:
        """One line: how many, of what kind, from where."""
        kind = "vectors"
        if self.image_shape is not None:
            kind = "pictures of " + " x ".join(map(str, self.image_shape))
        classes = f", classes {', '.join(self.class_names)}" if self.class_names else ""
        return f"DataSet({self.n} {kind}, d = {self.d}{classes}; {self.source})"

    def images(
        self,
        samples: Tensor | np.ndarray | None = None,
        *,
        index: Sequence[int] | np.ndarray | Tensor | None = None,
    ) -> np.ndarray:
        """Turns rows on the sphere into pictures, undoing the standardisation.

        Args:
            samples: (m, d) rows, for example reconstructed ones; the data's own rows when None.
            index: for each row of `samples`, the training sample it stands for, whose contrast is
                then used; -1 where there is none. Use `index=range(n)` for samples that were put
                in the order of X by `compare(...).matched`. Rows without an index get the mean
                contrast of the training images: the sphere does not tell it, so this changes how
                strong a picture looks, never what it shows.

        Returns:
            (m, H, W, 3) or (m, H, W) float64 array in [0, 1], clipped, ready for imshow.

        Raises:
            ValueError: when the rows are not pictures, or shapes or indices do not fit, or a
                sample is not finite.
        """
        if self.image_shape is None:
            raise ValueError(f"these data are vectors, not pictures: {self.source}")
        if samples is None:
            samples = self.X
            index = np.arange(self.n) if index is None else index
        rows = _to_numpy(samples).astype(np.float64)
        if rows.ndim != 2 or rows.shape[1] != self.d:
            raise ValueError(f"samples must have shape (m, {self.d}), got {tuple(rows.shape)}")
        if not np.isfinite(rows).all():
            raise ValueError("samples must be finite, got NaN or infinity")
        contrast = self._contrast_of(index, len(rows))
        pixels = (rows * contrast[:, None]).reshape(-1, *self.image_shape)
        return np.clip(self.mean + self.scale * pixels, 0.0, 1.0)

    def to(
        self, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> DataSet:
        """The same data on another device or in another floating-point type."""
        return replace(
            self,
            X=self.X.to(device=device, dtype=dtype),
            y=self.y.to(device=device, dtype=dtype),
            class_index=self.class_index.to(device=device),
        )

    def _contrast_of(self, index: Sequence[int] | None, m: int) -> np.ndarray:
        average = float(self.contrast.mean())
        if index is None:
            return np.full(m, average)
        index = _to_numpy(index)
        if index.shape != (m,) or index.dtype.kind not in "iu":
            raise ValueError(f"index must be {m} whole numbers, got {index!r}")
        if index.size and (index.min() < -1 or index.max() >= self.n):
            raise ValueError(f"index must lie between -1 and {self.n - 1}, got {index!r}")
        contrast = self.contrast if self.contrast.ndim else np.full(self.n, self.contrast)
        return np.where(index < 0, average, contrast[index])


def _to_numpy(values: object) -> np.ndarray:
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    return np.asarray(values)


def standardise(
    images: np.ndarray, *, per_channel: bool = False, dtype: torch.dtype | None = None
) -> dict[str, object]:
    """Standardises images and puts them on the sphere.

    One mean and one standard deviation over all pixels of the chosen images (section 4 of the
    paper), or one of each for every channel (the paper's residual network).

    Args:
        images: (n, H, W) or (n, H, W, 3) in [0, 1].
        per_channel: standardise every colour channel by itself.
        dtype: torch.float32 (default) or torch.float64.

    Returns:
        The fields X, image_shape, mean, scale and contrast of a DataSet.

    Raises:
        ValueError: when an image has no texture at all, so that no direction is left.
    """
    images = np.asarray(images, dtype=np.float64)
    axes = tuple(range(images.ndim - 1)) if per_channel and images.ndim == 4 else None
    mean, scale = images.mean(axis=axes), images.std(axis=axes)
    if not np.all(scale > 0):
        raise ValueError("the chosen images are all of one flat colour: there is nothing to fit")
    rows = ((images - mean) / scale).reshape(len(images), -1)
    contrast = np.linalg.norm(rows, axis=1) / math.sqrt(rows.shape[1])
    X = to_sphere(torch.from_numpy(rows)).to(check_dtype(dtype))
    return {
        "X": X,
        "image_shape": tuple(images.shape[1:]),
        "mean": np.asarray(mean),
        "scale": np.asarray(scale),
        "contrast": contrast,
    }
