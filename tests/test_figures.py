import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import zlib
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from skimage.color import deltaE_ciede2000, rgb2lab

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

from paperlib.figures import (  # noqa: E402
    INK,
    PALETTE,
    figures_folder,
    image_strip,
    mark_level,
    mark_threshold,
    save_figure,
    use_style,
)


@pytest.fixture(autouse=True)
def fresh_style():
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.use("Agg")
        use_style()
        yield
    plt.close("all")


def curve():
    data = pd.DataFrame({"p": [10, 100, 1000], "error": [1.25, 0.5, 1e-3]})
    figure, axes = plt.subplots()
    axes.plot(data["p"], data["error"], label="signed")
    axes.set(xscale="log", xlabel="p", ylabel="error", title="A law")
    axes.legend()
    return figure, axes, data


def linear(colour):
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast_with_white(colour):
    return 1.05 / (linear(colour) @ [0.2126, 0.7152, 0.0722] + 0.05)


# How colours look with each deficiency (Machado, Oliveira and Fernandes, 2009; severity 1).
VISION = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart_with_every_kind_of_colour_vision(vision):
    seen = [np.clip(np.array(VISION[vision]) @ linear(colour), 0, 1) for colour in PALETTE]
    encoded = [np.where(c <= 0.0031308, 12.92 * c, 1.055 * c ** (1 / 2.4) - 0.055) for c in seen]
    for a, b in itertools.combinations(map(rgb2lab, encoded), 2):
        assert deltaE_ciede2000(a, b) > 15


def test_colours_stand_out_from_the_page():
    assert min(map(contrast_with_white, PALETTE)) >= 3
    assert contrast_with_white(INK) >= 7
    used = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    assert [matplotlib.colors.to_hex(colour) for colour in used] == list(PALETTE)


def test_a_figure_is_saved_four_times_with_all_that_is_needed_to_draw_it_again(tmp_path):
    figure, _, data = curve()
    provenance = {
        "n": 20,
        "seed": np.int64(3),
        "device": torch.device("cpu"),
        "dtype": torch.float64,
        "ratios": (0.5, 1.0),
        "loss": float("inf"),
    }
    paths = save_figure(
        figure,
        "law_of-2",
        data=data,
        caption="Error against p.",
        alt="A falling curve.",
        provenance=provenance,
        seconds=1.23456,
        folder=tmp_path / "deep" / "figures",
    )
    assert sorted(path.name for path in paths["png"].parent.iterdir()) == [
        "law_of-2.csv",
        "law_of-2.json",
        "law_of-2.pdf",
        "law_of-2.png",
    ]
    pd.testing.assert_frame_equal(pd.read_csv(paths["csv"]), data)
    record = json.loads(paths["json"].read_text())
    assert record["caption"] == "Error against p." and record["alt"] == "A falling curve."
    assert record["provenance"]["seed"] == 3 and record["provenance"]["device"] == "cpu"
    assert record["provenance"]["dtype"] == "torch.float64"
    assert record["provenance"]["ratios"] == [0.5, 1.0]
    assert record["seconds"] == 1.235 and record["drawn"].endswith("+00:00")
    assert {"python", "torch", "numpy"} <= record["machine"]["libraries"].keys()
    assert record["data"]["rows"] == 3 and record["data"]["columns"] == ["p", "error"]
    assert record["data"]["sha256"] == hashlib.sha256(paths["csv"].read_bytes()).hexdigest()
    assert paths["pdf"].read_bytes().startswith(b"%PDF")
    assert (paths["json"].stat().st_mode & 0o777) == (paths["png"].stat().st_mode & 0o777)

    picture = Image.open(paths["png"])
    assert picture.info["Description"] == "A falling curve."
    pixels = np.asarray(picture.convert("RGBA"))
    assert pixels.shape[1] > 800  # 7 inches at 150 dpi, cut to what is drawn
    assert (pixels[..., 3] == 255).all() and (pixels[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()


def test_the_commit_is_that_of_the_package(tmp_path):
    figure, _, data = curve()
    paths = save_figure(figure, "f", data=data, caption="c", folder=tmp_path)
    code = json.loads(paths["json"].read_text())["code"]
    package = Path(save_figure.__code__.co_filename).parent
    git = subprocess.run(
        ["git", "-C", package, "log", "-1", "--format=%H"], capture_output=True, text=True
    )
    tracked = subprocess.run(
        ["git", "-C", package, "ls-files", "--error-unmatch", "figures.py"], capture_output=True
    )
    if git.returncode or tracked.returncode:
        assert code == {"commit": None, "changed": None}
    else:
        assert code["commit"] == git.stdout.strip() and isinstance(code["changed"], bool)


DRAW = """
import sys, matplotlib; matplotlib.use("Agg")
import matplotlib.pyplot as plt
from paperlib.figures import save_figure, use_style
use_style()
figure, axes = plt.subplots()
axes.plot([1, 2, 3], [3, 1, 2], label="a")
axes.legend()
save_figure(figure, "f", data={"x": [1, 2, 3]}, caption="c", folder=sys.argv[1])
"""


def test_the_same_figure_gives_the_same_bytes(tmp_path):
    for seed in ("1", "2"):
        root = Path(__file__).parents[1]
        environment = {
            **os.environ,
            "PYTHONHASHSEED": seed,
            "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
        }
        subprocess.run([sys.executable, "-c", DRAW, tmp_path / seed], env=environment, check=True)
    for kind in ("png", "pdf", "csv"):
        first, second = (tmp_path / seed / f"f.{kind}" for seed in ("1", "2"))
        assert first.read_bytes() == second.read_bytes()


def test_a_failed_save_leaves_the_old_figure_alone(tmp_path, monkeypatch):
    figure, _, data = curve()
    paths = save_figure(figure, "f", data=data, caption="old", folder=tmp_path)
    before = {path: path.read_bytes() for path in paths.values()}
    save = figure.savefig

    def fail_at_the_pdf(target, **options):
        if options["format"] == "pdf":
            raise OSError("disk full")
        save(target, **options)

    monkeypatch.setattr(figure, "savefig", fail_at_the_pdf)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, "f", data=data, caption="new", folder=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    def fail_at_the_csv(path, content):
        if path.suffix == ".csv":
            raise OSError("disk full")
        path.write_bytes(content)

    monkeypatch.undo()
    monkeypatch.setattr("paperlib.replace_file.replace_file", fail_at_the_csv)
    with pytest.raises(OSError, match="disk full"):
        save_figure(figure, "f", data=data, caption="new", folder=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_tables_of_every_form_are_taken(tmp_path):
    figure, _, data = curve()
    records = data.to_dict("records")
    for form in (data, data.to_dict("list"), records, data.set_index("p")):
        paths = save_figure(figure, "f", data=form, caption="c", folder=tmp_path)
        pd.testing.assert_frame_equal(pd.read_csv(paths["csv"]), data)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"name": "../f"}, ValueError, "name must be lower-case"),
        ({"name": "Law"}, ValueError, "name must be lower-case"),
        ({"name": "f.png"}, ValueError, "name must be lower-case"),
        ({"caption": " "}, ValueError, "caption must say"),
        ({"data": pd.DataFrame()}, ValueError, "data must be the table"),
        ({"data": pd.DataFrame({"x": []})}, ValueError, "data must be the table"),
        ({"provenance": {"X": torch.ones(3)}}, TypeError, r"provenance\['X'\]"),
    ],
)
def test_figures_that_could_not_be_drawn_again_are_refused(tmp_path, options, error, message):
    figure, _, data = curve()
    arguments = {"name": "f", "data": data, "caption": "c", **options}
    with pytest.raises(error, match=message):
        save_figure(figure, arguments.pop("name"), folder=tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_where_figures_go(tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_FIGURES", str(tmp_path / "told"))
    assert figures_folder() == tmp_path / "told"
    monkeypatch.delenv("PAPERLIB_FIGURES")
    (tmp_path / "project" / "notebooks").mkdir(parents=True)
    (tmp_path / "project" / "pyproject.toml").touch()
    monkeypatch.chdir(tmp_path / "project" / "notebooks")
    assert figures_folder() == tmp_path / "project" / "figures"
    figure, _, data = curve()
    paths = save_figure(figure, "f", data=data, caption="c")
    assert paths["csv"] == tmp_path / "project" / "figures" / "f.csv" and paths["csv"].is_file()


def inside(figure, artists):
    """Whether all of these are drawn, and within the figure."""
    figure.canvas.draw()
    page = figure.bbox.padded(0.01)  # of a pixel, for rounding
    boxes = [artist.get_window_extent() for artist in artists]
    return all(
        box.width > 0 and page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1)
        for box in boxes
    )


def test_thresholds_are_drawn_where_they_are_and_named():
    figure, axes, _ = curve()
    label = mark_threshold(axes, 20, "p = n")
    higher = mark_threshold(axes, 25, "p = d n", level=1)
    lines = axes.get_lines()[1:]
    assert [list(line.get_xdata()) for line in lines] == [[20, 20], [25, 25]]
    assert inside(figure, [label, higher])
    assert not label.get_window_extent().overlaps(higher.get_window_extent())
    assert not label.get_window_extent().overlaps(axes.get_window_extent())
    centre = axes.transData.transform((20, 0))[0]
    box = label.get_window_extent()
    assert (box.x0 + box.x1) / 2 == pytest.approx(centre, abs=1)
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cannot be drawn on a log axis"):
            mark_threshold(axes, bad, "nowhere")


def test_levels_are_drawn_where_they_are_and_named():
    figure, axes, _ = curve()
    label = mark_level(axes, 0.8, "random candidates")
    assert list(axes.get_lines()[1].get_ydata()) == [0.8, 0.8]
    assert inside(figure, [label])
    height = axes.transData.transform((20, 0.8))[1]
    assert height < label.get_window_extent().y0 < height + 12
    with pytest.raises(ValueError, match="y = inf cannot be drawn"):
        mark_level(axes, float("inf"), "nowhere")


def pictures(n, *shape):
    return np.random.default_rng(0).random((n, *shape))


def test_a_strip_shows_every_picture_with_its_label_and_caption():
    long = "a rather long label, p = 3 d n"
    rows = {"original": pictures(5, 8, 8, 3), long: pictures(5, 8, 8)}
    captions = {long: [f"an error of {i / 7:.5f}" for i in range(5)]}
    title = "Originals over reconstructions"
    figure = image_strip(rows, captions=captions, title=title, width=6)
    figure.canvas.draw()
    (axes,) = figure.axes
    drawn = axes.get_images()
    for image, picture in zip(drawn, [*rows["original"], *rows[long]], strict=True):
        np.testing.assert_array_equal(image.get_array(), picture)
        assert image.get_clim() == (0, 1) and image.get_interpolation() == "nearest"
    written = {text.get_text(): text for text in axes.texts}
    assert list(written) == [title, "original", long, *captions[long]]
    assert inside(figure, [*drawn, *axes.texts])
    # Pictures are square and of one size; no text runs into a picture or into another text.
    boxes = [image.get_window_extent() for image in drawn]
    np.testing.assert_allclose([b.width for b in boxes], boxes[0].width)
    np.testing.assert_allclose([b.height for b in boxes], boxes[0].width)
    every = boxes + [text.get_window_extent() for text in axes.texts]
    for one, other in itertools.combinations(every, 2):
        assert not one.overlaps(other)
    # Rows, and the captions under them, stand where they belong.
    for k, caption in enumerate(captions[long]):
        box = written[caption].get_window_extent()
        assert box.y1 < boxes[5 + k].y0 < boxes[k].y0
        assert boxes[k].x0 <= box.x0 and box.x1 <= boxes[k].x1
    assert boxes[5].y0 < written[long].get_window_extent().y0 < boxes[5].y1
    assert boxes[0].y0 < written["original"].get_window_extent().y0 < boxes[0].y1


def test_long_strips_go_on_below():
    rows = {"original": pictures(7, 4, 6), "back": pictures(7, 4, 6)}
    figure = image_strip(rows, captions={"back": list("abcdefg")}, columns=3)
    figure.canvas.draw()
    images = figure.axes[0].get_images()
    boxes = [image.get_window_extent() for image in images]
    heights = [round(box.y0) for box in boxes]
    assert [heights.count(h) for h in dict.fromkeys(heights)] == [3, 3, 3, 3, 1, 1]
    assert heights == sorted(heights, reverse=True)
    np.testing.assert_array_equal(images[6].get_array(), rows["original"][3])
    np.testing.assert_array_equal(images[13].get_array(), rows["back"][6])
    np.testing.assert_allclose([box.width / box.height for box in boxes], 1.5)
    assert inside(figure, [*images, *figure.axes[0].texts])


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ({}, {}, "at least one row"),
        ({"a": pictures(3, 4, 4), "b": pictures(2, 4, 4)}, {}, "same number of pictures"),
        ({"a": pictures(3, 4)}, {}, "must have shape"),
        ({"a": pictures(3, 4, 4, 4)}, {}, "must have shape"),
        ({"a": pictures(0, 4, 4)}, {}, "must have shape"),
        ({"a": 2 * pictures(3, 4, 4)}, {}, r"must lie in \[0, 1\]"),
        ({"a": np.full((3, 4, 4), np.nan)}, {}, r"must lie in \[0, 1\]"),
        ({"a": pictures(3, 4, 4)}, {"captions": {"b": "xyz"}}, "unknown row 'b'"),
        ({"a": pictures(3, 4, 4)}, {"captions": {"a": "xy"}}, "needs 3 captions, got 2"),
        ({"a" * 200: pictures(3, 4, 4)}, {}, "leave no room"),
        ({"a": pictures(3, 4, 4)}, {"columns": 0}, "columns must be at least 1"),
    ],
)
def test_strips_that_make_no_sense_are_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        image_strip(rows, **options)


COMMITTED = sorted((Path(__file__).resolve().parents[1] / "figures").glob("*.pdf"))
GRID = "#e4e4e4"  # as in use_style: it may stay in the background


def stroked(pdf):
    """The colours of all lines of a PDF of matplotlib, as hexadecimal text."""
    found = set()
    for part in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            part = zlib.decompress(part)
        except zlib.error:
            continue  # a picture or a font, packed in another way
        for colour in re.findall(rb"((?:[\d.]+ ){3}RG|[\d.]+ G)\b", part):
            levels = [float(level) for level in colour.split()[:-1]]
            found.add(matplotlib.colors.to_hex(levels * (3 // len(levels))))
    return found


def test_colours_of_lines_are_read_from_a_pdf(tmp_path):
    figure, axes, data = curve()
    axes.plot(data["p"], data["error"] / 2, color="#90d743")
    paths = save_figure(figure, "law", data=data, caption="Two curves.", folder=tmp_path)
    assert {PALETTE[0], INK, GRID, "#90d743"} <= stroked(paths["pdf"].read_bytes())


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_figures_can_be_seen_on_every_page(path):
    lines = stroked(path.read_bytes()) - {GRID, "#ffffff"}
    assert {c: round(contrast_with_white(c), 2) for c in lines if contrast_with_white(c) < 3} == {}
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.mode == "RGBA" and picture.getpixel((0, 0)) == (255, 255, 255, 255)
        assert picture.getchannel("A").getextrema() == (255, 255), "a dark page shines through"
