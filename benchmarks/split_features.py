"""One attack in one process, and with its features split over processes.

    python benchmarks/split_features.py [--out FILE.csv]
    python -m torch.distributed.run --nproc-per-node=2 benchmarks/split_features.py [--out FILE.csv]

Prints, for each process, the bytes of V that it holds, the peak memory of the process, the seconds
a pass, and how far its samples are from the data; with `--out` it adds these rows to a table. With
`torchrun` on several machines the same command attacks a model whose V fits none of them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from pathlib import Path

import pandas
import torch
import torch.distributed as dist

import paperlib
from paperlib.results import machine


def main() -> None:
    """Attack, and print one line a process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--dimension", type=int, default=768)
    parser.add_argument("--p-over-dn", type=float, default=5.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(device)  # through which processes exchange what is no tensor, too
    group = None
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if cuda else "gloo")
        group = dist.group.WORLD
    torch.set_num_threads(1)
    data = paperlib.sphere(options.samples, options.dimension, seed=1)
    p = round(options.p_over_dn * options.samples * options.dimension)
    model = paperlib.RandomFeatures(options.dimension, p, seed=2, device=device, group=group)
    theta = paperlib.fit_min_norm(model, data.X.to(device), data.y)
    found = paperlib.reconstruct(
        model, theta, options.samples, seed=3, bulk="float32", progress=False
    )
    comparison = paperlib.compare(data.X, found.samples.cpu())
    rank = dist.get_rank() if group else 0
    row = {
        "processes": dist.get_world_size() if group else 1,
        "rank": rank,
        "n": options.samples,
        "d": options.dimension,
        "p": p,
        "weight_megabytes": model.features_held * options.dimension * 4 / 1e6,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "passes": found.passes,
        "seconds": found.seconds,
        "seconds_a_pass": found.seconds / found.passes,
        "loss": found.loss,
        "largest_error": float(comparison.signed.max()),
        "first_coordinates": found.samples[:, 0].tolist(),
    }
    print(json.dumps(row), flush=True)
    rows = [row]
    if group:
        rows = [None] * dist.get_world_size()
        dist.all_gather_object(rows, row)
    if options.out and rank == 0:
        kind = machine()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        table = pandas.DataFrame(rows).drop(columns="first_coordinates")
        table["processor"], table["cores"] = kind["processor"], kind["cores"]
        table.to_csv(options.out, mode="a", header=not options.out.exists(), index=False)
    if group:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
