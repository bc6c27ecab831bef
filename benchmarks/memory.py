"""Peak memory of an attack, predicted before it starts against measured, in a process of its own.

    python benchmarks/memory.py [--steps 2] [--case NAME ...] [--out results/memory.csv]

Predicted: `paperlib.memory.predicted_bytes`, what the attack allocates beside what is there when
it is called. Measured: how far the resident memory of a child process rises above what it was at
the call (its peak by getrusage). A few steps reach the peak as well as hundreds do; `--steps 200`
runs the attacks to their end. V of a float32 model is not drawn before the call.

The cases in `WHOLE` attack pictures of CIFAR-10 to the end, within a limit for the process.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pandas
import psutil
import torch

import paperlib
from paperlib.memory import LIMIT_VARIABLE, choose_kept, predicted_bytes
from paperlib.precision import bulk_formats
from paperlib.results import save_table
from paperlib.subspace_search import search_bytes, search_pays


class Case(NamedTuple):
    """One attack; sizes of CIFAR-10 have d = 3072."""

    n: int
    d: int
    ratio: float  # p / (d n)
    placement: str = "auto"
    bulk: str = "auto"
    keep: str = "auto"
    limit: str | None = None  # what the process may take


CASES = {
    "sphere, resident": Case(20, 100, 10, "resident"),
    "many samples, features and slopes": Case(200, 100, 5, keep="features and slopes"),
    "many samples, inputs": Case(200, 100, 5, keep="inputs"),
    "many samples, nothing": Case(200, 100, 5, keep="nothing"),
    "images, n = 10, float32": Case(10, 3072, 5, "resident", "float32"),
    "images, n = 10, float16": Case(10, 3072, 5, bulk="float16"),
}

# Only where asked for: the pictures may have to be downloaded, and it takes long.
WHOLE = {"CIFAR-10, n = 20, p = 10 d n, in 4 GB": Case(20, 3072, 10, limit="4 GB")}
TO_THE_END = 200


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(name: str, steps: int) -> dict:
    """One attack in this process: its memory, predicted and measured."""
    n, d, ratio, placement, bulk, keep, limit = CASES.get(name) or WHOLE[name]
    data = paperlib.cifar10(n) if name in WHOLE else paperlib.sphere(n, d, seed=1)
    steps = TO_THE_END if name in WHOLE else steps
    p = round(ratio * n * d)
    # Trained on features that are not kept, so that the attack's own memory is what counts.
    trainer = paperlib.RandomFeatures(d, p, seed=2, placement="streamed")
    theta = paperlib.fit_min_norm(trainer, data.X, data.y)
    model = paperlib.RandomFeatures(d, p, seed=2, placement=placement)
    if bulk == "float16":  # as where V in float32 does not fit
        model.keeps = lambda dtype, free=None: dtype == torch.float16
    candidates = math.ceil(1.4 * n)
    formats = bulk_formats(model, n, candidates, bulk)
    kept = choose_kept(model, candidates, 1, formats, n=n) if keep == "auto" else keep
    size = model, n, candidates, 1
    starts = search_bytes(*size) if search_pays(*size) else 0  # as the solver does
    parts = predicted_bytes(model, candidates, 1, formats, n=n, keep=kept, starts=starts)
    before, begun = psutil.Process().memory_info().rss, time.perf_counter()
    found = paperlib.reconstruct(
        model, theta, n, restarts=1, max_steps=steps, bulk=bulk, keep=kept, progress=False
    )
    seconds = time.perf_counter() - begun
    predicted, measured = sum(parts.values()), peak_bytes() - before
    return {
        "case": name,
        "n": n,
        "d": d,
        "p": p,
        "placement": placement,
        "limit": limit,
        "bulk": str(formats.bulk).removeprefix("torch."),
        "products": str(formats.products).removeprefix("torch."),
        "kept": kept,
        **{f"predicted {part} (MB)": size / 1e6 for part, size in parts.items()},
        "predicted (MB)": predicted / 1e6,
        "measured (MB)": measured / 1e6,
        "measured / predicted": measured / predicted,
        "peak of the process (MB)": peak_bytes() / 1e6,
        "V in float32 (MB)": 4 * p * d / 1e6,
        "steps a stage": steps,
        "passes": found.passes,
        "seconds": seconds,
        "recovered (0.001)": paperlib.compare(data.X, found.samples).recovered(1e-3),
    }


def main() -> None:
    """Run each case in a child, save its row and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--case", action="append", choices=[*CASES, *WHOLE], help=f"default: {', '.join(CASES)}"
    )
    parser.add_argument("--steps", type=int, default=2, help="steps of each stage")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cases = options.case or list(CASES)
    if options.here:
        print(json.dumps(measure(cases[0], options.steps)))
        return
    rows = []
    for case in cases:
        command = [sys.executable, __file__, "--here", "--case", case]
        command += ["--steps", str(options.steps)]
        environment = dict(os.environ)
        if case in WHOLE:
            environment[LIMIT_VARIABLE] = WHOLE[case].limit
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            sys.exit(done.stderr)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        if options.out:
            save_table(pandas.DataFrame(rows), options.out)
        print(
            f"{case}: predicted {row['predicted (MB)']:.0f} MB, measured "
            f"{row['measured (MB)']:.0f} MB, whole process {row['peak of the process (MB)']:.0f} "
            f"MB; V in float32 would be {row['V in float32 (MB)']:.0f} MB; "
            f"{row['seconds']:.0f} s, {row['recovered (0.001)']} of {row['n']} below 0.001",
            flush=True,
        )


if __name__ == "__main__":
    main()
