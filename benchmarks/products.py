"""How near the products of the attack run to what the machine can do.

    python benchmarks/products.py [--d 3072] [--p 65536] [--n 14 30 70 140] [--threads 2]
        [--dtypes bfloat16 float32 int8] [--avx2] [--out results/products.csv]

Each product of r rows with V (2 r p d operations; n rows for the candidates and one for the linear
part) has two floors: its operations over the rate of a large square matrix product, and one reading
of V over the bandwidth of a large sum. The larger of the two floors over the time measured is its
efficiency, 1 at best. All in one run, with the kernels of this package where the machine has them,
and with the libraries of torch alone. int8 is for the Gauss-Newton product alone. `--avx2` leaves
AVX-512 unused, as on processors that do not have it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from unittest import mock

import pandas
import torch

import paperlib
from paperlib import between_products, few_rows
from paperlib.int8 import multiply
from paperlib.lift import Lift
from paperlib.matrix_product import combine
from paperlib.memory import INPUTS, INPUTS_DIMENSION, PRODUCTS
from paperlib.precision import arithmetic
from paperlib.projection import Linearization
from paperlib.results import save_table

SIDE = 2048


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds after one warm-up, the device waited for.

    On one CPU thread these are processor seconds, which leave out what other processes took.
    """
    alone = not torch.cuda.is_available() and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter

    def once() -> float:
        begun = clock()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock() - begun

    once()
    return statistics.median(once() for _ in range(repeats))


@lru_cache
def ceilings(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Operations a second of a square product, and bytes a second of reading a large tensor."""
    square = torch.randn(SIDE, SIDE, device=device)
    if dtype == torch.int8:
        square = (20 * square).to(dtype)
        rate = 2 * SIDE**3 / seconds(lambda: multiply(square, square))
    else:
        square = square.to(arithmetic(dtype))
        # Whichever of the libraries of torch is faster; our kernels are for few rows only.
        ways = lambda: square @ square, lambda: combine(square, square)
        rate = 2 * SIDE**3 / min(seconds(way) for way in ways)
    # Read as float32 whatever the dtype: sums in bfloat16 are bound by arithmetic.
    long = torch.randn(2**27, device=device)
    return rate, 4 * len(long) / seconds(lambda: long.sum())


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
    ):
        yield


def measure(n: int, p: int, d: int, dtype: torch.dtype, device: str) -> list[dict]:
    """Rows for linearising and for the Gauss-Newton product, by each kind of kernel."""
    rows = []
    if device == "cpu" and few_rows.available(dtype):
        rows += measure_with("own", n, p, d, dtype, device)
    with libraries_alone():
        return rows + measure_with("libraries", n, p, d, dtype, device)


def measure_with(
    kernels: str, n: int, p: int, d: int, dtype: torch.dtype, device: str
) -> list[dict]:
    """The same by one kind of kernel."""
    rate, bandwidth = ceilings(dtype, device)
    model, lift = problem(p, d, device)
    X = paperlib.sphere(n, d, seed=2).X.to(device)
    keep = INPUTS if d >= INPUTS_DIMENSION else PRODUCTS  # as the solver does

    def linearize() -> Linearization:
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
    size = torch.empty(0, dtype=dtype).element_size()
    # (name, work, rows that are multiplied with V, readings of V)
    cases = [
        ("linearize", linearize, 3 * n + 1, 2),
        ("Gauss-Newton product", lambda: point.product(*step), 2 * (n + 1), 1),
    ]
    if dtype == torch.int8:
        cases = cases[1:]
    rows = []
    for name, work, multiplied, readings in cases:
        took = seconds(work)
        operations, read = 2 * multiplied * p * d, size * p * d * readings
        floor = max(operations / rate, read / bandwidth)
        rows.append(
            {
                "product": name,
                "dtype": str(dtype).removeprefix("torch."),
                "instructions": "AVX2" if "ONEDNN_MAX_CPU_ISA" in os.environ else "all",
                "kernels": kernels,
                "n": n,
                "p": p,
                "d": d,
                "threads": torch.get_num_threads(),
                "seconds": took,
                "gigaflops": operations / took / 1e9,
                "ceiling_gigaflops": rate / 1e9,
                "bandwidth_gigabytes": bandwidth / 1e9,
                "efficiency": floor / took,
            }
        )
    return rows


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
        for n in options.n:
            rows += measure(n, options.p, options.d, dtype, options.device)
            if options.out:
                save_table(pandas.DataFrame(rows), options.out)
    print(pandas.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    main()
