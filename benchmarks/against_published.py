"""The default solver against the paper's own, on the same loss, data and resident V, in one run.

    python benchmarks/against_published.py --case synthetic
    PAPERLIB_CIFAR10=... python benchmarks/against_published.py --case cifar10
    python benchmarks/against_published.py --case photographs --out results/NAME.csv

The published solver runs once from each of its seeds, until its stopping loss of 1e-7 or for
`--published-steps`; the default one runs once from each of its own, until 1e-10. The table says
whether the stopping loss was reached; where fewer steps were run than the limit of 20,000, the
time for the limit is estimated from the time of a step. The authors' code draws V anew for every
candidate in every step, so a last column adds the time of n drawings of V a step, one being
measured. Both solvers here use the same resident V.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import pandas
import torch

import paperlib
from paperlib.block_height import ROWS_PER_DRAW
from paperlib.data import DataSet
from paperlib.gaussian_draws import fill_by_torch
from paperlib.published import PRESETS
from paperlib.results import machine

LIMIT = 20_000

# Case: number of samples, p, preset of the published solver.
CASES = {
    "synthetic": (20, 20_000, "synthetic"),
    "cifar10": (10, 100_000, "cifar10"),
    "photographs": (20, 5 * 3072 * 20, "cifar10"),
}


def load(case: str, n: int, seed: int) -> DataSet:
    """The training data of a case."""
    if case == "synthetic":
        return paperlib.sphere(n, 100, seed)
    if case == "cifar10":
        return paperlib.cifar10(n, seed=seed)
    return paperlib.photographs(n, seed=seed)


def drawing_time(model: paperlib.RandomFeatures) -> float:
    """Seconds for torch to draw V once, in blocks that are thrown away, on the model's device."""
    height = model.block_rows
    block = torch.empty(height, model.d, device=model.device)
    begun = time.perf_counter()
    for start in range(0, model.p, height):
        if model.device.type == "cpu":  # on all threads
            draws = -(-min(height, model.p - start) // ROWS_PER_DRAW)
            rows = torch.empty(draws, ROWS_PER_DRAW * model.d)
            fill_by_torch(rows, "V", 0, 0, model.d**-0.5)
        else:
            block.normal_()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def measure(
    model: paperlib.RandomFeatures, theta: torch.Tensor, X: torch.Tensor, seed: int, **options
) -> dict:
    """One reconstruction: seconds, passes, and the error reached."""
    found = paperlib.reconstruct(model, theta, len(X), seed=seed, **options)
    errors = paperlib.compare(X, found.samples)
    return {
        "solver": found.options["solver"],
        "seed": seed,
        "seconds": found.seconds,
        "passes": found.passes,
        "steps": found.history[-1]["step"] if len(found.stages) == 1 else len(found.history),
        "loss": found.loss,
        "seconds a step": found.history[-1]["seconds"] / found.history[-1]["step"],
        "tolerance": found.options["tolerance"],
        "reached": found.explained,
        "recovered (0.001)": errors.recovered(1e-3),
        "recovered (0.05)": errors.recovered(),
        "mean error": errors.signed_error,
        "largest error": float(errors.signed.max()),
    }


def compare_solvers(case: str, options: argparse.Namespace) -> pandas.DataFrame:
    """All runs of a case, a row each; saved after every run, so that none is lost."""
    n, p, preset = CASES[case]
    data = load(case, n, options.data_seed)
    X, y = data.X.to(options.device), data.y.to(options.device)
    model = paperlib.RandomFeatures(
        X.shape[1], p, "relu", seed=options.data_seed, device=options.device
    )
    theta = paperlib.fit_min_norm(model, X, y)
    drawing = drawing_time(model)
    print(f"{case}: n = {n}, d = {model.d}, p = {p}, V drawn in {drawing:.2f} s", flush=True)
    kind = machine()
    about = {
        "case": case,
        "n": n,
        "d": model.d,
        "p": p,
        "activation": "relu",
        "data seed": options.data_seed,
    }
    where = {
        "seconds to draw V": drawing,
        "processor": kind["processor"],
        "cores": kind["cores"],
        "threads": torch.get_num_threads(),
        "gpu": kind["gpu"],
        "torch": kind["libraries"]["torch"],
    }
    rows = []

    def table() -> pandas.DataFrame:
        return pandas.DataFrame([{**about, **row, **where} for row in rows])

    def keep(row: dict) -> None:
        rows.append(row)
        show(row)
        if options.out:
            table().to_csv(options.out, index=False)

    for seed in range(options.published_seeds):
        row = measure(
            model,
            theta,
            X,
            seed,
            solver="published",
            max_steps=options.published_steps,
            **PRESETS[preset].options,
        )
        a_step = row["seconds a step"]
        steps = row["steps"] if row["reached"] else max(LIMIT, row["steps"])
        row["steps to stop or limit"] = steps
        row["seconds to stop or limit"] = a_step * steps
        row["the same, V drawn anew"] = (a_step + n * drawing) * steps
        keep(row)
    for seed in range(options.seeds):
        row = measure(model, theta, X, seed)
        del row["seconds a step"]  # steps of several stages are not alike
        row["seconds to stop or limit"] = row["seconds"]
        keep(row)
    return table()


def show(row: dict) -> None:
    """One line a run, as soon as it is there."""
    reached = "reached" if row["reached"] else "NOT reached"
    print(
        f"  {row['solver']:<20} seed {row['seed']}: {row['seconds']:8.1f} s "
        f"{row['passes']:6d} passes, {row['steps']:6d} steps, loss {row['loss']:.1e} "
        f"({row['tolerance']:.0e} {reached}), {row['recovered (0.001)']} below 0.001, "
        f"{row['recovered (0.05)']} below 0.05, mean error {row['mean error']:.1e}",
        flush=True,
    )


def summarise(table: pandas.DataFrame) -> str:
    """The ratios of the two solvers in words."""
    n = int(table["n"].iloc[0])
    published = table[table["solver"] == "published"]
    default = table[table["solver"] != "published"]
    complete = int((default["recovered (0.001)"] == n).sum())
    lines = [
        f"default: all {n} samples below 0.001 from {complete} of {len(default)} seeds, median "
        f"{default['seconds'].median():.1f} s and {default['passes'].median():.0f} passes"
    ]
    for row in published.to_dict("records"):
        if row["reached"]:
            until = f"to its stopping loss, {row['steps']} steps"
        elif row["steps"] >= LIMIT:
            until = f"{row['steps']} steps, stopping loss not reached"
        else:
            until = (
                f"{LIMIT} steps, estimated from {row['steps']} steps, after which the stopping "
                "loss was not reached"
            )
        seconds, anew = row["seconds to stop or limit"], row["the same, V drawn anew"]
        typical = statistics.median(default["seconds"])
        lines.append(
            f"published, seed {row['seed']}: {seconds:.0f} s ({until}), {seconds / typical:.0f} "
            f"times the default; with V drawn anew {anew:.0f} s, {anew / typical:.0f} times"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=sorted(CASES), default="synthetic")
    parser.add_argument("--seeds", type=int, default=10, help="seeds of the default solver")
    parser.add_argument("--published-seeds", type=int, default=1)
    parser.add_argument("--published-steps", type=int, default=LIMIT)
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if min(options.seeds, options.published_seeds, options.published_steps) < 1:
        parser.error("seeds and steps must be at least 1")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
    print(summarise(compare_solvers(options.case, options)))


if __name__ == "__main__":
    main()
