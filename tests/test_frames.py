import numpy as np
import pytest
import torch
from PIL import Image

import paperlib as pl
from paperlib.animation import picture_rows


def course(steps, *, most=8, d=5):
    frames = pl.Frames(most=most)
    for step in range(1, steps + 1):
        size = 4 if step < steps else 3  # fewer candidates at the end, as after elimination
        frames("bulk" if step < steps else "finish", 1.0 / step, torch.full((size, d), float(step)))
    return frames


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 100, 1000])
def test_frames_are_few_evenly_spaced_and_hold_the_first_and_the_last(steps):
    frames = course(steps)
    kept = frames.all()
    assert len(frames) == len(kept) <= 8 + 1
    assert len(kept) >= min(steps, 4)
    assert [frames.losses[f.step - 1] for f in kept] == [f.loss for f in kept]
    assert kept[0].step == 1 and kept[-1].step == steps
    assert all(float(f.samples[0, 0]) == f.step for f in kept)
    assert len(set(np.diff([f.step for f in kept])[:-1])) <= 1
    assert len(frames.losses) == len(frames.stages) == steps


def test_kept_candidates_do_not_change_with_the_tensor_they_came_from():
    frames, X = pl.Frames(), torch.ones(2, 3)
    frames("bulk", 1.0, X)
    X.zero_()
    assert bool((frames.all()[0].samples == 1).all())


def test_stored_frames_come_back(tmp_path):
    frames = course(20)
    path = frames.save(tmp_path / "run.npz", about={"n": 3, "dataset": "digits"})
    back, about = pl.Frames.load(path)
    assert about == {"n": 3, "dataset": "digits"}
    assert back.losses == frames.losses and back.stages == frames.stages
    for one, other in zip(frames.all(), back.all(), strict=True):
        assert (one.step, one.stage, one.loss) == (other.step, other.stage, other.loss)
        assert torch.equal(one.samples, other.samples)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.npz"]


def test_what_cannot_be_stored_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no frame"):
        pl.Frames().save(tmp_path / "run.npz", about={})
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        course(3).save(tmp_path / "run.zip", about={})
    np.savez(tmp_path / "other.npz", a=1)
    with pytest.raises(ValueError, match="holds no frames: about"):
        pl.Frames.load(tmp_path / "other.npz")
    with pytest.raises(ValueError, match="most must be at least 4"):
        pl.Frames(most=3)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    whole = course(6).save(tmp_path / "whole.npz", about={}).read_bytes()
    files = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "short": whole[:100],
        "turned": whole[:60] + bytes(255 - b for b in whole[60:90]) + whole[90:],
        "text": b"accuracy,loss\n",
    }
    for name, content in files.items():
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.save(tmp_path / "array.npy", np.ones(3))
    for path in [f"{name}.npz" for name in files] + ["array.npy"]:
        with pytest.raises(ValueError, match=f"{path} is damaged, or no file of Frames.save"):
            pl.Frames.load(tmp_path / path)
    with pytest.raises(FileNotFoundError):
        pl.Frames.load(tmp_path / "nothing.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": np.array([4, 99])}, "RuntimeError"),
        ({"steps": np.array([1, 7])}, "steps must lie between 1 and 2, got 7"),
        ({"steps": np.array([0, 1])}, "steps must lie between 1 and 2, got 0"),
        ({"stages": np.array(["bulk"])}, "IndexError"),
        ({"steps": np.array(1)}, "TypeError"),
        ({"samples": np.array(["a"])}, "TypeError"),
        ({"about": "{"}, "JSONDecodeError"),
        ({"about": "[]"}, "about must be a dictionary, got list"),
    ],
)
def test_frames_that_do_not_fit_together_are_refused(tmp_path, change, message):
    path = course(2).save(tmp_path / "run.npz", about={})
    with np.load(path) as stored:
        values = dict(stored)
    np.savez(path, **values | change)
    with pytest.raises(ValueError, match=rf"(?s)run\.npz holds frames that do not .*{message}"):
        pl.Frames.load(path)


def test_reconstruct_calls_frames():
    data = pl.digits(3)
    model = pl.RandomFeatures(data.d, 6 * data.d * data.n, "relu")
    frames = pl.Frames()
    record = pl.reconstruct(
        model, pl.fit_min_norm(model, data.X, data.y), data.n, callback=frames, progress=False
    )
    assert len(frames.losses) == len(record.history)
    images = pl.film(data, frames, height=16)
    assert len(images) == len(frames)
    last = pl.compare(data.X, frames.all()[-1].samples)
    assert last.recovered(error="up_to_sign") == 3


def test_picture_rows_places_every_pixel():
    row = np.zeros((3, 2, 2))
    row[1, 0, 1] = 1.0
    image = np.asarray(picture_rows([row, 1 - row], height=4, columns=3))
    assert image.shape == (2 * (4 + 4) - 4, 3 * (4 + 4) - 4, 3)
    assert (image[:2, 10:12] == 255).all() and (image[2:4, 8:12] == 0).all()
    assert (image[8:10, 10:12] == 0).all() and (image[10:12, 8:12] == 255).all()
    wrapped = np.asarray(picture_rows([row, row], height=4, columns=2))
    assert wrapped.shape[0] == 2 * (2 * 8 + 4) - 8


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "at least one"),
        ([np.zeros((2, 4, 4)), np.zeros((3, 4, 4))], r"\[2, 3\]"),
        ([np.full((2, 4, 4), 1.5)], "must lie in"),
        ([np.full((2, 4, 4), np.nan)], "must lie in"),
        ([np.zeros((4, 4))], r"\(n, H, W\)"),
    ],
)
def test_pictures_that_do_not_fit_are_refused(rows, words):
    with pytest.raises(ValueError, match=words):
        picture_rows(rows)


def test_an_animation_holds_its_pictures_in_order(tmp_path):
    greys = [0.0, 1.0, 0.0]
    images = [picture_rows([np.full((1, 8, 8), grey)], height=8) for grey in greys]
    path = pl.save_animation(images, "film", seconds=0.3, hold=2.0, folder=tmp_path)
    with Image.open(path) as film:
        assert film.n_frames == 3 and film.info["loop"] == 0
        shades, times = [], []
        for k in range(3):
            film.seek(k)
            shades.append(np.asarray(film.convert("L"))[4, 4])
            times.append(film.info["duration"])
    assert shades[0] < 10 and shades[1] > 245 and shades[2] < 10
    assert times == [100, 100, 2000]
    assert [p.name for p in tmp_path.iterdir()] == ["film.gif"]


def test_an_animation_of_one_picture_is_refused(tmp_path):
    image = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="at least two"):
        pl.save_animation([image], "film", folder=tmp_path)
    with pytest.raises(ValueError, match="of one size"):
        pl.save_animation([image, Image.new("RGB", (5, 4))], "film", folder=tmp_path)
    assert not list(tmp_path.iterdir())
