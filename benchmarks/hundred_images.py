"""The paper's headline figure: n = 100 pictures of CIFAR-10 read back at once.

    PAPERLIB_CIFAR10=FOLDER python benchmarks/hundred_images.py [--p-over-dn 3] --resume FOLDER

Draws the strip of originals and reconstructions and saves it with its data (`save_figure`), and
beside it a log: every step (`NAME_steps.csv`) and every stage (`NAME_stages.csv`) of the solver.
With `--resume`, a run that was killed goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import pandas
import torch
from torch import Tensor

import paperlib


def main() -> None:
    """Train, attack, compare, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--p-over-dn", type=float, default=3.0)
    parser.add_argument("--activation", default="relu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, default=Path("figures"))
    parser.add_argument("--resume", type=Path, help="folder that keeps the attack; default: none")
    options = parser.parse_args()

    paperlib.use_style()
    data = paperlib.cifar10(options.n, seed=options.seed)
    p = round(options.p_over_dn * data.d * data.n)
    X, y = data.X.to(options.device), data.y.to(options.device)
    model = paperlib.RandomFeatures(
        data.d, p, options.activation, seed=options.seed, device=options.device
    )
    theta = paperlib.fit_min_norm(model, X, y)
    begun = time.perf_counter()

    def watch(stage: str, loss: float, candidates: Tensor) -> None:
        print(f"{time.perf_counter() - begun:7.0f} s  {stage:20s}  loss {loss:.2e}", flush=True)

    record = paperlib.reconstruct(
        model,
        theta,
        data.n,
        seed=options.seed,
        restarts=options.restarts,
        progress=False,
        callback=watch,
        resume=options.resume,
    )
    errors = paperlib.compare(data.X, record.samples)
    if model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(model.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(record.status)
    print(errors)
    print(f"{record.passes} passes, {record.seconds:.0f} s, peak memory {peak / 1e9:.1f} GB")

    name = f"hundred_images_{options.p_over_dn:g}dn".replace(".", "_")
    if options.n != 100:
        name = name.replace("hundred", f"{options.n}")
    figure = paperlib.image_strip(
        {
            "original": data.images(),
            "read back": data.images(errors.matched, index=range(data.n)),
        },
        title=f"{data.n} pictures of CIFAR-10, read back from p = {p:,} parameters "
        f"({options.p_over_dn:g} d n)",
        columns=20,
        width=16,
    )
    table = pandas.DataFrame(
        {
            "sample": range(data.n),
            "name": data.names,
            "signed_error": errors.signed,
            "up_to_sign_error": errors.up_to_sign,
            "published_error": errors.published,
        }
    )
    paths = paperlib.save_figure(
        figure,
        name,
        data=table,
        caption=f"{data.n} pictures of CIFAR-10, frogs and trucks, each above what was read back "
        f"from the p = {p:,} parameters of a random-features model ({options.activation}) trained "
        f"on them: {errors.recovered(1e-3)} of {data.n} with an error below 0.001, the largest "
        f"{errors.signed.max():.1g}.",
        alt="Rows of twenty small photographs of frogs and trucks; under each row the pictures "
        "read back from the parameters, in the same order.",
        provenance=record.options
        | {
            "loss": record.loss,
            "passes": record.passes,
            "peak_memory_bytes": peak,
            "threads": torch.get_num_threads(),
            "data": data.source,
        },
        seconds=record.seconds,
        folder=options.folder,
    )
    beside = paths["csv"].with_suffix("")
    record.history_frame().to_csv(f"{beside}_steps.csv", index=False)
    pandas.DataFrame(record.stages).to_csv(f"{beside}_stages.csv", index=False)


if __name__ == "__main__":
    main()
