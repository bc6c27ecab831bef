import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from paperlib import between_products, few_rows, matrix_units

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Read by their own names in pyproject.toml, imported by others.
DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}
DISTRIBUTIONS |= {
    "docutils": "sphinx",
    "yaml": "pyyaml",
    "IPython": "ipykernel",
    "distributed": "dask",
}


def names(requirements):
    return {canonicalize_name(Requirement(line).name) for line in requirements}


def declared():
    extras = PROJECT["optional-dependencies"]
    return names(PROJECT["dependencies"]), names(extras["notebooks"]), names(extras["test"])


def constraints():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def imported_by(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    found -= set(sys.stdlib_module_names) | {"paperlib"}
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in found}


def test_environment_yml_installs_what_pyproject_says():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["dependencies"] == [
        f"python{PROJECT['requires-python']}",
        "pip",
        {"pip": ["-e .[notebooks]"]},
    ]
    assert "notebooks" in PROJECT["optional-dependencies"]


def test_constraints_are_exact_and_allowed_by_pyproject():
    everything = [*PROJECT["dependencies"], *sum(PROJECT["optional-dependencies"].values(), [])]
    allowed = {canonicalize_name(Requirement(line).name): Requirement(line) for line in everything}
    allowed["distributed"] = allowed["dask"]  # the two are released together
    for requirement in constraints():
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        assert specifier.version in allowed[canonicalize_name(requirement.name)].specifier
    assert {"torch", "torchvision", "ruff"} <= {requirement.name for requirement in constraints()}


def test_installed_package_is_the_one_of_pyproject():
    try:
        assert metadata.version("paperlib") == PROJECT["version"]
    except metadata.PackageNotFoundError:
        pytest.skip("paperlib is not installed, only importable")


def test_files_that_are_not_python_are_installed_too():
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    patterns = tool["setuptools"]["package-data"]["paperlib"]
    package = ROOT / "paperlib"
    others = {path for path in package.iterdir() if path.is_file() and path.suffix != ".py"}
    assert others == {path for pattern in patterns for path in package.glob(pattern)}
    sources = (module.SOURCE for module in (between_products, few_rows, matrix_units))
    assert {path.name for path in others} >= set(sources)


def test_what_paperlib_imports_is_declared():
    core, notebooks, _ = declared()
    # The runner of the notebooks is used with what the notebooks need; the library is not.
    for path in sorted((ROOT / "paperlib").rglob("*.py")):
        needs_notebooks = "notebook" in path.stem
        allowed = core | notebooks if needs_notebooks else core
        assert imported_by(path) <= allowed, path


def test_what_tests_import_is_declared():
    modules = {canonicalize_name(path.stem) for path in (ROOT / "tests").glob("*.py")}
    for path in sorted((ROOT / "tests").glob("*.py")):
        assert imported_by(path) <= set.union(*declared()) | modules, path


@pytest.mark.parametrize(("folder", "extra"), [("docs", "book"), ("tests/browser", "browser")])
def test_what_only_some_targets_import_is_declared(folder, extra):
    paths = sorted((ROOT / folder).glob("*.py"))
    assert paths
    own = names(PROJECT["optional-dependencies"][extra])
    modules = {canonicalize_name(path.stem) for path in paths}
    for path in paths:
        assert imported_by(path) <= set.union(*declared()) | own | modules, path
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^[a-z-]+: .*\$\(VENV\)/\.installed-{extra}\b", makefile, re.MULTILINE)


def test_citation_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert PROJECT["license"] in (ROOT / "LICENSE").read_text()
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == [
        "Iurada",
        "Bombari",
        "Tommasi",
        "Mondelli",
    ]
    assert paper["identifiers"][0]["value"].split(":")[1] in paper["url"]


def test_ci_and_pre_commit_run_the_targets_of_make():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"\bmake .*", script.read_text())[-1].startswith("make test")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["make lint"]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^test: lint unit-tests notebook-tests ", makefile, re.MULTILINE)


@pytest.fixture
def checkout(tmp_path):
    """A folder with the Makefile, an empty package, and a pip that notes that it was called."""
    folder = tmp_path / "a folder"  # a space in the path must do no harm
    (folder / "paperlib").mkdir(parents=True)
    (folder / "paperlib/__init__.py").touch()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    (folder / "pip").write_text(
        "#!/usr/bin/env bash\n"
        'echo "$@" >> pip.log\n'
        'pwd > "$(echo .venv/lib/python*/site-packages)/paperlib.pth"\n'
        "! [ -e broken ]\n"
    )
    (folder / "pip").chmod(0o755)
    (folder / "python").write_text(  # no pip inside: copying it takes most of the time
        "#!/usr/bin/env bash\n"
        '[[ "$*" != "-m venv"* ]] || set -- "$@" --without-pip\n'
        f'exec "{sys.executable}" "$@"\n'
    )
    (folder / "python").chmod(0o755)
    return folder


def make(folder, *arguments, expect=0):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    result = subprocess.run(
        ["make", "PIP=./pip", "PYTHON=./python", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode == 0) == (expect == 0), result.stdout + result.stderr
    return result.stdout + result.stderr


def test_environment_is_made_once_and_mended_when_broken(checkout):
    def installs():
        log = checkout / "pip.log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    (checkout / "broken").touch()
    make(checkout, "install", expect=2)
    assert installs() == 1 and not (checkout / ".venv/.installed").exists()
    (checkout / "broken").unlink()

    marker = checkout / ".venv/half-made"
    marker.touch()
    assert "Making .venv" in make(checkout, "install")
    assert installs() == 2 and not marker.exists()
    arguments = (checkout / "pip.log").read_text().splitlines()[-1]
    assert arguments == "install --constraint constraints.txt --editable .[notebooks,test]"

    marker.touch()
    make(checkout, "install")
    assert installs() == 2

    later = (checkout / ".venv/.installed").stat().st_mtime + 1
    os.utime(checkout / "pyproject.toml", (later, later))
    assert "Making .venv" not in make(checkout, "install", "CONSTRAINTS=")
    assert installs() == 3 and marker.exists()
    assert "constraint" not in (checkout / "pip.log").read_text().splitlines()[-1]
    os.utime(checkout / "pyproject.toml", (0, 0))

    # Python was removed from under it.
    (checkout / ".venv/bin/python").unlink()
    assert "Making .venv" in make(checkout, "install")
    assert installs() == 4 and not marker.exists()

    # The checkout was moved: the environment would still use the package at the old place.
    (checkout / "paperlib").rename(checkout / "old")
    shutil.copytree(checkout / "old", checkout / "paperlib")
    moved = checkout.rename(checkout.with_name("moved"))
    assert "Making .venv" in make(moved, "install")


def test_make_help_names_every_target(checkout):
    shown = make(checkout, "help")
    targets = ("install", "figures", "notebooks", "test", "lint", "lab", "clean", "distclean")
    for target in (*targets, "book", "browser-tests"):
        assert re.search(rf"make {target} +\w", shown)
    assert not (checkout / ".venv").exists()


def test_too_old_a_python_is_an_error_in_words(checkout, tmp_path):
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "python"):
        shutil.copy(old, tmp_path / name)
    path = f"PATH={tmp_path}:/usr/bin:/bin"
    shown = make(checkout, "install", f"PYTHON={old}", path, expect=2)
    assert "Python 3.11 or newer was not found" in shown
