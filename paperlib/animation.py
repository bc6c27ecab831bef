"""Pictures that emerge during an attack: rows of small pictures as one bitmap, and as a GIF."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from paperlib.checks import check_count, check_positive
from paperlib.compare import compare
from paperlib.data import DataSet
from paperlib.figures import check_pictures, figures_folder
from paperlib.frames import Frames
from paperlib.replace_file import replace_file

GAP_PIXELS = 4

# From how many pictures of a film its palette is made.
PALETTE_FRAMES = 5


def picture_rows(rows: Sequence[np.ndarray], *, height: int = 64, columns: int = 10) -> Image.Image:
    """Rows of pictures under one another on white, every pixel a sharp square.

    Args:
        rows: arrays (n, H, W) grey or (n, H, W, 3) in [0, 1], all with the same n.
        height: of a picture in pixels; pictures are enlarged by a whole factor.
        columns: pictures side by side; longer rows go on below, all rows together.

    Raises:
        ValueError: for rows of different length or none, or pixels outside [0, 1].
    """
    check_count("height", height)
    check_count("columns", columns)
    tiles = [_tiles(check_pictures(str(r), row), height) for r, row in enumerate(rows)]
    if not tiles or len({len(row) for row in tiles}) != 1:
        raise ValueError(
            f"rows must be of one length, at least one: got {[len(row) for row in tiles]}"
        )
    n, side, width = tiles[0].shape[:3]
    columns = min(columns, n)
    blocks = -(-n // columns)
    step_down, step_right = side + GAP_PIXELS, width + GAP_PIXELS
    block = len(tiles) * step_down + GAP_PIXELS
    canvas = np.full(
        (blocks * block - 2 * GAP_PIXELS, columns * step_right - GAP_PIXELS, 3), 255, np.uint8
    )
    for r, row in enumerate(tiles):
        for i, tile in enumerate(row):
            top = (i // columns) * block + r * step_down
            left = (i % columns) * step_right
            canvas[top : top + side, left : left + width] = tile
    return Image.fromarray(canvas)


def _tiles(pictures: np.ndarray, height: int) -> np.ndarray:
    """Pictures as bytes in three colours, enlarged, (n, h, w, 3)."""
    if pictures.ndim == 3:
        pictures = np.repeat(pictures[..., None], 3, axis=3)
    factor = max(1, height // pictures.shape[1])
    pixels = (255 * pictures + 0.5).astype(np.uint8)
    return pixels.repeat(factor, axis=1).repeat(factor, axis=2)


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def film(data: DataSet, frames: Frames, *, height: int = 64) -> list[Image.Image]:
    """The course of a reconstruction as pictures: the training set above its nearest candidates.

    Candidates are matched with the training pictures and turned to the sign that agrees with them,
    which the attack itself settles only at its end.

    Args:
        data: the training set, pictures.
        frames: the course of the run.
        height: of a picture in pixels.
    """
    shown = []
    for frame in frames.all():
        matched = compare(data.X, frame.samples).matched_up_to_sign
        candidates = data.images(matched, index=range(data.n))
        shown.append(picture_rows([data.images(), candidates], height=height))
    return shown


def save_animation(
    images: Sequence[Image.Image],
    name: str,
    *,
    seconds: float = 6.0,
    hold: float = 2.5,
    colours: int = 128,
    folder: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a GIF that plays for ever, its last picture held.

    Args:
        images: at least two, of one size.
        name: of the file, without .gif.
        seconds: from the first picture to the last.
        hold: how long the last one stays.
        colours: one palette of that many colours for all pictures, at most 256.
        folder: where to; as in `save_figure`.

    Returns:
        The path.

    Raises:
        ValueError: for fewer than two pictures, pictures of different sizes, or times that are
            not positive.
    """
    if len(images) < 2 or len({image.size for image in images}) != 1:
        raise ValueError(
            f"expected at least two pictures of one size, got {[image.size for image in images]}"
        )
    check_positive("seconds", seconds)
    check_positive("hold", hold)
    folder = figures_folder() if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # One palette from a few of them side by side: it must hold the colours of all.
    few = [images[k * (len(images) - 1) // (PALETTE_FRAMES - 1)] for k in range(PALETTE_FRAMES)]
    width, height = images[0].size
    sheet = Image.new("RGB", (width, height * len(few)))
    for k, image in enumerate(few):
        sheet.paste(image, (0, k * height))
    palette = sheet.quantize(colours, method=Image.Quantize.MEDIANCUT)
    frames = [
        image.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for image in images
    ]
    each = max(20, round(1000 * seconds / len(frames)))
    path = folder / f"{name}.gif"
    content = io.BytesIO()
    frames[0].save(
        content,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[each] * (len(frames) - 1) + [round(1000 * hold)],
        loop=0,
        optimize=True,
    )
    replace_file(path, content.getvalue())
    return path
