"""Runs the notebooks that changed through papermill: ``python -m paperlib.run_notebooks --help``.

Every notebook runs in a process of its own, into a file that takes its place under
``executed/<profile>/`` only when the run succeeded. A record beside it tells what that run was made
of; a notebook whose record still holds is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import nbformat

from paperlib.notebook_job import Job, file_hash, library_versions
from paperlib.notebook_pictures import describe_pictures
from paperlib.notebook_source import check_values, normalised
from paperlib.replace_file import replace_file, replace_files

PROFILES = ("quick", "laptop", "paper")

# What the process of one notebook does. tqdm reads TQDM_DISABLE when it is imported: papermill's
# bar over the cells is shown, while the kernel, started later, writes none into the notebook.
RUN_ONE = """
import json, os, sys
import papermill
import tqdm.auto
os.environ["TQDM_DISABLE"] = "1"
try:
    papermill.execute_notebook(**json.loads(sys.argv[1]))
except papermill.PapermillExecutionError as error:
    sys.exit(str(error))
"""


def find_jobs(root: Path, profile: str, names: Sequence[str] = ()) -> list[Job]:
    """The notebooks of ``root`` in reading order, or those of the given names.

    Raises:
        ValueError: if the profile or a name is unknown.
    """
    folder = root / "notebooks"
    if not folder.is_dir():
        raise ValueError(f"expected a folder that holds notebooks/, got {root}")
    profiles = {*PROFILES, *(p.name for p in (folder / "parameters").glob("*/"))}
    if profile not in profiles:
        raise ValueError(f"unknown profile: expected one of {sorted(profiles)}, got {profile!r}")
    known = sorted(path.stem for path in folder.glob("*.ipynb"))
    chosen = [Path(name).name.removesuffix(".ipynb") for name in names]
    for name in chosen:
        if name not in known:
            raise ValueError(f"unknown notebook: expected one of {known}, got {name!r}")
    for path in sorted((folder / "parameters" / profile).glob("*.y*ml")):
        if path.suffix != ".yaml" or path.stem not in known:
            raise ValueError(f"{path.relative_to(root)}: there is no notebook for it among {known}")
    return [Job(root, profile, name) for name in known if not chosen or name in chosen]


def check(jobs: Sequence[Job]) -> None:
    """Check every parameter file before anything runs.

    Raises:
        ValueError: naming each file whose parameters its notebook does not take.
    """
    problems = []
    for job in jobs:
        try:
            parameters = job.parameters()
            if parameters:
                check_values(nbformat.read(job.notebook, as_version=4), parameters)
        except ValueError as error:
            problems.append(f"{job.parameter_file.relative_to(job.root)}: {error}")
    if problems:
        raise ValueError("\n".join(problems))


def run(job: Job, *, quiet: bool = False, threads: int | None = None) -> None:
    """Run one notebook; on success put its figures, executed copy and record in place.

    Args:
        job: what to run.
        quiet: whether to show no bar over the cells.
        threads: how many threads it may use; by default what the libraries choose.

    Raises:
        RuntimeError: if a cell failed or the kernel died. The notebook as far as it came is kept as
            ``NAME.failed.ipynb``, and an earlier executed copy stays.
    """
    clock = time.monotonic()
    # Taken first: an edit made during the run must neither pass for what was run nor end it.
    parameters = job.parameters()
    key = job.key(parameters)
    job.executed.parent.mkdir(parents=True, exist_ok=True)
    job.figures.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PAPERLIB_PROGRESS": "0"}
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    with tempfile.TemporaryDirectory(dir=job.executed.parent, prefix=".running-") as folder:
        partial = Path(folder) / job.notebook.name
        drawn = Path(folder) / "figures"  # its own: others that run now draw theirs
        drawn.mkdir()
        environment["PAPERLIB_FIGURES"] = str(drawn)
        options = {
            "input_path": str(job.notebook),
            "output_path": str(partial),
            "parameters": parameters,
            "kernel_name": "python3",
            "language": "python",
            "cwd": str(job.notebook.parent),  # where JupyterLab and nbval run it as well
            "progress_bar": not quiet,
            "extra_arguments": ["--log-level=ERROR"],  # of the kernel itself
        }
        result = subprocess.run(
            [sys.executable, "-c", RUN_ONE, json.dumps(options)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE if quiet else None,
            text=True,
            check=False,
        )
        failed = job.executed.with_suffix(".failed.ipynb")
        if result.returncode != 0:
            where = ""
            if partial.exists():
                os.replace(partial, failed)
                where = f"; as far as it came: {failed.relative_to(job.root)}"
            raise RuntimeError(
                f"papermill ended with {result.returncode}{where}\n{result.stderr or ''}"
            )
        figures = sorted(path.name for path in drawn.iterdir() if path.is_file())
        record = {
            "notebook": job.name,
            "profile": job.profile,
            "parameters": parameters,
            "seconds": round(time.monotonic() - clock, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": library_versions(),
            "figures": figures,
            "executed": file_hash(partial),
            "key": key,
        }
        # Killed once the first is replaced, there is no record and the notebook runs again.
        replace_files(
            job.figures,
            {name: (drawn / name).read_bytes() for name in figures},
            before=lambda: job.record.unlink(missing_ok=True),
        )
        replace_file(job.executed, partial.read_bytes())
        replace_file(job.record, (json.dumps(record, indent=1, default=str) + "\n").encode())
        failed.unlink(missing_ok=True)


def run_all(
    jobs: Sequence[Job], *, at_once: int = 1, say: Callable[[str], None] = print
) -> list[str]:
    """Run the jobs, going on after a failure; returns the names of those that failed."""
    failed, finished, lock = [], 0, threading.Lock()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = max(1, (cores or 1) // at_once) if at_once > 1 else None

    def run_and_tell(job: Job) -> None:
        nonlocal finished
        if at_once == 1:
            say(f"{job.name}: running")
        clock = time.monotonic()
        try:
            run(job, quiet=at_once > 1, threads=threads)
            outcome = f"done in {time.monotonic() - clock:.0f} s"
        except Exception as error:  # whatever it was, the other notebooks go on
            failed.append(job.name)
            outcome = f"failed: {error}"
        with lock:
            finished += 1
            say(f"{job.name}: {outcome} [{finished}/{len(jobs)}]")

    with ThreadPoolExecutor(at_once) as pool:
        try:
            for future in [pool.submit(run_and_tell, job) for job in jobs]:
                future.result()
        except KeyboardInterrupt:
            pool.shutdown(cancel_futures=True)
            raise
    return sorted(failed)


def refresh(job: Job) -> bool:
    """Write the executed copy's outputs into the committed notebook; returns whether it changed."""
    executed = normalised(nbformat.read(job.executed, as_version=4))
    describe_pictures(executed, job.figures)
    content = (nbformat.writes(executed).rstrip("\n") + "\n").encode()
    if job.notebook.read_bytes() == content:
        return False
    replace_file(job.notebook, content)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status.

    0; 1 if a notebook failed, or changed while it ran and was to be refreshed; 2 for bad input.
    """
    parser = argparse.ArgumentParser(prog="python -m paperlib.run_notebooks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks; by default all")
    parser.add_argument("--profile", default="quick", help="quick, laptop or paper")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at the same time")
    parser.add_argument("--force", action="store_true", help="run also what did not change")
    parser.add_argument("--in-place", action="store_true", help="refresh the committed outputs")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="folder with notebooks/")
    options = parser.parse_args(arguments)
    try:
        if options.jobs < 1:
            raise ValueError(f"--jobs: expected at least 1, got {options.jobs}")
        jobs = find_jobs(options.root.resolve(), options.profile, options.names)
        if options.in_place and any(job.parameter_file.exists() for job in jobs):
            raise ValueError("--in-place: expected notebooks at their own parameters, got a file")
        check(jobs)
        stale = [job for job in jobs if options.force or not job.is_up_to_date()]
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for job in jobs:
        if job not in stale:
            print(f"{job.name}: up to date")
    try:
        failed = run_all(stale, at_once=options.jobs, say=lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept", file=sys.stderr)
        return 130
    finished = [job for job in jobs if job.name not in failed]
    changed = [job.name for job in finished if options.in_place and not job.is_up_to_date()]
    if options.in_place:
        for job in finished:
            if job.name not in changed and refresh(job):
                print(f"{job.name}: outputs refreshed")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    if changed:
        print(f"changed since they ran, not refreshed: {', '.join(changed)}", file=sys.stderr)
    return 1 if failed or changed else 0


if __name__ == "__main__":
    sys.exit(main())
