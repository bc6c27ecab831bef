"""Compiling on the user's machine: kept, switched off, missing, failing."""

import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paperlib import compiled, few_rows
from paperlib.compiled import cache_folder, library

SOURCE = few_rows.SOURCE
SOURCES = sorted(Path(compiled.__file__).parent.glob("*.cpp"))

needs_compiler = pytest.mark.skipif(
    not few_rows.available(torch.float32), reason="needs AVX2 and a C++ compiler"
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("CXX", compiled.SWITCH_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    library.cache_clear()
    yield
    library.cache_clear()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_compiler
def test_what_was_compiled_is_found_again(monkeypatch, tmp_path):
    assert library(SOURCE).project_float32
    (kept,) = cache_folder().iterdir()
    assert kept.name.startswith("few_rows-") and kept.suffix == ".so"
    library.cache_clear()
    ran = []
    monkeypatch.setattr(compiled.subprocess, "run", lambda *a, **k: ran.append(a))
    assert library(SOURCE).combine_float32
    assert not ran


@needs_compiler
@pytest.mark.skipif(compiled._compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_all_sources_compile(source):
    """A kernel that does not is left out, and what tests it is skipped."""
    command = [*compiled._compiler(), *compiled.FLAGS, "-fsyntax-only", str(source)]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_another_processor_compiles_for_itself(monkeypatch):
    library(SOURCE)
    library.cache_clear()
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"other": True}, raising=False)
    library(SOURCE)
    assert len(list(cache_folder().iterdir())) == 2


@needs_compiler
def test_what_a_header_says_is_compiled_anew(monkeypatch, tmp_path):
    package = Path(compiled.__file__).parent
    for path in (package / SOURCE, *package.glob("*.h")):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(compiled, "__file__", str(tmp_path / "compiled.py"))
    assert library(SOURCE).project_float32
    for header in tmp_path.glob("*.h"):
        header.write_text(header.read_text() + "// changed\n")
    library.cache_clear()
    assert library(SOURCE).project_float32
    assert len(list(cache_folder().iterdir())) == 2


@needs_compiler
def test_a_cache_that_cannot_be_written_stops_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert library(SOURCE).project_float32


@needs_compiler
def test_a_broken_file_in_the_cache_is_made_again():
    library(SOURCE)
    (kept,) = cache_folder().iterdir()
    library.cache_clear()
    whole = kept.read_bytes()
    kept.unlink()
    kept.write_bytes(whole[:100])
    assert library(SOURCE).project_float32
    assert kept.stat().st_size == len(whole)


def test_it_can_be_switched_off(monkeypatch):
    monkeypatch.setenv(compiled.SWITCH_VARIABLE, "0")
    assert library(SOURCE) is None
    assert not cache_folder().exists()


def test_without_a_compiler_nothing_is_said(monkeypatch, recwarn):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert library(SOURCE) is None
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    assert library(SOURCE) is None
    assert not recwarn.list


def test_the_named_compiler_is_used(monkeypatch, tmp_path):
    seen = tmp_path / "seen"
    monkeypatch.setenv("CXX", script(tmp_path / "mine", f'echo "$@" > "{seen}"; exit 1') + " -Dx")
    with pytest.warns(RuntimeWarning, match="mine -Dx could not compile few_rows.cpp"):
        assert library(SOURCE) is None
    assert seen.read_text().startswith("-Dx -std=c++17")


def test_a_failing_compiler_is_quoted(monkeypatch, tmp_path):
    command = script(tmp_path / "bad", "echo no such option >&2; exit 3")
    monkeypatch.setenv("CXX", command)
    with pytest.warns(RuntimeWarning, match="(?s)PAPERLIB_COMPILE=0 does without.*no such option"):
        assert library(SOURCE) is None
    monkeypatch.setenv("CXX", script(tmp_path / "lazy", "exit 0"))  # makes nothing
    library.cache_clear()
    with pytest.warns(RuntimeWarning, match="could not compile"):
        assert library(SOURCE) is None


@needs_compiler
def test_threads_are_those_of_torch(tmp_path):
    """Two OpenMP libraries would each keep threads of their own, and wait for one another."""
    program = (
        "import torch, os; from paperlib import few_rows; torch.set_num_threads(2)\n"
        "a = torch.randn(600, 600); b = a @ a; before = len(os.listdir('/proc/self/task'))\n"
        "for _ in range(3): few_rows.project(a[:9], a)\n"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"


@needs_compiler
def test_numbers_elsewhere_are_not_read():
    A, V = torch.ones(3, 600), torch.ones(600, 600, device="meta")
    with pytest.raises(ValueError, match="project_float32 takes tensors on the cpu, .* on meta"):
        compiled.call(SOURCE, "project_float32", A, V, A)
