import json
import os
import re

import nbformat
import pytest
from tiny_notebook import CHECK, PARAMETERS, write_notebook

from paperlib import notebook_job
from paperlib.notebook_job import Job, file_hash
from paperlib.notebook_source import (
    check_values,
    code_cells,
    declared_parameters,
    normalised,
    tags,
)
from paperlib.replace_file import replace_file
from paperlib.run_notebooks import check, find_jobs, main
from paperlib.run_notebooks import run as run_notebook

DRAW = """
import os, pathlib
pathlib.Path(os.environ["PAPERLIB_FIGURES"], "drawn.png").write_bytes(b"picture")
"""


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project of one notebook, with a package of its own whose code the records watch."""
    monkeypatch.delenv("PAPERLIB_FIGURES", raising=False)
    (tmp_path / "package").mkdir()
    (tmp_path / "package/solver.py").write_text("STEPS = 1")
    monkeypatch.setattr(notebook_job, "PACKAGE", tmp_path / "package")
    write_notebook(tmp_path / "notebooks/a.ipynb", CHECK, "print(n)", parameters=PARAMETERS)
    return tmp_path


def parameter_file(root, content, profile="laptop", name="a"):
    path = root / "notebooks/parameters" / profile / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def run(root, *arguments):
    return main(["--root", str(root), *arguments])


def printed(path):
    cells = code_cells(nbformat.read(path, as_version=4))
    return "".join(output.get("text", "") for cell in cells for output in cell.outputs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learnin_rate: 0.1", "expected parameters among n, rate, got learnin_rate"),
        ("n: 0", "n: expected a whole number of at least 1, got 0"),
        ("rate: 1e-3", "rate: expected a finite number above 0, got '1e-3' .*in YAML write"),
        ("- n", "expected lines NAME: VALUE, got a list"),
        ("n: [", "not YAML"),
    ],
)
def test_bad_parameters_are_an_error_before_anything_runs(root, capsys, content, message):
    write_notebook(root / "notebooks/b.ipynb", "print(1)")
    parameter_file(root, content)
    with pytest.raises(ValueError, match=f"(?s)laptop/a.yaml: .*{message}"):
        check(find_jobs(root, "laptop"))
    assert run(root, "--profile", "laptop") == 2
    assert "laptop/a.yaml" in capsys.readouterr().err
    assert not (root / "executed").exists()


def test_good_parameters_pass(root):
    parameter_file(root, "n: 7\nrate: 1.0e-3")
    check(find_jobs(root, "laptop"))


def test_parameter_file_without_its_notebook_is_an_error(root):
    parameter_file(root, "n: 7", name="typo")
    with pytest.raises(ValueError, match=r"typo\.yaml: there is no notebook"):
        find_jobs(root, "laptop")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "huge"], "unknown profile: .*laptop.*got 'huge'"),
        (["b"], "unknown notebook: .*'a'.*got 'b'"),
        (["--jobs", "0"], "--jobs: expected at least 1, got 0"),
    ],
)
def test_bad_command_line(root, capsys, arguments, message):
    assert run(root, *arguments) == 2
    assert re.search(message, capsys.readouterr().err)


def test_folder_without_notebooks_is_an_error(tmp_path):
    assert run(tmp_path) == 2


def test_a_failing_notebook_does_not_stop_the_others(root, capsys):
    half = DRAW.replace("drawn", "half")
    write_notebook(
        root / "notebooks/b.ipynb", "print('before')", half, "raise OSError('b is broken')"
    )
    other = "pathlib.Path('../figures/other.png').write_bytes(b'of another notebook')"
    write_notebook(root / "notebooks/c.ipynb", DRAW, other, "print(os.getcwd())")
    dead = write_notebook(root / "notebooks/d.ipynb", "import os\nos._exit(1)")
    executed = root / "executed/quick"

    assert run(root, "--jobs", "2") == 1
    shown = capsys.readouterr()
    assert "failed: b, d" in shown.err
    assert "b is broken" in shown.out
    assert printed(executed / "a.ipynb") == "3\n"
    assert printed(executed / "c.ipynb") == f"{root / 'notebooks'}\n"
    assert (root / "figures/drawn.png").read_bytes() == b"picture"
    assert not (root / "figures/half.png").exists()
    assert json.loads((executed / "c.json").read_text())["figures"] == ["drawn.png"]
    assert "before" in printed(executed / "b.failed.ipynb")
    assert sorted(path.name for path in executed.glob("?.*")) == sorted(
        ["a.ipynb", "a.json", "b.failed.ipynb", "c.ipynb", "c.json", "d.failed.ipynb"]
    )

    # Mended, only what failed runs again.
    write_notebook(root / "notebooks/b.ipynb", "print('mended')")
    dead.unlink()
    assert run(root) == 0
    shown = capsys.readouterr().out
    assert "a: up to date" in shown and "c: up to date" in shown and "b: done" in shown
    assert not (executed / "b.failed.ipynb").exists()


def test_what_makes_a_notebook_run_again(root):
    write_notebook(root / "notebooks/a.ipynb", DRAW, "print(n)", parameters=PARAMETERS)
    parameters = parameter_file(root, "n: 5")
    job = Job(root, "laptop", "a")
    assert not job.is_up_to_date()
    assert run(root, "--profile", "laptop") == 0
    assert printed(job.executed) == "5\n"
    assert job.is_up_to_date()
    assert json.loads(job.record.read_text())["parameters"] == {"n": 5}
    assert not Job(root, "paper", "a").is_up_to_date()

    for path, change in [
        (job.notebook, lambda old: old.replace(b"print(n)", b"print(n + 1)")),
        (job.executed, lambda old: old + b"\n"),
        (job.record, lambda old: old[: len(old) // 2]),
        (job.record, lambda old: b"[]"),
        (parameters, lambda old: b"n: 6"),
        (root / "package/solver.py", lambda old: b"STEPS = 2"),
        (root / "figures/laptop/drawn.png", None),
        (job.record, None),
        (job.executed, None),
    ]:
        old = path.read_bytes()
        if change is None:
            path.unlink()
        else:
            assert change(old) != old
            path.write_bytes(change(old))
        assert not job.is_up_to_date(), path
        path.write_bytes(old)
        assert job.is_up_to_date()

    # Outputs are no part of what a notebook is made of: refreshing them asks for no new run.
    notebook = nbformat.read(job.notebook, as_version=4)
    notebook.cells[-1].outputs = [nbformat.v4.new_output("stream", text="5\n")]
    nbformat.write(notebook, job.notebook)
    assert job.is_up_to_date()


def test_a_change_of_compiled_code_makes_a_notebook_run_again(root):
    (root / "package/deeper").mkdir()
    keys = [Job(root, "quick", "a").key()]
    for name in ("solver.cpp", "deeper/lanes.h"):
        (root / "package" / name).write_text("// one")
        keys.append(Job(root, "quick", "a").key())
        (root / "package" / name).write_text("// two")
        keys.append(Job(root, "quick", "a").key())
    (root / "package/solver.so").write_bytes(b"compiled from the others")
    assert len(set(keys)) == 5 and Job(root, "quick", "a").key() == keys[-1]


def test_a_change_of_a_stored_run_makes_the_notebook_that_shows_it_run_again(root):
    write_notebook(root / "notebooks/b.ipynb", parameters='stored = ["stored_runs/one.npz"]')
    path = root / "notebooks/stored_runs/one.npz"
    path.parent.mkdir()
    path.write_bytes(b"a run")
    a, b = (Job(root, "quick", name) for name in "ab")
    before = a.key(), b.key()
    path.write_bytes(b"another run")
    assert a.key() == before[0] and b.key() != before[1]


@pytest.mark.parametrize("edited", ["n: 6", "n: ["])
def test_parameters_edited_during_a_run_are_not_those_of_the_run(root, edited):
    path = parameter_file(root, "n: 5")
    edit = f"import pathlib\npathlib.Path({str(path)!r}).write_text({edited!r})"
    write_notebook(root / "notebooks/a.ipynb", edit, "print(n)", parameters=PARAMETERS)
    job = Job(root, "laptop", "a")
    key = job.key()
    run_notebook(job, quiet=True)
    record = json.loads(job.record.read_text())
    assert printed(job.executed) == "5\n"
    assert record["parameters"] == {"n": 5} and record["key"] == key
    assert not job.is_up_to_date()


def test_in_place_writes_clean_outputs(root, capsys):
    path = root / "notebooks/a.ipynb"
    with_bar = "from tqdm.auto import tqdm\nsum(tqdm(range(n)))"
    write_notebook(path, CHECK, with_bar, "# checked\nprint('n is', n)", parameters=PARAMETERS)
    assert run(root, "--in-place") == 0
    assert "a: outputs refreshed" in capsys.readouterr().out
    notebook = nbformat.read(path, as_version=4)
    assert [cell.execution_count for cell in code_cells(notebook)] == [1, 2, 3, 4]
    assert notebook.cells[-1].outputs[0].text == "n is 3\n"
    assert [output.output_type for output in code_cells(notebook)[2].outputs] == ["execute_result"]
    assert notebook.metadata.kernelspec.name == "python3"
    assert [tags(c) for c in code_cells(notebook)] == [
        ["parameters"],
        [],
        [],
        ["nbval-check-output"],
    ]
    text = path.read_text()
    assert text.endswith("}\n")
    assert str(root) not in text and "papermill" not in text and "duration" not in text

    before = path.stat().st_mtime_ns
    assert run(root, "--in-place") == 0
    assert "a: up to date" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before


def test_in_place_leaves_a_notebook_that_changed_while_it_ran(root, monkeypatch, capsys):
    def run_and_edit(job, **_):
        record = {"key": job.key(), "executed": file_hash(job.notebook), "figures": []}
        replace_file(job.executed, job.notebook.read_bytes())
        replace_file(job.record, json.dumps(record).encode())
        replace_file(job.notebook, job.notebook.read_bytes().replace(b"print(n)", b"print(n + 1)"))

    monkeypatch.setattr("paperlib.run_notebooks.run", run_and_edit)
    (root / "executed/quick").mkdir(parents=True)
    assert run(root, "--in-place") == 1
    assert "changed since they ran, not refreshed: a" in capsys.readouterr().err
    assert b"print(n + 1)" in (root / "notebooks/a.ipynb").read_bytes()


def test_in_place_refuses_a_parameter_file(root, capsys):
    parameter_file(root, "n: 5", profile="quick")
    assert run(root, "--in-place") == 2
    assert "own parameters" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["n = 3\nm = 2 * n", "import os", "n += 1", "a, b = 1, 2"])
def test_parameters_cell_holds_literals_only(tmp_path, source):
    path = write_notebook(tmp_path / "a.ipynb", parameters=source)
    with pytest.raises(ValueError, match="expected NAME = LITERAL"):
        declared_parameters(nbformat.read(path, as_version=4))


def test_declared_parameters(tmp_path):
    source = "n = 3  # samples\nrates: list = [0.5, -1.0]\nroot = None"
    path = write_notebook(tmp_path / "a.ipynb", "m = 2", parameters=source)
    notebook = nbformat.read(path, as_version=4)
    assert declared_parameters(notebook) == {"n": 3, "rates": [0.5, -1.0], "root": None}
    with pytest.raises(ValueError, match="got m"):
        check_values(notebook, {"m": 1})


def test_normalised_refuses_what_was_not_run_in_order(tmp_path):
    path = write_notebook(tmp_path / "a.ipynb", "1", "2")
    notebook = nbformat.read(path, as_version=4)
    for counts in ([None, None], [1, 3], [2, 1]):
        for cell, count in zip(code_cells(notebook), counts, strict=True):
            cell.execution_count = count
        with pytest.raises(ValueError, match="expected execution counts 1, 2"):
            normalised(notebook)


def test_replace_file_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    replace_file(path, b"old")

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_replace_file_lets_those_read_whom_the_user_lets(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        replace_file(tmp_path / "record.json", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "record.json").stat().st_mode & 0o777 == mode
