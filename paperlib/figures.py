"""One style for every figure, and one way to save it: picture, print version, data, provenance."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from paperlib.grid import plain, to_json
from paperlib.replace_file import replace_files
from paperlib.results import machine

# Matplotlib and its company load where they draw: workers of a sweep start without them.
if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

# Blue, orange, indigo, grey, maroon. Far apart with full colour vision and with each of the three
# colour deficiencies, and at least 3 : 1 against white (WCAG 2.2, 1.4.11).
PALETTE = ("#0078b4", "#d86000", "#24148c", "#867078", "#6c0018")
INK = "#222222"
LABEL_POINTS = 12
CAPTION_POINTS = 10
GAP = 0.06  # between pictures, as a part of the step from one to the next
FOLDER_VARIABLE = "PAPERLIB_FIGURES"


def use_style() -> None:
    """Sets matplotlib's defaults for all figures of the project.

    The background is opaque white, so that a figure reads the same in print and on a dark page.
    """
    import seaborn as sns

    sns.set_theme(
        context="notebook",
        style="ticks",
        palette=list(PALETTE),
        rc={
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "savefig.transparent": False,
            "figure.figsize": (7.0, 4.3),
            "figure.dpi": 100,
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],  # ships with matplotlib: the same everywhere
            "axes.titlelocation": "left",
            "axes.titlesize": 13,
            "axes.titlepad": 22,  # leaves room for the labels of thresholds
            "axes.labelsize": 12,
            "axes.labelcolor": INK,
            "axes.edgecolor": INK,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.8,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "xtick.labelsize": 11,
            "ytick.labelsize": 11,
            "legend.fontsize": 11,
            "legend.frameon": False,
            "lines.linewidth": 2.0,
            "lines.markersize": 6,
            "image.cmap": "gray",
            "image.interpolation": "nearest",
            "pdf.fonttype": 42,  # text stays text in the PDF
        },
    )


def mark_threshold(axes: Axes, x: float, label: str, *, level: int = 0) -> Text:
    """Draws a threshold such as p = n or p = d n: a dashed vertical line, labelled above the axes.

    Args:
        axes: where to draw.
        x: place of the threshold in the units of the x axis.
        label: what it is, for example "p = d n".
        level: 1 puts the label a line higher, for a threshold close to another one.

    Returns:
        The label.

    Raises:
        ValueError: when x cannot be drawn: not finite, or not positive on a log axis.
    """
    _check_drawable(x, axes.get_xscale(), "x")
    axes.axvline(x, color=INK, linestyle=(0, (4, 3)), linewidth=1.3, zorder=1.5)
    return axes.annotate(
        label,
        (x, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, 4 + 14 * level),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=11,
        color=INK,
    )


def mark_level(axes: Axes, y: float, label: str) -> Text:
    """Draws a level such as the error of random candidates: a dotted line, labelled at its end.

    Args:
        axes: where to draw.
        y: place of the level in the units of the y axis.
        label: what it is, for example "random candidates".

    Returns:
        The label, which stands on the line at the right end.

    Raises:
        ValueError: when y cannot be drawn: not finite, or not positive on a log axis.
    """
    _check_drawable(y, axes.get_yscale(), "y")
    axes.axhline(y, color=INK, linestyle=(0, (1, 2)), linewidth=1.5, zorder=1.5)
    return axes.annotate(
        label,
        (1.0, y),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=10,
        color=INK,
    )


def _check_drawable(value: float, scale: str, name: str) -> None:
    if not math.isfinite(value) or (scale == "log" and value <= 0):
        raise ValueError(f"{name} = {value} cannot be drawn on a {scale} axis")


def image_strip(
    rows: Mapping[str, np.ndarray],
    *,
    captions: Mapping[str, Sequence[str]] | None = None,
    title: str | None = None,
    columns: int = 10,
    width: float = 10.0,
) -> Figure:
    """Draws rows of pictures under one another: originals over their reconstructions.

    Args:
        rows: for each label its pictures, (n, H, W) grey or (n, H, W, 3), in [0, 1]; all rows
            hold the same number n of pictures.
        captions: for some of the labels n short texts, drawn under that row's pictures.
        title: over the whole figure.
        columns: pictures side by side; longer rows go on in a further block of all rows.
        width: of the figure in inches.

    Returns:
        The figure. Nothing is cut off; save it with `save_figure`.

    Raises:
        ValueError: when there is no picture, the rows differ in length, a label of `captions`
            is unknown, pixels lie outside [0, 1], or the labels fill the width.
    """
    import matplotlib.pyplot as plt

    captions = dict(captions or {})
    rows = {label: check_pictures(label, pictures) for label, pictures in rows.items()}
    if not rows:
        raise ValueError("rows must hold at least one row of pictures")
    counts = {label: len(pictures) for label, pictures in rows.items()}
    n = next(iter(counts.values()))
    if set(counts.values()) != {n}:
        raise ValueError(f"every row must hold the same number of pictures, got {counts}")
    for label, texts in captions.items():
        if label not in rows:
            raise ValueError(f"captions for unknown row {label!r}: rows are {', '.join(rows)}")
        if len(texts) != n:
            raise ValueError(f"row {label!r} needs {n} captions, got {len(texts)}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")

    # Everything is placed in inches, so that all pictures are of one size and nothing is cut off.
    columns = min(columns, n)
    figure = plt.figure(figsize=(width, 1.0))
    left = max(_text_width(figure, label, LABEL_POINTS) for label in rows) + 0.15
    step = (width - left) / (columns - GAP)
    if step <= 0:
        plt.close(figure)
        raise ValueError(f"the row labels leave no room for pictures in a width of {width} inches")
    side = step * (1 - GAP)
    texts = [text for row in captions.values() for text in row]
    widest = max((_text_width(figure, text, CAPTION_POINTS) for text in texts), default=0.0)
    points = CAPTION_POINTS * min(1.0, 0.97 * side / widest) if widest else CAPTION_POINTS

    axes = figure.add_axes((0, 0, 1, 1))
    top = 0.0
    if title:
        axes.text(0, 0, title, fontsize=13, ha="left", va="top")
        top = 0.36
    for start in range(0, n, columns):
        for label, pictures in rows.items():
            height = side * pictures.shape[1] / pictures.shape[2]
            axes.text(
                left - 0.15, top + height / 2, label, fontsize=LABEL_POINTS, ha="right", va="center"
            )
            for i in range(start, min(start + columns, n)):
                x = left + (i - start) * step
                extent = (x, x + side, top + height, top)
                axes.imshow(pictures[i], extent=extent, vmin=0, vmax=1, cmap="gray")
                if label in captions:
                    where = (x + side / 2, top + height + 0.05)
                    axes.text(*where, captions[label][i], fontsize=points, ha="center", va="top")
            top += height + (0.3 if label in captions else GAP * step)
        top += 0.12 if start + columns < n else 0.0
    figure.set_size_inches(width, top)
    axes.set(xlim=(0, width), ylim=(top, 0), aspect="auto")
    axes.axis("off")
    return figure


def _text_width(figure: Figure, text: str, points: float) -> float:
    """Width of a line of text in inches."""
    probe = figure.text(0, 0, text, fontsize=points)
    extent = probe.get_window_extent(figure.canvas.get_renderer())
    probe.remove()
    return extent.width / figure.dpi


def check_pictures(label: str, pictures: np.ndarray) -> np.ndarray:
    """A row of pictures (n, H, W) or (n, H, W, 3) with pixels in [0, 1], in float64."""
    pictures = np.asarray(pictures, dtype=np.float64)
    colour = pictures.ndim == 4 and pictures.shape[3] == 3
    if not (colour or pictures.ndim == 3) or pictures.size == 0:
        raise ValueError(
            f"row {label!r} must have shape (n, H, W) or (n, H, W, 3), got {pictures.shape}"
        )
    if not (pictures.min() >= 0 and pictures.max() <= 1):  # also false for NaN
        raise ValueError(f"pixels of row {label!r} must lie in [0, 1]: use data.images(samples)")
    return pictures


def save_figure(
    figure: Figure,
    name: str,
    *,
    data: pd.DataFrame | Mapping[str, Sequence] | Sequence[Mapping[str, object]],
    caption: str,
    alt: str | None = None,
    provenance: Mapping[str, object] | None = None,
    seconds: float | None = None,
    folder: str | os.PathLike[str] | None = None,
    dpi: int = 150,
) -> dict[str, Path]:
    """Writes a figure as PNG and PDF, its data as CSV, and where it comes from as JSON.

    All four files are written completely before any replaces an older one. The same figure gives
    the same bytes of PNG, PDF and CSV; the time of drawing is in the JSON alone.

    Args:
        figure: what to save.
        name: of the files, in lower case, for example "law_of_data_reconstruction".
        data: the tidy table the figure is drawn from: a data frame, columns, or records.
        caption: says what is seen, so that the figure can be read alone.
        alt: alternative text for those who cannot see it; the caption when None.
        provenance: parameters, seed, device and whatever else is needed to draw it again.
        seconds: how long the computation behind it took.
        folder: where to; by default the folder named by the environment variable
            PAPERLIB_FIGURES, else `figures/` of the repository around the working directory.
        dpi: of the PNG.

    Returns:
        The paths by kind: "png", "pdf", "csv", "json".

    Raises:
        ValueError: for a name that is no plain file name, an empty table, or an empty caption.
        TypeError: for provenance that JSON cannot hold.
    """
    import pandas as pd

    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(f"name must be lower-case letters, digits, - and _, got {name!r}")
    if not caption.strip():
        raise ValueError("caption must say what is seen, got an empty text")
    table = data if isinstance(data, pd.DataFrame) else pd.DataFrame(data)
    if any(index is not None for index in table.index.names):
        table = table.reset_index()  # a named index is data
    if table.empty:
        raise ValueError("data must be the table the figure is drawn from, got an empty one")
    csv = table.to_csv(index=False, lineterminator="\n").encode()
    record = {
        "figure": name,
        "caption": caption,
        "alt": alt or caption,
        "provenance": plain(_spell(dict(provenance or {})), "provenance"),
        "seconds": None if seconds is None else round(float(seconds), 3),
        "drawn": datetime.now(UTC).isoformat(timespec="seconds"),
        "code": _code_version(),
        "machine": machine(),
        "data": {
            "file": f"{name}.csv",
            "rows": len(table),
            "columns": [str(column) for column in table.columns],
            "sha256": hashlib.sha256(csv).hexdigest(),
        },
    }
    text = json.dumps(json.loads(to_json(record)), indent=2, ensure_ascii=False) + "\n"

    folder = figures_folder() if folder is None else Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{name}.{kind}" for kind in ("png", "pdf", "csv", "json")}
    look = {"bbox_inches": "tight", "pad_inches": 0.08, "facecolor": "white"}
    # Neither a time nor a version in the pictures: they change only when what they show changes.
    png = {"Software": None, "Title": name, "Description": alt or caption}
    pdf = {"CreationDate": None, "Creator": None, "Producer": None, "Title": name}
    pdf["Subject"] = alt or caption
    contents = {"csv": csv, "json": text.encode()}
    for kind, options in (("png", {"dpi": dpi, "metadata": png}), ("pdf", {"metadata": pdf})):
        drawn = io.BytesIO()
        figure.savefig(drawn, format=kind, **options, **look)
        contents[kind] = drawn.getvalue()
    replace_files(folder, {path.name: contents[kind] for kind, path in paths.items()})
    return paths


def figures_folder() -> Path:
    """Where figures go unless told otherwise.

    The folder named by PAPERLIB_FIGURES; else `figures/` beside the nearest pyproject.toml at or
    above the working directory; else `figures/` in the working directory.
    """
    if os.environ.get(FOLDER_VARIABLE):
        return Path(os.environ[FOLDER_VARIABLE])
    here = Path.cwd()
    for place in (here, *here.parents):
        if (place / "pyproject.toml").is_file():
            return place / "figures"
    return here / "figures"


def _spell(value: object) -> object:
    """Devices, types and paths as text, everything else as it is."""
    if isinstance(value, torch.device | torch.dtype | Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _spell(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spell(item) for item in value]
    return value


def _code_version() -> dict[str, object]:
    """The commit of the package's source, and whether the source was changed since; if known."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(package), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    # An installed copy may lie inside some other repository: its commit would say nothing.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"commit": None, "changed": None}
    changes = git("status", "--porcelain", "--", ".")
    return {
        "commit": git("rev-parse", "HEAD"),
        "changed": None if changes is None else changes != "",
    }
