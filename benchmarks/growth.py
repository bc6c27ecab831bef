"""How the cost of an attack grows with n, d and p: passes, and seconds a pass.

    python benchmarks/growth.py [--seeds 3] [--threads 1] [--out results/growth.csv]

One of n, d and p / (d n) changes at a time, the others stay. A pass is one product of V with n^
vectors: 2 n^ p d operations. Prints the exponents of straight lines fitted to logarithms: of the
passes over each quantity, and of the processor seconds a pass over n p d. Processor seconds count
only what this process computed, so that a machine shared with others matters less.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas
import torch

import paperlib
from paperlib.results import save_table

# What grows: (n, d, p / (d n)) of each size.
SERIES = {
    "n": [(n, 100, 5.0) for n in (10, 20, 40, 80)],
    "d": [(10, d, 5.0) for d in (64, 128, 256, 512)],
    "p": [(20, 100, ratio) for ratio in (4.0, 8.0, 16.0, 32.0)],
}


def measure(series: str, n: int, d: int, ratio: float, seed: int) -> dict:
    """One attack from one seed."""
    data = paperlib.sphere(n, d, seed=seed)
    p = round(ratio * n * d)
    model = paperlib.RandomFeatures(d, p, "relu", seed=seed)
    theta = paperlib.fit_min_norm(model, data.X, data.y)
    begun = time.process_time()
    found = paperlib.reconstruct(model, theta, n, seed=seed, progress=False)
    processor = time.process_time() - begun
    first = [s for s in found.stages if s["restart"] == 0 and s["stage"] == "bulk"][0]
    return {
        "what grows": series,
        "n": n,
        "d": d,
        "p": p,
        "p / (d n)": ratio,
        "seed": seed,
        "passes": found.passes,
        "passes of the first bulk stage": first["passes"],
        "restarts": 1 + max(stage["restart"] for stage in found.stages),
        "processor seconds": processor,
        "seconds": found.seconds,
        "processor seconds a pass": processor / found.passes,
        "recovered (0.001)": paperlib.compare(data.X, found.samples).recovered(1e-3),
        "threads": torch.get_num_threads(),
    }


def slope(x: pandas.Series, y: pandas.Series) -> float:
    """Exponent of y ~ x^k by least squares on logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def main() -> None:
    """Measure, save row by row, fit and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for series, sizes in SERIES.items():
        for size in sizes:
            for seed in range(options.seeds):
                rows.append(measure(series, *size, seed))
                if options.out:
                    save_table(pandas.DataFrame(rows), options.out)
            middle = pandas.DataFrame(rows[-options.seeds :]).median(numeric_only=True)
            print(
                f"n = {size[0]}, d = {size[1]}, p = {middle['p']:.0f}: median "
                f"{middle['passes']:.0f} passes, {1e3 * middle['processor seconds a pass']:.2f} ms "
                f"a pass, {middle['recovered (0.001)']:.0f} samples",
                flush=True,
            )
    table = pandas.DataFrame(rows)
    middle = table.groupby(["what grows", "n", "d", "p"]).median(numeric_only=True).reset_index()
    for series in SERIES:
        part = middle[middle["what grows"] == series]
        print(
            f"as {series} grows: passes ~ {series}^{slope(part[series], part['passes']):.2f}, "
            f"seconds a pass ~ (n p d)^"
            f"{slope(part.n * part.p * part.d, part['processor seconds a pass']):.2f}"
        )
    everything = slope(middle.n * middle.p * middle.d, middle["processor seconds a pass"])
    print(f"all together: seconds a pass ~ (n p d)^{everything:.2f}")


if __name__ == "__main__":
    main()
