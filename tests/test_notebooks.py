"""What every committed notebook must be, so that comparing it with nbval means something.

nbval passes a notebook that was never run, and compares only the text of tagged cells.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from tiny_notebook import CHECK, PARAMETERS, write_notebook

from paperlib.notebook_pictures import describe_pictures, pictures_of
from paperlib.notebook_source import code_cells, declared_parameters, find_check, syntax, tags
from paperlib.run_notebooks import PROFILES, check, find_jobs, main

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

CHECKED = "nbval-check-output"
MACHINE_PATH = re.compile(r"(?<![\w.:/])/(work|home|tmp|root|Users|mnt|private)/")

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def text_of(output):
    """The text that nbval compares: streams and plain results."""
    return output.get("text", "") + output.get("data", {}).get("text/plain", "")


def faults(path):
    """What is wrong with a committed notebook, in words."""
    notebook = read(path)
    cells = code_cells(notebook)
    trees = [syntax(cell) for cell in cells]
    outputs = [output for cell in cells for output in cell.outputs]
    found = []

    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        found.append("the first cell is not a title")
    counts = [cell.execution_count for cell in cells]
    if not cells or counts != list(range(1, len(cells) + 1)):
        found.append(f"not executed from top to bottom: execution counts {counts}")
    if any(output.output_type == "error" for output in outputs):
        found.append("a cell ended in an error")
    if any(output.get("name") == "stderr" for output in outputs):
        found.append("something was written to stderr")

    try:
        if not declared_parameters(notebook):
            found.append("no cell tagged 'parameters' that sets something")
    except ValueError as error:
        found.append(str(error))
    if find_check(notebook) is None:
        found.append("the parameters are not checked with check_parameters")
    if any("injected-parameters" in tags(cell) for cell in cells):
        found.append("parameters were injected")

    checked = [cell for cell in cells if CHECKED in tags(cell)]
    if not checked:
        found.append(f"no cell tagged {CHECKED!r}")
    if not all("".join(map(text_of, cell.outputs)).strip() for cell in checked):
        found.append(f"a cell tagged {CHECKED!r} printed nothing that could be compared")
    if any("# NBVAL" in cell.source for cell in cells):
        found.append("a comment for nbval, which is easily overlooked: use the tag")

    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    if not any(module.split(".")[0] == "paperlib" for module in modules):
        found.append("paperlib is not imported")
    if any(isinstance(node, ast.ClassDef) for node in nodes):
        found.append("a class is defined: models and solvers belong in paperlib")

    found += [f"a path of one machine: {place}" for place in machine_paths(notebook)]
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    if {"papermill", "widgets"} & set(notebook.metadata):
        found.append("the metadata hold traces of a run")
    return found


def machine_paths(notebook):
    """Where a folder of one machine is named; not in pictures: base64 may hold "/tmp/"."""
    texts = [("metadata", str(dict(notebook.metadata)))]
    for number, cell in enumerate(notebook.cells):
        texts += [(f"cell {number}", cell.source), (f"cell {number}", str(dict(cell.metadata)))]
        for output in cell.get("outputs", []):
            texts += [(f"output of cell {number}", output.get("text", ""))]
            texts += [
                (f"output of cell {number}", str(value))
                for kind, value in output.get("data", {}).items()
                if not kind.startswith("image/") or kind == "image/svg+xml"
            ]
    return [place for place, text in texts if MACHINE_PATH.search(text)]


@every_notebook
def test_committed_notebook(path):
    assert faults(path) == []


PROFILE_FOLDERS = {path.name for path in (ROOT / "notebooks/parameters").glob("*/")}


@pytest.mark.parametrize("profile", sorted({*PROFILES, *PROFILE_FOLDERS}))
def test_parameter_files_fit_their_notebooks(profile):
    check(find_jobs(ROOT, profile))


PARAMETER_FILES = sorted((ROOT / "notebooks/parameters").glob("*/*.yaml"))


@pytest.mark.parametrize("path", PARAMETER_FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_long_run_keeps_what_it_has_finished(path):
    takes = declared_parameters(read(ROOT / "notebooks" / f"{path.stem}.ipynb"))
    given = yaml.safe_load(path.read_text())
    assert "store" not in takes or given["store"].startswith(f"../executed/{path.parent.name}/")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A tiny notebook, executed as the committed ones are."""
    root = tmp_path_factory.mktemp("executed")
    write_notebook(
        root / "notebooks/tiny.ipynb",
        CHECK,
        "# checked\nprint(f'recovered {n} of {n}')",
        parameters=PARAMETERS,
    )
    assert main(["--root", str(root), "--in-place"]) == 0
    return root / "notebooks/tiny.ipynb"


def nbval(path):
    """The exit status of pytest on one notebook, with the options of `make notebook-tests`."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
        + ["--nbval-lax", "--nbval-current-env", "--rootdir", str(path.parent), str(path)],
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")},
        cwd=path.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    ).returncode


def test_nbval_passes_what_was_committed_and_fails_a_changed_number(executed):
    assert faults(executed) == []
    assert nbval(executed) == pytest.ExitCode.OK
    mutated = executed.with_name("mutated.ipynb")
    notebook = read(executed)
    output = notebook.cells[-1].outputs[0]
    assert output.text == "recovered 3 of 3\n"
    output.text = "recovered 2 of 3\n"
    nbformat.write(notebook, mutated)
    assert nbval(mutated) == pytest.ExitCode.TESTS_FAILED


def set_last_source(source):
    def change(notebook):
        notebook.cells[-1].source = source

    return change


def stderr(notebook):
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", name="stderr", text="Warning")]


def error(notebook):
    notebook.cells[1].outputs = [
        nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
    ]


def path_in_output(notebook):
    notebook.cells[-1].outputs[0].text = "saved /home/someone/figure.png"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda nb: nb.cells.pop(0), "title"),
        (lambda nb: nb.cells[-1].update(execution_count=9), "execution counts"),
        (lambda nb: nb.cells[-1].update(execution_count=None, outputs=[]), "execution counts"),
        (lambda nb: nb.cells[-1].update(outputs=[]), "nothing that could be compared"),
        (lambda nb: nb.cells[-1].metadata.update(tags=[]), "no cell tagged 'nbval"),
        (lambda nb: nb.cells[1].metadata.update(tags=[]), "no cell tagged 'parameters'"),
        (lambda nb: nb.cells[1].update(source="n = 2 * 3"), "NAME = LITERAL"),
        (lambda nb: nb.cells[2].update(source="import paperlib"), "not checked"),
        (lambda nb: nb.cells[2].update(source="check_parameters()"), "paperlib is not imported"),
        (error, "error"),
        (stderr, "stderr"),
        (set_last_source("class Model: pass"), "class"),
        (set_last_source("print(1)  # NBVAL_CHECK_OUTPUT: x"), "comment for nbval"),
        (set_last_source("open('/tmp/x')"), "a path of one machine: cell 3"),
        (path_in_output, "a path of one machine: output of cell 3"),
        (lambda nb: nb.metadata.update(papermill={"input_path": "/work/a"}), "traces of a run"),
        (lambda nb: nb.metadata.kernelspec.update(name="mine"), "kernel"),
    ],
)
def test_every_fault_is_found(executed, tmp_path, change, fault):
    notebook = read(executed)
    change(notebook)
    path = tmp_path / "changed.ipynb"
    nbformat.write(notebook, path)
    assert any(fault in found for found in faults(path))


@every_notebook
def test_pictures_are_described_to_those_who_do_not_see_them(path):
    committed, described = read(path), read(path)
    describe_pictures(described, ROOT / "figures")
    for cell, other in zip(committed.cells, described.cells, strict=True):
        for output, now in zip(pictures_of(cell), pictures_of(other), strict=True):
            text = now.metadata.get("image/png", {}).get("alt", "")
            assert len(text.split()) >= 5, f"{cell.id}: save the figure, or add **Figure N.** below"
            assert output.metadata == now.metadata, f"{cell.id}: make notebooks refreshes its words"


@every_notebook
def test_links_between_chapters_resolve(path):
    cells = read(path).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(([\w./-]+\.ipynb)\)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"
