"""Normal numbers of our own kernel: those of torch, whatever the sizes, seeds and threads."""

import numpy as np
import pytest
import torch

import paperlib
from paperlib import gaussian_draws, reused_memory
from paperlib.block_height import ROWS_PER_DRAW
from paperlib.gaussian_draws import ROUNDING, fill
from paperlib.streams import stream, stream_seed

# Not `available`, which is false for a kernel that makes other numbers, too.
needs_kernel = pytest.mark.skipif(
    not gaussian_draws.compiles(), reason="needs AVX2 and a C++ compiler"
)


def by_torch(draws, count, *, seed=0, first=0, std=1.0):
    streams = [stream("V", seed, index=first + k) for k in range(draws)]
    return torch.stack([torch.empty(count).normal_(std=std, generator=s) for s in streams])


def filled(draws, count, *, seed=0, first=0, std=1.0):
    rows = torch.full((draws, count), torch.nan)
    fill(rows, "V", seed, first=first, std=std)
    return rows


@pytest.fixture(params=["", "-mno-avx512f"])
def processor(request, compile_with):
    compile_with(request.param)
    assert gaussian_draws.available()


# The twister makes 208 numbers at once, and 16 times as many before it begins at the front again.
@needs_kernel
@pytest.mark.parametrize(
    ("draws", "count"), [(1, 16), (2, 192), (3, 208), (1, 224), (5, 16 * 208 + 32), (2, 1_000_000)]
)
def test_they_are_the_numbers_of_torch(processor, monkeypatch, draws, count):
    used = []
    kernel = gaussian_draws.fill_by_kernel
    monkeypatch.setattr(
        gaussian_draws, "fill_by_kernel", lambda *all: used.append(1) or kernel(*all)
    )
    ours = filled(draws, count, seed=3, first=2, std=0.5)
    theirs = by_torch(draws, count, seed=3, first=2, std=0.5)
    assert used and (ours - theirs).abs().max() <= 0.5 * ROUNDING


@needs_kernel
def test_seeds_go_round():
    """The seed after the last of 32 bits is the first."""
    first = 2**32 - 1 - stream_seed("V", 0)
    assert stream_seed("V", 0, index=first + 1) == 0
    assert (filled(2, 64, first=first) - by_torch(2, 64, first=first)).abs().max() <= ROUNDING


@needs_kernel
def test_the_number_of_threads_does_not_matter():
    found = []
    for count in (1, 3):
        torch.set_num_threads(count)
        found.append(filled(7, 320))
    assert torch.equal(*found)


def test_what_is_no_group_of_sixteen_torch_draws():
    assert torch.equal(filled(2, 100), by_torch(2, 100))


def test_a_torch_that_draws_otherwise_is_followed(monkeypatch):
    kernel = gaussian_draws.fill_by_kernel

    def otherwise(rows, *others):
        kernel(rows, *others)
        rows[-1, -1] += 1e-3

    monkeypatch.setattr(gaussian_draws, "fill_by_kernel", otherwise)
    gaussian_draws.available.cache_clear()
    try:
        assert not gaussian_draws.available()
        assert torch.equal(filled(2, 64), by_torch(2, 64))
    finally:
        gaussian_draws.available.cache_clear()


@needs_kernel
def test_the_kernel_is_found_whatever_torch_makes_by_default():
    gaussian_draws.available.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert gaussian_draws.available()
    finally:
        torch.set_default_dtype(torch.float32)
        gaussian_draws.available.cache_clear()


def test_without_a_compiler_v_is_the_same(monkeypatch):
    model = paperlib.RandomFeatures(20, 2500, seed=4)
    monkeypatch.setattr(gaussian_draws, "available", lambda: False)
    other = paperlib.RandomFeatures(20, 2500, seed=4)
    assert (model.V - other.V).abs().max() <= ROUNDING * 20**-0.5


def test_rows_that_are_held_are_not_drawn_over():
    model = paperlib.RandomFeatures(
        7, 9 * ROWS_PER_DRAW + 5, placement="streamed", block_rows=ROWS_PER_DRAW
    )
    kept = paperlib.RandomFeatures(7, 9 * ROWS_PER_DRAW + 5, placement="resident")
    held = [V for _, V in model.weight_blocks()]
    assert torch.equal(torch.cat(held), kept.V)


def test_a_pass_draws_into_the_same_memory_again(monkeypatch):
    model = paperlib.RandomFeatures(
        7, 9 * ROWS_PER_DRAW, placement="streamed", block_rows=ROWS_PER_DRAW
    )
    taken, empty = [], np.empty
    monkeypatch.setattr(
        reused_memory.np, "empty", lambda *size, **kind: taken.append(size) or empty(*size, **kind)
    )
    assert sum(len(V) for _, V in model.weight_blocks()) == model.p
    assert 1 <= len(taken) <= 3


def test_v_is_drawn_from_streams_of_its_seed():
    model = paperlib.RandomFeatures(7, 3 * ROWS_PER_DRAW + 5, seed=4)
    expected = by_torch(4, ROWS_PER_DRAW * 7, seed=4, std=7**-0.5).view(-1, 7)[: model.p]
    assert (model.V - expected).abs().max() <= ROUNDING
    assert (model.draw(2 * ROWS_PER_DRAW, model.p) - expected[2 * ROWS_PER_DRAW :]).norm() < 1e-3
