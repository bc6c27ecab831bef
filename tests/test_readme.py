"""What the README says: its links lead somewhere, its code runs, its commands exist."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import nbformat
import pytest
import yaml

from paperlib.notebook_source import check_values

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

IMAGE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language):
    return [text for found, text in BLOCK.findall(README) if found == language]


def commands():
    """Every line of the shell blocks, continued lines joined."""
    text = "\n".join(blocks("sh")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def papermill_calls():
    return [shlex.split(line) for line in commands() if "papermill" in line]


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_picture_comes_first():
    first = IMAGE.search(README)
    assert first and first.start() < README.index("**")


def test_every_picture_is_there_and_has_alternative_text():
    pictures = IMAGE.findall(README)
    assert len(pictures) >= 2
    for alternative, target in pictures:
        assert len(alternative.split()) >= 5, target
        assert (ROOT / target).is_file(), target


@pytest.mark.parametrize("target", sorted(set(LINK.findall(README))))
def test_links_inside_the_repository_resolve(target):
    if target.startswith(("https://", "http://")):
        pytest.skip("outside the repository")
    path, _, anchor = target.partition("#")
    assert (ROOT / path).exists()
    if anchor and path in ("", "README.md"):
        assert anchor in {slug(h) for h in re.findall(r"^#+ (.*)$", README, re.MULTILINE)}


def test_links_lead_to_what_the_book_holds():
    """The README is its first page; what is left out there is named, not linked."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    held = re.search(r"^BOOK_SOURCES := (.*)$", makefile, re.MULTILINE)[1].split()
    inside = {target.partition("#")[0] for target in LINK.findall(README) if "://" not in target}
    assert {path.partition("/")[0] for path in inside} <= {*held, ""}


def test_make_targets_exist():
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert {"figures", "test"} <= named <= targets


def test_python_blocks_run():
    assert blocks("python")
    for block in blocks("python"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
        assert "explained and identified" in out.getvalue()
        assert re.search(r"\b(\d+) of \1\b", out.getvalue()), "not all samples came back"


@pytest.mark.parametrize("call", papermill_calls(), ids=lambda call: Path(call[-1]).name)
def test_papermill_examples_name_parameters_that_the_notebook_takes(call):
    notebook = next(ROOT / word for word in call if word.startswith("notebooks/0"))
    parameters = {}
    for k, word in enumerate(call):
        if word == "-p":
            parameters[call[k + 1]] = yaml.safe_load(call[k + 2])
        elif word == "-y":
            parameters |= yaml.safe_load(call[k + 1])
        elif word == "-f":
            parameters |= yaml.safe_load((ROOT / call[k + 1]).read_text(encoding="utf-8"))
    assert parameters
    check_values(nbformat.read(notebook, as_version=4), parameters)


def test_there_are_three_papermill_examples():
    assert len(papermill_calls()) == 3


def test_every_notebook_and_every_data_set_is_told_of():
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{notebook.name}" in README
    for name in ("photographs", "digits", "faces", "cifar10", "image_folder", "sphere"):
        assert f"| `{name}` |" in README


def test_chapters_of_the_figures_stand_in_reading_order():
    rows = [line for line in README.splitlines() if line.startswith("| [")]
    chapters = [re.search(r"notebooks/(\w+)\.ipynb", row)[1] for row in rows]
    assert chapters == sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "benchmarks/README.md"])
def test_formulas_survive_markdown(name):
    r"""On the repository's web page a backslash before punctuation goes: `\,` becomes a comma."""
    text = BLOCK.sub("", (ROOT / name).read_text(encoding="utf-8"))
    formulas = re.findall(r"\$([^$\n]+)\$", re.sub(r"`[^`\n]+`", "", text))
    assert [formula for formula in formulas if re.search(r"\\[^a-zA-Z]", formula)] == []
