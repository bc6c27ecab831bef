"""From how many seeds the default solver reads back every sample.

    python benchmarks/recovery.py [--seeds 10] [--case NAME] [--out recovery.csv]

A seed counts when every sample comes back with a signed error below 0.001 (in units of sqrt(d)).
Data, model and candidates all change with the seed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas
import torch

import paperlib
from paperlib.results import save_table

# name: (loader, n, d or None, activation, p / (d n) or p itself)
CASES = {
    "sphere, n = 20, d = 100, ReLU, p = 10 d n": ("sphere", 20, 100, "relu", 10.0),
    "sphere, n = 20, d = 100, ReLU, p = 5 d n": ("sphere", 20, 100, "relu", 5.0),
    "sphere, n = 10, d = 100, ReLU + tanh, p = 3 d n": ("sphere", 10, 100, "relu+tanh", 3.0),
    "sphere, n = 50, d = 100, ReLU, p = 5 d n": ("sphere", 50, 100, "relu", 5.0),
    "photographs, n = 10, ReLU, p = 5 d n": ("photographs", 10, None, "relu", 5.0),
    "CIFAR-10, n = 10, ReLU, p = 5 d n": ("cifar10", 10, None, "relu", 5.0),
    "CIFAR-10, n = 10, ReLU, p = 100,000": ("cifar10", 10, None, "relu", 100_000 / 30_720),
}


def attack(case: str, seed: int) -> dict:
    """One row: what came back from one seed."""
    loader, n, d, activation, ratio = CASES[case]
    load = getattr(paperlib, loader)
    data = load(n, d, seed=seed) if loader == "sphere" else load(n, seed=seed)
    p = round(ratio * data.d * n)
    model = paperlib.RandomFeatures(data.d, p, activation, seed=seed)
    theta = paperlib.fit_min_norm(model, data.X, data.y)
    found = paperlib.reconstruct(model, theta, n, seed=seed, progress=False)
    errors = paperlib.compare(data.X, found.samples)
    return {
        "case": case,
        "seed": seed,
        "n": n,
        "p": p,
        "recovered": errors.recovered(1e-3),
        "mean_signed_error": errors.signed_error,
        "largest_signed_error": float(errors.signed.max()),
        "loss": found.loss,
        "restarts": 1 + max(stage["restart"] for stage in found.stages),
        "passes": found.passes,
        "seconds": found.seconds,
    }


def main() -> None:
    """Attack from every seed, save a row a seed, print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", action="append", choices=sorted(CASES), help="default: spheres")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for case in options.case or [name for name in CASES if name.startswith("sphere")]:
        for seed in range(options.seeds):
            rows.append(attack(case, seed))
            if options.out:
                save_table(pandas.DataFrame(rows), options.out)
        new = rows[-options.seeds :]
        whole = sum(row["recovered"] == row["n"] for row in new)
        middle = pandas.DataFrame(new)[["passes", "seconds", "mean_signed_error"]].median()
        print(
            f"{case}: all samples from {whole} of {len(new)} seeds; median {middle.passes:.0f} "
            f"passes, {middle.seconds:.1f} s, error {middle.mean_signed_error:.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
