"""CONTRIBUTING.md as its readers follow it: its code runs in order, and what it names is there."""

import re
import textwrap
from pathlib import Path

import pytest

from paperlib import compare, reconstruct
from paperlib.reconstruct import SOLVERS

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [textwrap.dedent(text) for _, found, text in BLOCK.findall(TEXT) if found == language]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """What a reader has after typing every block, and the folder the figures went to."""
    folder = tmp_path_factory.mktemp("figures")
    names = {"__name__": "contributing"}
    solvers = dict(SOLVERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERLIB_FIGURES", str(folder))
        for block in blocks("python"):
            exec(compile(block, "CONTRIBUTING.md", "exec"), names)
        names["again"] = reconstruct(
            names["model"], names["theta"], 5, solver="lbfgs", max_steps=100, seed=1
        )
    SOLVERS.clear()
    SOLVERS.update(solvers)
    return names, folder


def test_there_is_a_way_to_add_each_thing():
    headings = re.findall(r"^## (.*)$", TEXT, re.MULTILINE)
    assert {"Add an activation", "Add a solver", "Add a figure", "Add a chapter"} <= set(headings)
    assert len(blocks("python")) == 4


def test_the_new_activation_gives_the_data_back(followed):
    names, _ = followed
    assert names["record"].explained
    assert compare(names["data"].X, names["record"].samples).recovered() == 5


def test_the_new_solver_lowers_the_loss_and_repeats(followed):
    names, _ = followed
    mine = names["mine"]
    assert mine.options["solver"] == "lbfgs" and mine.options["max_steps"] == 100
    assert mine.loss < 1e-2 * mine.history[0]["loss"]
    assert names["again"].loss == mine.loss
    assert "lbfgs" not in SOLVERS


def test_the_new_figure_is_saved_with_its_data(followed):
    _, folder = followed
    assert sorted(path.name for path in folder.iterdir()) == [
        f"two_descents.{kind}" for kind in ("csv", "json", "pdf", "png")
    ]


@pytest.mark.parametrize("name", re.findall(r"\]\(([^)#]+)", TEXT))
def test_links_resolve(name):
    assert name.startswith("https://") or (ROOT / name).exists()


def test_what_is_named_in_code_is_there():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"^make ([a-z-]+)", "".join(blocks("sh")), re.MULTILINE)) <= set(targets)
    assert "_ACTIVATIONS = {" in (ROOT / "paperlib/activations.py").read_text()
