from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from paperlib.data import (
    cifar10,
    digits,
    faces,
    image_folder,
    photographs,
    sphere,
)
from paperlib.data.dataset import DataSet
from paperlib.data.photographs import SPLITS, SUBJECTS, _photograph
from paperlib.data.selection import ClassPool, Item, choose


@pytest.fixture
def folder(tmp_path):
    """Pictures of 12 x 10 pixels: 6 each of frog and truck, 3 of them deeper down, and a copy."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("frog", "truck"):
            below = tmp_path / split / name / "more"
            below.mkdir(parents=True)
            for i in range(6):
                pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
                place = below if i < 3 else below.parent
                Image.fromarray(pixels).save(place / f"{i:04}.png")
    return tmp_path


MAKERS = {
    "photographs": lambda n, **k: photographs(n, **k),
    "photographs grey": lambda n, **k: photographs(n, size=16, grey=True, **k),
    "photographs grid": lambda n, **k: photographs(n, scale=2, **k),
    "photographs large": lambda n, **k: photographs(n, size=64, **k),
    "photographs per channel": lambda n, **k: photographs(n, per_channel=True, **k),
    "digits": lambda n, **k: digits(n, **k),
    "faces": lambda n, **k: faces(n, **k),
    "faces only": lambda n, **k: faces(n, faces_only=True, **k),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_every_picture_data_set_keeps_its_promises(make):
    data = make(9, dtype=torch.float64)
    assert data.X.shape == (9, data.d) and data.d == np.prod(data.image_shape)
    assert len(data) == data.n == len(data.names) == 9
    torch.testing.assert_close(data.X.norm(dim=1), torch.full((9,), data.d**0.5).double())
    assert set(data.y.tolist()) == {-1.0, 1.0} and abs(int(data.y.sum())) == 1
    assert torch.equal(data.y, 2.0 * data.class_index - 1)

    pictures = data.images()
    assert pictures.shape == (9, *data.image_shape)
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert len(np.unique(pictures.reshape(9, -1), axis=0)) == 9
    # Whether the pictures are the right ones: standardising them by hand gives X back.
    axes = (0, 1, 2) if data.mean.ndim else None
    z = ((pictures - pictures.mean(axis=axes)) / pictures.std(axis=axes)).reshape(9, -1)
    X = z / np.linalg.norm(z, axis=1, keepdims=True) * data.d**0.5
    np.testing.assert_allclose(data.X.numpy(), X, atol=1e-10)

    again, longer, other = make(9), make(10), make(9, seed=1)
    assert again.X.dtype == torch.float32 and torch.equal(again.X, data.X.float())
    assert again.names == data.names == longer.names[:9]
    assert not torch.equal(again.X, other.X)
    np.testing.assert_allclose(longer.images()[:9], pictures, atol=1e-6)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_bad_requests_are_refused_by_every_data_set(make):
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        make(0)
    with pytest.raises(TypeError, match="n must be a whole number"):
        make(2.5)
    with pytest.raises(ValueError, match=r"n = 100000 pictures asked for, \d+ are available"):
        make(100_000)
    with pytest.raises(ValueError, match="labels must be one of binary, one-hot"):
        make(4, labels="words")
    with pytest.raises(TypeError, match="dtype must be"):
        make(4, dtype=torch.float16)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        make(4, seed=-1)


def test_what_is_said_to_be_available_is_available():
    for make, options in (
        (faces, {}),
        (faces, {"faces_only": True}),
        (digits, {"classes": (3, 8)}),
    ):
        with pytest.raises(ValueError) as error:
            make(100_000, **options)
        available = int(str(error.value).split(",")[1].split()[0])
        assert len(make(available, **options)) == available
        with pytest.raises(ValueError, match=f"{available} are available"):
            make(available + 1, **options)


def test_global_random_state_is_neither_read_nor_written():
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = photographs(4).X, sphere(4, 10).X
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(photographs(4).X, first[0]) and torch.equal(sphere(4, 10).X, first[1])


def test_unpacking_gives_rows_labels_and_the_way_back():
    X, y, images = photographs(4)
    assert X.shape == (4, 3072) and y.shape == (4,)
    assert images(X).shape == (4, 32, 32, 3)


def test_samples_become_pictures_with_the_contrast_of_their_training_sample():
    data = digits(6, dtype=torch.float64)
    order = [3, 0, 5]
    np.testing.assert_allclose(
        data.images(data.X[order], index=order), data.images()[order], atol=1e-12
    )
    # Without an index the mean contrast stands in; a row without a partner has index -1.
    plain = data.images(data.X[:2])
    by_hand = data.mean + data.scale * data.contrast.mean() * data.X[:2].numpy()
    np.testing.assert_allclose(plain, np.clip(by_hand, 0, 1).reshape(2, 8, 8), atol=1e-12)
    np.testing.assert_array_equal(data.images(data.X[:2], index=[-1, -1]), plain)
    assert np.abs(plain - data.images()[:2]).max() > 1e-3  # so the contrast does matter
    # What lies outside [0, 1] is clipped, not wrapped.
    wild = data.images(50 * data.X[:1])
    assert wild.min() == 0 and wild.max() == 1


@pytest.mark.parametrize(
    ("samples", "index", "message"),
    [
        (torch.zeros(2, 63), None, r"samples must have shape \(m, 64\), got \(2, 63\)"),
        (torch.full((2, 64), torch.nan), None, "samples must be finite"),
        (torch.zeros(2, 64), [0], "index must be 2 whole numbers"),
        (torch.zeros(2, 64), [0.0, 1.0], "index must be 2 whole numbers"),
        (torch.zeros(2, 64), [0, 4], "index must lie between -1 and 3"),
    ],
)
def test_samples_that_cannot_be_shown_are_refused(samples, index, message):
    with pytest.raises(ValueError, match=message):
        digits(4).images(samples, index=index)


def test_pictures_made_by_hand_have_one_contrast():
    data = digits(4)
    alike = DataSet(
        X=data.X,
        y=data.y,
        class_index=data.class_index,
        class_names=data.class_names,
        names=data.names,
        image_shape=data.image_shape,
    )
    images = alike.images()
    rows = np.clip(data.X.numpy().astype(np.float64), 0, 1)
    np.testing.assert_array_equal(images, rows.reshape(4, 8, 8))
    np.testing.assert_array_equal(alike.images(data.X[[2, 0]], index=[2, -1]), images[[2, 0]])


def test_vectors_are_no_pictures():
    with pytest.raises(ValueError, match="vectors, not pictures"):
        sphere(3, 10).images()


def test_moving_to_another_type_keeps_the_pictures():
    data = photographs(4)
    moved = data.to(dtype=torch.float64)
    assert moved.X.dtype == moved.y.dtype == torch.float64 and data.X.dtype == torch.float32
    assert moved.class_index.dtype == torch.int64
    np.testing.assert_array_equal(moved.images(), data.images())


def test_subject_squares_lie_inside_their_photographs_and_are_averaged_over_blocks():
    for photograph, subjects in SUBJECTS.items():
        width, height = _photograph(photograph).size
        for top, left, side in subjects.values():
            assert 0 <= top <= height - side and 0 <= left <= width - side and side % 32 == 0
    data = photographs(2, classes=("chelsea", "coffee"))
    assert data.names == ("chelsea: cat", "coffee: cup")
    top, left, side = SUBJECTS["chelsea"]["cat"]
    cut = np.asarray(_photograph("chelsea"))[top : top + side, left : left + side]
    block = side // 32
    averaged = cut.reshape(32, block, 32, block, 3).mean(axis=(1, 3)) / 255
    assert (
        np.abs(data.images()[0] - averaged).max() < 1.01 / 255
    )  # rounded to 8 bits, columns first and then rows


def test_photographs_take_finer_patches_when_many_are_asked_for():
    assert photographs(10).names[0].split(": ")[1] in ("face", "cat", "dahlia")
    many = photographs(60)
    assert "row" in many.names[0] and len(set(many.names)) == 60
    assert len(photographs(400)) == 400
    with pytest.raises(ValueError, match="available when the classes are balanced"):
        photographs(60, scale="subjects")


def test_splits_share_no_photograph():
    assert not set(SPLITS["train"]) & set(SPLITS["other"])
    assert set(SPLITS["train"]) | set(SPLITS["other"]) == set(SPLITS["all"])
    for split in ("train", "other"):
        data = photographs(12, split=split)
        assert {name.split(":")[0] for name in data.names} == set(SPLITS[split])


def test_photographs_as_classes():
    data = photographs(12, labels="one-hot")
    assert data.y.shape == (12, 6) and data.y.sum(dim=0).tolist() == [2.0] * 6
    assert torch.equal(data.y.argmax(dim=1), data.class_index)
    for name, c in zip(data.names, data.class_index, strict=True):
        assert name.split(":")[0] == data.class_names[c]
    two = photographs(6, classes=(("rocket", "china"), "chelsea"))
    assert two.class_names == ("rocket or china", "chelsea")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("chelsea", "dog")}, "unknown photograph.*'dog': known are astronaut"),
        ({"classes": ("chelsea", "rocket"), "split": "other"}, "unknown.*'chelsea'.*flower"),
        ({"classes": ("chelsea", "chelsea")}, "name each"),
        ({"classes": ("chelsea",)}, "binary labels need exactly two classes, got 1"),
        ({"classes": ()}, "at least one"),
        ({"split": "test"}, "split must be one of all, train, other"),
        ({"scale": "tiny"}, 'scale must be "subjects"'),
        ({"scale": 0}, "scale must be at least 1"),
        ({"size": 600}, "no picture of 600 x 600 fits"),
    ],
)
def test_photographs_that_are_not_there(options, message):
    with pytest.raises(ValueError, match=message):
        photographs(4, **options)


def test_digits_carry_their_own_labels():
    data = digits(20, labels="one-hot")
    assert data.y.shape == (20, 10) and data.y.sum(dim=0).tolist() == [2.0] * 10
    assert [f"digit {c}" for c in data.class_index.tolist()] == list(data.names)
    even_odd = digits(10)
    assert even_odd.class_names == ("even", "odd")
    for name, y in zip(even_odd.names, even_odd.y.tolist(), strict=True):
        assert int(name[-1]) % 2 == (y + 1) / 2
    with pytest.raises(ValueError, match="unknown digit 10: known are 0, 1"):
        digits(4, classes=(1, 10))


def test_faces_know_what_a_face_is():
    data = faces(20)
    for name, y in zip(data.names, data.y.tolist(), strict=True):
        assert name.startswith("face" if y > 0 else "background")
    alone = faces(100, faces_only=True)
    assert all(name.startswith("face") for name in alone.names) and int(alone.y.sum()) == 0


def test_seeds_that_the_generator_cannot_tell_apart_are_refused():
    assert not torch.equal(sphere(3, 10, 2**32 - 1).X, sphere(3, 10, 0).X)
    for seed in (2**32, 2**70):
        with pytest.raises(ValueError, match=rf"seed must be .* below 2\^32, got {seed}"):
            sphere(3, 10, seed)


def test_sphere_follows_its_definition():
    data = sphere(2000, 20, seed=3, dtype=torch.float64)
    assert data.X.shape == (2000, 20) and data.y.shape == (2000,)
    torch.testing.assert_close(data.X.norm(dim=1), torch.full((2000,), 20**0.5).double())
    # Uniform on the sphere: mean 0, covariance I.
    assert data.X.mean(dim=0).abs().max() < 0.1
    assert (data.X.T @ data.X / 2000 - torch.eye(20)).abs().max() < 0.15
    # What a linear fit leaves of the labels is the noise.
    g = torch.linalg.lstsq(data.X, data.y[:, None]).solution
    assert (data.y - (data.X @ g)[:, 0]).std() == pytest.approx(0.5, abs=0.03)
    clean = sphere(50, 20, seed=3, noise=0.0, dtype=torch.float64)
    g = torch.linalg.lstsq(clean.X, clean.y[:, None]).solution
    torch.testing.assert_close((clean.X @ g)[:, 0], clean.y)
    assert 0.2 < g.norm() < 3  # g ~ N(0, I / d): its norm is near 1

    assert torch.equal(sphere(5, 7, 2).X, sphere(5, 7, 2, dtype=torch.float64).X.float())
    assert not torch.equal(sphere(5, 7, 2).X, sphere(5, 7, 3).X)
    for bad in ({"n": 0, "d": 5}, {"n": 5, "d": 1}, {"n": 5, "d": 5, "noise": -1.0}):
        with pytest.raises(ValueError, match="at least"):
            sphere(**bad)


def test_cifar10_from_a_folder_of_pictures(folder, monkeypatch):
    monkeypatch.delenv("PAPERLIB_CIFAR10", raising=False)
    data = cifar10(8, root=folder)
    assert data.image_shape == (10, 12, 3) and data.y.tolist() == [-1.0, 1.0] * 4
    assert all(name.startswith(("frog", "truck")[i % 2]) for i, name in enumerate(data.names))
    stored = {np.asarray(Image.open(p)).tobytes() for p in (folder / "train").rglob("*.png")}
    for picture in data.images():
        assert np.round(255 * picture).astype(np.uint8).tobytes() in stored

    monkeypatch.setenv("PAPERLIB_CIFAR10", str(folder))
    assert torch.equal(cifar10(8).X, data.X)
    assert not torch.equal(cifar10(8, split="test").X, data.X)
    assert cifar10(4, labels="one-hot").y.shape == (4, 2)
    with pytest.raises(ValueError, match="13 pictures asked for, 12 are available"):
        cifar10(13)
    with pytest.raises(ValueError, match="unknown class 'lorry': known are airplane, automobile"):
        cifar10(4, classes=("frog", "lorry"))
    with pytest.raises(TypeError, match="classes must be a sequence"):
        cifar10(4, classes="frog")
    with pytest.raises(ValueError, match="exactly two classes, got 10"):
        cifar10(4, classes="all")
    with pytest.raises(ValueError, match="split must be train or test"):
        cifar10(4, split="valid")


def test_cifar10_says_what_it_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="looked for pictures in .*train.*cifar-10-batches"):
        cifar10(4, root=tmp_path)
    with pytest.raises(FileNotFoundError, match="looked for"):
        cifar10(4, root=tmp_path / "nowhere")


class _StoredCifar:
    """Stands for torchvision.datasets.CIFAR10: 40 pictures, four of each class."""

    calls = []

    def __init__(self, root, train, download):
        self.calls.append({"root": str(root), "train": train, "download": download})
        self.data = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
        self.targets = [i % 10 for i in range(40)]


def test_cifar10_without_a_network_says_where_it_may_be_put(tmp_path, monkeypatch):
    def no_network(folder, *, train, download):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", no_network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PAPERLIB_CIFAR10", raising=False)
    with pytest.raises(FileNotFoundError, match=r"(?s)not known.*PAPERLIB_CIFAR10"):
        cifar10(4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be at least 1"),
        ({"n": 4, "seed": -1}, ValueError, "seed must be at least 0"),
        ({"n": 4, "dtype": torch.float16}, TypeError, "dtype must be"),
    ],
)
def test_cifar10_is_not_downloaded_for_a_request_without_sense(
    tmp_path, monkeypatch, options, error, message
):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", _StoredCifar)
    monkeypatch.setattr(_StoredCifar, "calls", [])
    monkeypatch.delenv("PAPERLIB_CIFAR10", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(error, match=message):
        cifar10(**options)
    assert _StoredCifar.calls == []


def test_cifar10_through_torchvision(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10", _StoredCifar)
    monkeypatch.setattr(_StoredCifar, "calls", [])
    monkeypatch.delenv("PAPERLIB_CIFAR10", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    data = cifar10(40, classes="all", labels="one-hot")
    assert data.y.shape == (40, 10) and data.y.sum(dim=0).tolist() == [4.0] * 10
    pixels = _StoredCifar(None, True, False)
    for name, picture, c in zip(data.names, data.images(), data.class_index, strict=True):
        i = int(name.split()[-1])
        assert pixels.targets[i] == c
        np.testing.assert_array_equal(np.round(255 * picture), pixels.data[i])
    expected = {"root": str(tmp_path / "cache" / "paperlib"), "train": True, "download": True}
    assert _StoredCifar.calls[0] == expected

    (tmp_path / "mine" / "cifar-10-batches-py").mkdir(parents=True)
    cifar10(4, root=tmp_path / "mine", split="test", grey=True)
    assert _StoredCifar.calls[-1] == {
        "root": str(tmp_path / "mine"),
        "train": False,
        "download": False,
    }


def test_image_folder_resizes_and_reads_only_what_it_chose(folder):
    root = folder / "train"
    (root / "frog" / "zzzz.txt").write_text("not a picture, and not taken for one")
    data = image_folder(12, root, size=5)
    assert data.image_shape == (5, 5, 3) and data.class_names == ("frog", "truck")
    first = next(
        p
        for p in root.rglob("*.png")
        if f"{p.parts[-3]}: {p.name}" == data.names[0]
        or f"{p.parts[-2]}: {p.name}" == data.names[0]
    )
    middle = np.asarray(Image.open(first), dtype=float)[:, 1:11] / 255
    averaged = middle.reshape(5, 2, 5, 2, 3).mean(axis=(1, 3))
    assert np.abs(data.images()[0] - averaged).max() < 1.01 / 255

    assert image_folder(4, root, size=24).image_shape == (24, 24, 3)
    assert image_folder(4, root, grey=True).image_shape == (10, 12)
    assert image_folder(4, root, classes=("truck", "frog")).class_names == ("truck", "frog")

    Image.new("RGB", (4, 4), "red").save(root / "frog" / "small.png")
    with pytest.raises(ValueError, match=r"differ in size, got .*pass size="):
        image_folder(13, root)
    (root / "frog" / "small.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"not a readable picture: .*small.png"):
        image_folder(13, root)


def test_image_folder_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder with one subfolder"):
        image_folder(4, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="found none"):
        image_folder(4, tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "void").mkdir()
    with pytest.raises(ValueError, match="0 are available"):
        image_folder(4, tmp_path)


def test_copies_are_chosen_once(folder):
    root = folder / "train"
    for path in list((root / "truck").rglob("*.png")):
        path.with_name(f"copy-{path.name}").write_bytes(path.read_bytes())
    data = image_folder(12, root)
    assert len(np.unique(data.X.numpy(), axis=0)) == 12
    for path in list((root / "frog").rglob("*.png")):
        path.with_name(f"copy-{path.name}").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="only 12 different ones could be chosen"):
        image_folder(14, root)


def test_flat_pictures_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), "red").save(tmp_path / name / "1.png")
    with pytest.raises(ValueError, match="flat colour"):
        image_folder(1, tmp_path, grey=True)


def test_members_of_a_class_take_turns():
    pools = [
        ClassPool("a", tuple(tuple(Item(f"{m}{i}", (m, i)) for i in range(4)) for m in "xyz")),
        ClassPool("b", (tuple(Item(f"w{i}", ("w", i)) for i in range(9)),)),
    ]
    items, _, classes = choose(pools, 12, lambda key: np.array([ord(key[0]), key[1]]), seed=5)
    assert classes.tolist() == [0, 1] * 6
    turns = [item.name[0] for item in items[::2]]
    assert sorted(turns[:3]) == sorted(turns[3:]) == ["x", "y", "z"]
