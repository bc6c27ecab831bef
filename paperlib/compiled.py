"""C++ of this package, compiled when it is first needed, for the processor that it runs on.

As `torch.compile` does, with the compiler of the machine: a wheel would have to be built for every
kind of processor. What was compiled is kept in the user's cache folder (`$XDG_CACHE_HOME/paperlib`)
and found there by its source, the compiler, and what the processor has; a compiler that takes the
place of another one compiles anew. Without one, or with PAPERLIB_COMPILE=0, everything runs without
it, more slowly.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from paperlib.replace_file import replace_file

# "0" turns it off.
SWITCH_VARIABLE = "PAPERLIB_COMPILE"

# Products with OpenMP run on the threads of torch, whose library of that name is loaded already.
FLAGS = ("-std=c++17", "-O2", "-march=native", "-fopenmp", "-shared", "-fPIC", "-w")


@lru_cache
def library(name: str) -> ctypes.CDLL | None:
    """The functions of a source file beside this one, None where it cannot be compiled.

    Warns if there is a compiler and it fails: that is worth knowing, and stops nobody.
    """
    command = _compiler()
    if command is None:
        return None
    source = Path(__file__).with_name(name)
    made = [*command, *FLAGS]
    processor = getattr(torch.cpu, "get_capabilities", dict)()
    sources = [source, *sorted(source.parent.glob("*.h"))]
    programs = [_identity(word) for word in command]
    parts = [[path.read_text() for path in sources], made, programs, sorted(processor.items())]
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:20]
    file_name = f"{source.stem}-{key}.so"
    try:
        return ctypes.CDLL(str(cache_folder() / file_name))
    except OSError:
        pass  # not there yet, or unfinished business of another system
    try:
        with tempfile.TemporaryDirectory(prefix="paperlib-", ignore_cleanup_errors=True) as folder:
            fresh = Path(folder, file_name)
            subprocess.run(
                [*made, "-o", str(fresh), str(source)],
                check=True,
                capture_output=True,
                text=True,
                errors="replace",
            )
            return _stored(fresh)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{shlex.join(command)} could not compile {name}, so attacks will be slower "
            f"({SWITCH_VARIABLE}=0 does without):\n{said[-2000:]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def _stored(fresh: Path) -> ctypes.CDLL:
    """The functions of a file that was just compiled, which is kept in the cache if it can be.

    From there first: some systems run nothing that lies among temporary files.
    """
    try:
        kept = cache_folder() / fresh.name
        kept.parent.mkdir(parents=True, exist_ok=True)
        replace_file(kept, fresh.read_bytes())
        return ctypes.CDLL(str(kept))
    except OSError:
        return ctypes.CDLL(str(fresh))  # compiled again next time


def has(source: str, function: str) -> bool:
    """Whether a source file compiles here, and with that function."""
    compiled = library(source)
    return compiled is not None and hasattr(compiled, function)


def call(source: str, function: str, *arguments: Tensor | int | float | None) -> None:
    """Call a function of a source file that compiled, on the threads of torch.

    Args:
        source: its name.
        function: name of the function; its last argument is the number of threads.
        arguments: tensors are passed as pointers to their first number, None as a null pointer,
            whole numbers as long, others as float.

    Raises:
        ValueError: for a tensor elsewhere than on the CPU, whose numbers are not there to be read.
    """

    def passed(argument: Tensor | int | float | None) -> object:
        if isinstance(argument, int):
            return ctypes.c_long(argument)
        if isinstance(argument, float):
            return ctypes.c_float(argument)
        if argument is None:
            return ctypes.c_void_p(None)
        if argument.device.type != "cpu":
            raise ValueError(f"{function} takes tensors on the cpu, got one on {argument.device}")
        return ctypes.c_void_p(argument.data_ptr())

    getattr(library(source), function)(*map(passed, arguments), torch.get_num_threads())


def cache_folder() -> Path:
    """Where compiled files are kept: without a home, in a folder of ours among temporary files.

    Raises:
        OSError: if that cannot be made, or somebody else could write into it.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "paperlib"
    except RuntimeError:
        folder = Path(tempfile.gettempdir(), f"paperlib-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    # Others may have made one of that name, or a link, and what lies in it is run.
    found = folder.lstat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"expected {folder} to be a folder that only this user can write to")
    return folder


def _identity(word: str) -> tuple[str, int, int] | None:
    """Path, size and time of the program that a word of a command names, None if it names none."""
    found = shutil.which(word)
    if found is None:
        return None
    path = Path(found).resolve()
    about = path.stat()
    return str(path), about.st_size, about.st_mtime_ns


def _compiler() -> list[str] | None:
    """The command of the C++ compiler, as in CXX or of the usual name; None if there is none."""
    if os.environ.get(SWITCH_VARIABLE) == "0" or os.name != "posix":
        return None
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named if shutil.which(named[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None
