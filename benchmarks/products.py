"""How near the products of the attack run to what the machine can do.

    python benchmarks/products.py [--d 3072] [--p 65536] [--n 14 30 70 140] [--threads 2]
        [--dtypes bfloat16 float32 int8] [--avx2] [--out results/products.csv]

Each product of r rows with V (2 r p d operations; n rows for the candidates and one for the linear
part) has two floors: its operations over the rate of a large square matrix product, and one reading
of V over the bandwidth of a large sum. The larger of the two floors over the time measured is its
efficiency, 1 at best. All take turns in one run, with the kernels of this package where the machine
has them, and with the libraries of torch alone; what is saved are medians over the rounds, the
efficiency being that of each round. int8 is for the Gauss-Newton product alone. V^T V of the lift
is symmetric: p d^2 operations, whatever n is. `--avx2` leaves AVX-512 unused, as on processors that
do not have it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from statistics import median
from unittest import mock

import pandas
import torch

import paperlib
from paperlib import between_products, few_rows, matrix_units, symmetric_product
from paperlib.int8 import multiply
from paperlib.lift import Lift
from paperlib.matrix_product import combine
from paperlib.memory import INPUTS, INPUTS_DIMENSION
from paperlib.memory import PRODUCTS as KEPT_PRODUCTS
from paperlib.precision import arithmetic
from paperlib.projection import Linearization
from paperlib.results import save_table

# Of the square matrices, and numbers of the large sum.
SIDE, READ = 2048, 2**27

LINEARIZE, PRODUCT, GRAM = "linearize", "Gauss-Newton product", "V^T V"

# Rounds, and for how long each work is done in one.
ROUNDS = 10
LEAST_SECONDS = 0.15


def rounds_of_seconds(
    works: Mapping[Hashable, Callable[[], object]],
) -> list[dict[Hashable, float]]:
    """The seconds of each work, round by round, the device waited for.

    Other processes add to them, on a machine with neighbours for seconds and for minutes: so the
    works take turns, and short ones are done again and again, lest a moment of quiet be enough for
    these alone. On one CPU thread these are processor seconds.
    """
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter

    def seconds(work: Callable[[], object], times: int) -> float:
        begun = clock()
        for _ in range(times):
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (clock() - begun) / times

    for work in works.values():
        work()  # what is made when it is first needed does not count
    times = {name: math.ceil(LEAST_SECONDS / seconds(work, 1)) for name, work in works.items()}
    return [
        {name: seconds(work, times[name]) for name, work in works.items()} for _ in range(ROUNDS)
    ]


def least_seconds(works: Mapping[Hashable, Callable[[], object]]) -> dict[Hashable, float]:
    """The least seconds of each work in all rounds: others can only add to them."""
    rounds = rounds_of_seconds(works)
    return {name: min(found[name] for found in rounds) for name in works}


def square_products(dtype: torch.dtype, device: str) -> list[Callable[[], object]]:
    """A square product, in the ways of the libraries of torch; our kernels are for few rows."""
    square = torch.randn(SIDE, SIDE, device=device)
    if dtype != torch.int8:
        square = square.to(arithmetic(dtype))
        return [lambda: square @ square, lambda: combine(square, square)]
    square = (20 * square).to(dtype)
    ways = [lambda: multiply(square, square)]
    if device == "cpu" and matrix_units.multiply(dtype):
        # The libraries do not use them in 8 bits.
        ways.append(lambda: few_rows.project(square, square))
    return ways


@lru_cache
def problem(p: int, d: int, device: str) -> tuple[paperlib.RandomFeatures, Lift]:
    """A model, and random parameters of it without their linear part."""
    model = paperlib.RandomFeatures(d, p, device=device, seed=1)
    return model, Lift(model, torch.randn(1, p, device=device), dtype=torch.float32)


@contextmanager
def libraries_alone() -> Iterator[None]:
    """Our kernels take nothing."""
    never = lambda *arguments: False  # noqa: E731
    with (
        mock.patch.object(few_rows, "takes", never),
        mock.patch.object(between_products, "takes", never),
        mock.patch.object(symmetric_product, "takes", never),
    ):
        yield


def measure(n: int | None, p: int, d: int, dtype: torch.dtype, device: str) -> list[dict]:
    """Rows for linearising and for the Gauss-Newton product, or V^T V, by each kind of kernel."""
    works: dict[Hashable, Callable[[], object]] = {}
    ways = square_products(dtype, device)
    works |= dict(enumerate(ways))
    # Read as float32 whatever the dtype: sums in bfloat16 are bound by arithmetic.
    long = torch.randn(READ, device=device)
    works["read"] = lambda: long.sum()
    kinds = {"libraries": libraries_alone}
    if device == "cpu" and few_rows.available(dtype):
        kinds = {"own": nullcontext} | kinds
    for kernels, context in kinds.items():
        if n is None:
            works[kernels, GRAM] = gram(p, d, dtype, device, context)
        else:
            for product, work in products(n, p, d, dtype, device, context).items():
                works[kernels, product] = work
    rounds = rounds_of_seconds(works)
    # How fast a processor's matrix units are depends on its neighbours from one second to the
    # next: floors and products are compared round by round.
    rates = [2 * SIDE**3 / min(took[way] for way in range(len(ways))) for took in rounds]
    bandwidths = [4 * len(long) / took["read"] for took in rounds]

    size = torch.empty(0, dtype=dtype).element_size()
    rows = []
    for kernels, product in (name for name in works if isinstance(name, tuple)):
        # Rows that are multiplied with V, and readings of V.
        if product == GRAM:
            multiplied, readings = d / 2, 1
        else:
            multiplied, readings = (3 * n + 1, 2) if product == LINEARIZE else (2 * (n + 1), 1)
        seconds = [took[kernels, product] for took in rounds]
        operations, read = 2 * multiplied * p * d, size * p * d * readings
        efficiencies = [
            max(operations / rate, read / bandwidth) / took
            for rate, bandwidth, took in zip(rates, bandwidths, seconds, strict=True)
        ]
        rows.append(
            {
                "product": product,
                "dtype": str(dtype).removeprefix("torch."),
                "instructions": "AVX2" if "ONEDNN_MAX_CPU_ISA" in os.environ else "all",
                "kernels": kernels,
                "n": n,
                "p": p,
                "d": d,
                "threads": torch.get_num_threads(),
                "seconds": median(seconds),
                "gigaflops": operations / median(seconds) / 1e9,
                "ceiling_gigaflops": median(rates) / 1e9,
                "bandwidth_gigabytes": median(bandwidths) / 1e9,
                "efficiency": median(efficiencies),
            }
        )
    return rows


def gram(
    p: int,
    d: int,
    dtype: torch.dtype,
    device: str,
    context: Callable[[], AbstractContextManager],
) -> Callable[[], object]:
    """V^T V, made within a context."""
    model, _ = problem(p, d, device)

    def make() -> None:
        with context():
            total = symmetric_product.SymmetricSum(d, device=model.device)
            for _, V in model.weight_blocks(dtype=dtype):
                total.add(V, V)

    return make


def products(
    n: int,
    p: int,
    d: int,
    dtype: torch.dtype,
    device: str,
    context: Callable[[], AbstractContextManager],
) -> dict[str, Callable[[], object]]:
    """The products by name, each made within a context."""
    model, lift = problem(p, d, device)
    X = paperlib.sphere(n, d, seed=2).X.to(device)
    keep = INPUTS if d >= INPUTS_DIMENSION else KEPT_PRODUCTS  # as the solver does

    def linearize() -> Linearization:
        with context():
            return Linearization(
                model,
                lift.theta,
                X,
                lift=lift,
                dtype=torch.float32 if dtype == torch.int8 else dtype,
                curvature_dtype=dtype,
                curvature=True,
                keep=keep,
            )

    point = linearize()
    step = torch.randn_like(X), X.new_zeros(n, 1), X.new_zeros(1, d)

    def product() -> None:
        with context():
            point.product(*step)

    found: dict[str, Callable[[], object]] = {LINEARIZE: linearize, PRODUCT: product}
    if dtype == torch.int8:
        del found[LINEARIZE]
    return found


# What keeps a compiler, and the libraries of torch, from using AVX-512.
AVX2 = {
    "CXX": "c++ -mno-avx512f",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def leave_avx512_unused() -> None:
    """Begin again in an environment that hides AVX-512; there, hide it from this package too."""
    if os.environ | AVX2 != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | AVX2)
    has = torch.cpu.get_capabilities()
    newer = "avx512", "amx", "avx_vnni"
    hidden = {name: value for name, value in has.items() if not name.startswith(newer)}
    torch.cpu.get_capabilities = lambda: hidden


def main() -> None:
    """Measure, save as rows come and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--d", type=int, default=3072)
    parser.add_argument("--p", type=int, default=65536)
    parser.add_argument("--n", type=int, nargs="+", default=[14, 30, 70, 140])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32", "int8"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--avx2", action="store_true", help="as without AVX-512: float32 alone")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.avx2:
        leave_avx512_unused()
        options.dtypes = ["float32"]
    torch.set_num_threads(options.threads)
    rows = []
    for dtype in (getattr(torch, name) for name in options.dtypes):
        for n in options.n if dtype == torch.int8 else [*options.n, None]:
            rows += measure(n, options.p, options.d, dtype, options.device)
            if options.out:
                save_table(pandas.DataFrame(rows), options.out)
    print(pandas.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
