"""What the expected normal matrix saves: whole attacks with it, and with M (x) I alone.

    python benchmarks/preconditioners.py [--seeds 3] [--threads 1] [--out results/NAME.csv]

The same features, parameters and seeds for both (`expected_normal_matrix.py`, `preconditioner.py`),
in turn in one run: passes over V, seconds, and how many samples came back. Points on a sphere,
which are unlike one another, beside faces, which are alike.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pandas
import torch

import paperlib
from paperlib import expected_normal_matrix
from paperlib.results import save_table

# The default, which leaves small searches to M (x) I.
DEFAULT = expected_normal_matrix.WORTHWHILE

EXPECTED, PLAIN = "expected normal matrix", "M (x) I"

# Data, how many samples, p / (d n).
CASES = {
    "sphere, n = 50, d = 100": (lambda seed: paperlib.sphere(50, 100, seed=seed), 5.0),
    "faces, n = 20, d = 625": (lambda seed: paperlib.faces(20, seed=seed, faces_only=True), 5.0),
    "faces, n = 40, d = 625": (lambda seed: paperlib.faces(40, seed=seed, faces_only=True), 5.0),
}


def measure(case: str, seed: int, preconditioner: str) -> dict:
    """One attack from one start."""
    make, ratio = CASES[case]
    data = make(seed)
    p = round(ratio * data.d * data.n)
    model = paperlib.RandomFeatures(data.d, p, "relu", seed=seed)
    theta = paperlib.fit_min_norm(model, data.X, data.y)
    expected_normal_matrix.WORTHWHILE = DEFAULT if preconditioner == EXPECTED else math.inf
    found = paperlib.reconstruct(model, theta, data.n, seed=seed, restarts=1, progress=False)
    cosines = (data.X @ data.X.T / data.d).fill_diagonal_(0).abs()
    return {
        "case": case,
        "seed": seed,
        "preconditioner": preconditioner,
        "n": data.n,
        "d": data.d,
        "p": p,
        "mean |cosine| of two samples": float(cosines.sum()) / (data.n * (data.n - 1)),
        "passes": found.passes,
        "seconds": found.seconds,
        "loss": found.loss,
        "recovered (0.001)": paperlib.compare(data.X, found.samples).recovered(1e-3),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Measure, save row by row and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for case in CASES:
        for seed in range(options.seeds):
            for name in (PLAIN, EXPECTED):
                rows.append(measure(case, seed, name))
                if options.out:
                    save_table(pandas.DataFrame(rows), options.out)
            before, after = rows[-2:]
            print(
                f"{case}, seed {seed}: {before['passes']} to {after['passes']} passes, "
                f"{before['seconds']:.1f} to {after['seconds']:.1f} s, "
                f"{before['recovered (0.001)']} and {after['recovered (0.001)']} samples",
                flush=True,
            )
    table = pandas.DataFrame(rows)
    sums = table.groupby(["case", "preconditioner"])[["passes", "seconds"]].sum()
    for case in CASES:
        ratio = sums.loc[case, PLAIN] / sums.loc[case, EXPECTED]
        print(f"{case}: passes divided by {ratio.passes:.1f}, seconds by {ratio.seconds:.1f}")


if __name__ == "__main__":
    main()
