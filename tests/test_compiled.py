"""Compiling on the user's machine: kept, switched off, missing, failing."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from paperlib import compiled, few_rows, gaussian_draws
from paperlib.compiled import cache_folder, library

SOURCE = few_rows.SOURCE
SMALL = gaussian_draws.SOURCE  # compiles in less time
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
def test_a_compiler_that_is_replaced_compiles_anew(monkeypatch, tmp_path):
    """At the same place: by its size, its time, or the program that a link leads to."""
    text = f'exec {compiled._compiler()[0]} "$@"'
    for name in ("one", "other"):
        script(tmp_path / name, text)
        os.utime(tmp_path / name, ns=(0, 0))
    link = tmp_path / "link"
    link.symlink_to("one")
    monkeypatch.setenv("CXX", str(link))

    def files():
        library.cache_clear()
        assert library(SMALL).draw
        return len(list(cache_folder().iterdir()))

    assert files() == files() == 1
    link.unlink()
    link.symlink_to("other")
    assert files() == 2
    os.utime(tmp_path / "other", ns=(0, 1))
    assert files() == 3
    script(tmp_path / "other", text + " ")
    os.utime(tmp_path / "other", ns=(0, 1))
    assert files() == 4


@needs_compiler
def test_a_cache_that_cannot_be_written_stops_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert library(SOURCE).project_float32


def loads(monkeypatch, *, refused):
    """The folders from which files were loaded, those of a name refused, as without `exec`."""
    load, folders = compiled.ctypes.CDLL, []

    def recorded(path):
        name = Path(path).parent.name
        folders.append(name.split("-")[0])
        if name.startswith(refused):
            raise OSError("failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(compiled.ctypes, "CDLL", recorded)
    return folders


@needs_compiler
def test_what_is_fresh_is_loaded_from_the_cache(monkeypatch):
    """Nothing runs from temporary files where they are mounted without `exec`."""
    folders = loads(monkeypatch, refused="paperlib-")
    assert library(SMALL).draw
    assert folders == ["paperlib", "paperlib"]  # not there yet, and there


@needs_compiler
def test_where_nothing_runs_from_the_cache_what_is_fresh_does(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(compiled, "cache_folder", lambda: tmp_path / "kept")
    folders = loads(monkeypatch, refused="kept")
    assert library(SMALL).draw
    assert folders == ["kept", "kept", "paperlib"]


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """A user of whom no home is known, as in a container; the folder for temporary files."""

    def expanduser(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", expanduser)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@needs_compiler
def test_without_a_home_files_are_kept_among_temporary_ones(homeless):
    assert library(SMALL).draw
    folder = homeless / f"paperlib-{os.getuid()}"
    assert cache_folder() == folder and stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.suffix for path in folder.iterdir()] == [".so"]


@needs_compiler
@pytest.mark.parametrize("kind", ["for all", "link", "other's"])
def test_a_temporary_folder_that_others_can_write_to_is_not_used(homeless, kind, monkeypatch):
    folder, elsewhere = homeless / f"paperlib-{os.getuid()}", homeless / "elsewhere"
    elsewhere.mkdir()
    if kind == "link":
        folder.symlink_to(elsewhere)
    else:
        folder.mkdir()
        folder.chmod(0o777 if kind == "for all" else 0o755)
    if kind == "other's":
        uid = os.getuid() + 1
        folder.rename(homeless / f"paperlib-{uid}")
        monkeypatch.setattr(os, "getuid", lambda: uid)
    with pytest.raises(PermissionError, match="to be a folder that only this user can write to"):
        cache_folder()
    assert library(SMALL).draw
    assert not list(homeless.glob("**/*.so"))


@needs_compiler
def test_a_temporary_folder_that_cannot_be_removed_stops_nothing(monkeypatch, tmp_path):
    def refuse(path, **options):
        raise OSError(f"still in use: {path}")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "rmdir", refuse)
    assert library(SMALL).draw


def test_without_a_temporary_folder_it_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", script(tmp_path / "mine", "exit 1"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.warns(RuntimeWarning, match="(?s)could not compile few_rows.cpp.*missing"):
        assert library(SOURCE) is None


@needs_compiler
def test_a_broken_file_in_the_cache_is_made_again(monkeypatch, tmp_path):
    library(SOURCE)
    (whole,) = cache_folder().iterdir()
    library.cache_clear()
    # In a folder of its own: this process has loaded the other.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    kept = cache_folder() / whole.name
    kept.parent.mkdir(parents=True)
    kept.write_bytes(whole.read_bytes()[:100])
    assert library(SOURCE).project_float32
    assert kept.stat().st_size == whole.stat().st_size


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


def test_a_compiler_may_say_anything(monkeypatch, tmp_path):
    """In whatever encoding."""
    monkeypatch.setenv("CXX", script(tmp_path / "bad", r"printf 'no \351\377 option' >&2; exit 3"))
    with pytest.warns(RuntimeWarning, match="(?s)could not compile.*no \ufffd+ option"):
        assert library(SOURCE) is None


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
