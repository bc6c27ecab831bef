"""Products in 8 bits: exact for whole numbers, near for others, and enough for an attack."""

import pytest
import torch

import paperlib
from paperlib import int8
from paperlib.int8 import Int8Rows
from paperlib.precision import Formats, bulk_formats

VNNI = int8.fast_int8(torch.device("cpu"))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape, seed=0):
    numbers = torch.randint(
        -127, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32
    )
    numbers[:, 0] = 127  # so that every row's scale is one
    return numbers


def test_whole_numbers_are_multiplied_exactly():
    V, A, W = whole(40, 30), whole(5, 30, seed=1), whole(5, 40, seed=2)
    rows = Int8Rows.of(V)
    assert torch.equal(rows.float(), V) and rows.shape == (40, 30) and len(rows) == 40
    assert torch.equal(rows.project(A), A @ V.T)
    assert torch.equal(rows.combine(W), W @ V)


def test_a_left_factor_in_16_bits_loses_little_even_where_its_numbers_differ_much():
    V = Int8Rows.of(randn(3000, 40))
    W = randn(5, 3000, seed=1) * randn(5, 3000, seed=2) * randn(5, 3000, seed=3)
    exact = W.double() @ V.float().double()

    def error(found):
        return float((found - exact).norm() / exact.norm())

    assert error(V.combine_sharp(W)) < 1e-3 < 0.02 < error(V.combine(W))
    zeros = V.combine_sharp(torch.zeros(2, 3000))
    assert torch.equal(zeros, torch.zeros(2, 40))


@pytest.mark.skipif(not VNNI, reason="no instructions for 8 bits")
def test_the_processor_s_instructions_give_the_same_numbers(monkeypatch):
    A, B = whole(7, 900).to(torch.int8), whole(900, 33, seed=1).to(torch.int8)
    fast = int8.multiply(A, B)
    monkeypatch.setattr(int8, "fast_int8", lambda device: False)
    assert torch.equal(fast.double(), A.double() @ B.double())
    torch.testing.assert_close(int8.multiply(A, B), fast, rtol=1e-5, atol=16)


def test_sums_do_not_overflow():
    ones = torch.full((1, int8.MOST_TERMS + 1), 127, dtype=torch.int8)
    expected = 127.0**2 * (int8.MOST_TERMS + 1)
    assert expected >= 2**31
    assert float(int8.multiply(ones, ones.T)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("spread", [1.0, 1e-20, 1e20])
def test_the_error_is_that_of_rounding_rows_of_any_length(spread):
    V = randn(300, 200) * torch.logspace(-3, 3, 300)[:, None]
    A, W = spread * randn(4, 200, seed=1), spread * randn(4, 300, seed=2)
    rows = Int8Rows.of(V)
    step = V.abs().amax(1, keepdim=True) / 127
    assert bool(((rows.float() - V).abs() <= 0.5001 * step).all())
    for found, exact in ((rows.project(A), A @ V.T), (rows.combine(W), W @ V)):
        error = float((found - exact).double().norm() / exact.double().norm())
        assert 1e-4 < error < 0.03


def test_rows_of_zeros_stay_zero():
    rows = Int8Rows.of(torch.zeros(3, 4))
    assert torch.equal(rows.float(), torch.zeros(3, 4))
    assert torch.equal(rows.project(torch.zeros(2, 4)), torch.zeros(2, 3))


def test_tiles_are_views_of_all_rows():
    V = randn(10, 6)
    tiles = list(Int8Rows.of(V).split(4))
    assert [len(tile) for tile in tiles] == [4, 4, 2]
    assert torch.equal(torch.cat([tile.float() for tile in tiles]), Int8Rows.of(V).float())
    first, second = (tile.values.untyped_storage().data_ptr() for tile in tiles[:2])
    assert first == second


@pytest.mark.parametrize("placement", ["resident", "streamed"])
def test_blocks_in_8_bits_are_those_of_v(placement):
    model = paperlib.RandomFeatures(700, 3000, placement=placement, block_rows=2048)
    X, dX, W = randn(3, 700), randn(3, 700, seed=1), randn(3, 3000, seed=2)
    heights = []
    jvp, vjp = torch.zeros(3, 3000), torch.zeros(3, 700)
    for block in model.blocks(dtype=torch.int8):
        heights.append(block.stop - block.start)
        _, state = block.linearize(X)
        jvp[:, block.start : block.stop] = block.jvp(state, dX)
        vjp += block.vjp(state, W[:, block.start : block.stop])
    assert heights == [2048, 952]  # taller than in float32, and never across a block
    for found, exact in ((jvp, model.jvp(X, dX)), (vjp, model.vjp(X, W))):
        assert 1e-4 < float((found - exact).norm() / exact.norm()) < 0.2  # some slopes flip
    assert model.holds(torch.int8) == (placement == "resident")


def test_auto_multiplies_in_8_bits_where_that_is_fast(monkeypatch):
    def formats(d, *, bf16, int8, units=False, n=20, **options):
        monkeypatch.setattr("paperlib.precision.fast_bfloat16", lambda device: bf16 or units)
        monkeypatch.setattr("paperlib.precision.bfloat16_units", lambda device: units)
        monkeypatch.setattr("paperlib.precision.fast_int8", lambda device: int8)
        model = paperlib.RandomFeatures(d, 24_000_000 // d, **options)
        return bulk_formats(model, n, 2000)

    single = Formats(torch.float32, torch.float32)
    half = Formats(torch.bfloat16, torch.bfloat16)
    mixed = Formats(torch.float32, torch.int8)
    assert formats(600, bf16=False, int8=True) == mixed
    assert formats(600, bf16=False, int8=False) == single
    assert formats(100, bf16=False, int8=True) == single  # rounding would take too long
    assert formats(600, bf16=False, int8=True, dtype=torch.float64) == mixed
    given = paperlib.GivenFeatures(randn(1000, 600))
    assert bulk_formats(given, 20, 2000) == single
    # bfloat16 loses the least of many samples: it has to be much faster to begin with it.
    both = Formats(torch.bfloat16, torch.int8)
    assert formats(600, bf16=True, int8=True, n=32) == both
    assert formats(100, bf16=True, int8=True, n=32) == half
    assert formats(600, bf16=True, int8=False, n=32) == half
    assert formats(600, bf16=True, int8=True, n=32, units=True) == both
    assert formats(600, bf16=True, int8=True, n=33) == mixed
    assert formats(600, bf16=True, int8=True, n=33, units=True) == both
    assert formats(600, bf16=True, int8=False, n=33) == half
    assert formats(100, bf16=True, int8=True, n=33) == half
    # Drawn in every pass, nothing is gained by fewer digits.
    assert formats(600, bf16=True, int8=True, placement="streamed") == single


def test_8_bits_are_for_random_features_only():
    given = paperlib.GivenFeatures(randn(100, 8))
    with pytest.raises(ValueError, match="bulk='int8' needs random features"):
        paperlib.reconstruct(given, torch.ones(1, 100), 2, bulk="int8")


@pytest.mark.parametrize("activation", ["relu", "relu+tanh", "tanh"])
def test_an_attack_with_products_in_8_bits_ends_as_exactly_as_any(activation):
    data = paperlib.sphere(5, 30, seed=3)
    model = paperlib.RandomFeatures(30, 1500, activation, seed=5)
    theta = paperlib.fit_min_norm(model, data.X, data.y)
    found = paperlib.reconstruct(
        model, theta, 5, seed=1, bulk="int8", start="random", progress=False
    )
    assert {stage["products"] for stage in found.stages if stage["stage"] == "bulk"} == {"int8"}
    assert {stage["dtype"] for stage in found.stages} == {"float32"}
    assert found.explained and found.loss < 1e-10
    errors = paperlib.compare(data.X, found.samples)
    assert (errors.up_to_sign if model.odd else errors.signed).max() < 1e-3


def test_loss_and_gradient_may_be_in_bfloat16_beside_products_in_8_bits(monkeypatch):
    mixed = Formats(torch.bfloat16, torch.int8)
    monkeypatch.setattr("paperlib.second_order.bulk_formats", lambda *arguments: mixed)
    data = paperlib.sphere(5, 30, seed=3)
    model = paperlib.RandomFeatures(30, 1500, seed=5)
    theta = paperlib.fit_min_norm(model, data.X, data.y)
    found = paperlib.reconstruct(model, theta, 5, seed=1, start="random", progress=False)
    formats = {(stage["dtype"], stage["products"]) for stage in found.stages}
    assert {("bfloat16", "int8"), ("float32", "int8")} <= formats
    assert found.explained and found.loss < 1e-10
    assert paperlib.compare(data.X, found.samples).signed.max() < 1e-3
