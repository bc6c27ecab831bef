"""Memory: predicted before the start, refused when it cannot fit, spent where it helps most."""

import pytest
import torch
from stage_by_stage import kept_bytes

import paperlib
from paperlib import memory
from paperlib.lift import Lift
from paperlib.memory import INPUTS, KEPT, NOTHING, PRODUCTS
from paperlib.message_passing import message_bytes
from paperlib.precision import (
    CHOICES,
    Formats,
    agreed_formats,
    bulk_formats,
    single_formats,
)
from paperlib.projection import Linearization

BFLOAT16 = Formats(torch.bfloat16, torch.bfloat16)
FLOAT16 = Formats(torch.float16, torch.float16)
FLOAT32 = Formats(torch.float32, torch.float32)


def set_free(monkeypatch, size):
    monkeypatch.setattr("paperlib.random_features.free_bytes", lambda device: size)
    monkeypatch.setattr("paperlib.memory.free_bytes", lambda device: size)


def test_a_reconstruction_that_cannot_fit_is_refused_before_v_is_drawn(monkeypatch):
    model = paperlib.RandomFeatures(50, 4000, placement="resident")
    theta = torch.ones(1, 4000)
    set_free(monkeypatch, 100_000)
    with pytest.raises(MemoryError, match=r"needs .* 100 kB are free .* placement='streamed'"):
        paperlib.reconstruct(model, theta, 3)
    assert not model.holds(torch.float32)


def test_the_prediction_counts_every_resident_copy_of_the_weights():
    model = paperlib.RandomFeatures(50, 4000, placement="resident")
    parts = memory.predicted_bytes(model, 10, 1, BFLOAT16)
    assert parts["weights"] == 50 * 4000 * (4 + 2)
    list(model.weight_blocks())
    assert memory.predicted_bytes(model, 10, 1, BFLOAT16)["weights"] == 50 * 4000 * 2
    streamed = paperlib.RandomFeatures(50, 4000, placement="streamed")
    assert memory.predicted_bytes(streamed, 10, 1, BFLOAT16)["weights"] == 0


def test_copies_are_not_promised_the_same_memory_twice(monkeypatch):
    """Each format alone takes less than its share of 1.3 MB; both together do not fit."""
    set_free(monkeypatch, 1_350_000)
    model = paperlib.RandomFeatures(50, 4000)
    assert model.keeps(torch.float32) and model.keeps(torch.float16)
    first = model.resident_formats([torch.float32, torch.float16])
    assert first == {torch.float32: 800_000}
    first = model.resident_formats([torch.float16, torch.float32])
    assert first == {torch.float16: 400_000}


def test_auto_streams_what_does_not_fit(monkeypatch):
    set_free(monkeypatch, 1_000_000)
    model = paperlib.RandomFeatures(50, 4000)
    assert not model.keeps(torch.float32)  # 800 kB of 1 MB: more than its share
    assert model.keeps(torch.bfloat16)  # 400 kB


def test_auto_stores_v_in_16_bits_where_float32_does_not_fit(monkeypatch):
    monkeypatch.setattr("paperlib.precision.fast_bfloat16", lambda device: False)
    monkeypatch.setattr("paperlib.precision.WORTHWHILE", 1)
    model = paperlib.RandomFeatures(50, 4000)
    for free, expected in ((10**7, torch.float32), (10**6, torch.float16), (10**4, torch.float32)):
        set_free(monkeypatch, free)
        assert bulk_formats(model, 7, 10) == (expected, expected)
    model.placement = "streamed"  # then storing fewer bits gains nothing
    assert bulk_formats(model, 7, 10).bulk == torch.float32


def test_auto_keeps_8_bits_where_16_do_not_fit(monkeypatch):
    """V takes 2.4 MB in float32, 1.2 in 16 bits, 0.6 in 8; loss and gradient need float32."""
    monkeypatch.setattr("paperlib.precision.fast_bfloat16", lambda device: True)
    monkeypatch.setattr("paperlib.precision.fast_int8", lambda device: True)
    monkeypatch.setattr("paperlib.precision.WORTHWHILE", 1)
    model = paperlib.RandomFeatures(600, 1000)
    for free, expected in (
        (2_100_000, BFLOAT16),
        (1_900_000, Formats(torch.float32, torch.int8)),
        (900_000, FLOAT32),
    ):
        set_free(monkeypatch, free)
        assert bulk_formats(model, 7, 10) == expected
    set_free(monkeypatch, 10**8)
    list(model.weight_blocks())
    set_free(monkeypatch, 100_000)  # beside float32, which can be given up
    assert bulk_formats(model, 7, 10) == BFLOAT16


def test_an_attack_with_room_for_8_bits_only_finds_the_same_samples(monkeypatch):
    """V takes 72 MB in float32, 18 in 8 bits: loss and gradient draw it anew."""
    monkeypatch.setattr("paperlib.precision.fast_int8", lambda device: True)
    monkeypatch.setattr("paperlib.precision.WORTHWHILE", 1)
    data = paperlib.sphere(3, 600, seed=1)
    model = paperlib.RandomFeatures(600, 30_000, block_rows=1024)
    set_free(monkeypatch, 55_000_000)
    theta = paperlib.fit_min_norm(model, data.X, data.y)
    found = paperlib.reconstruct(model, theta, 3, progress=False)
    assert model.holds(torch.int8)
    assert not any(map(model.holds, (torch.float32, torch.float16, torch.bfloat16)))
    assert paperlib.compare(data.X, found.samples).recovered(1e-3) == 3


def test_room_that_was_made_is_kept(monkeypatch):
    """What an attack has been promised it gets, though less is free when it comes to use it."""
    model = paperlib.RandomFeatures(50, 4000)
    set_free(monkeypatch, 5_000_000)
    model.reserve(memory.allot(model, 3, 1, FLOAT32, n=3).resident)
    set_free(monkeypatch, 100_000)  # V takes 800 kB
    assert model.keeps(torch.float32) and not model.keeps(torch.bfloat16)
    assert not model.fits(torch.float32)  # for another attack it is counted anew
    set_free(monkeypatch, 10**8)
    assert not model.keeps(torch.bfloat16)  # nobody has counted it
    model.reserve(None)
    assert model.keeps(torch.bfloat16)


def test_the_exact_copy_gives_way_where_all_copies_would_not_fit(monkeypatch):
    model = paperlib.RandomFeatures(50, 4000)
    sizes = (model, 3, 1, FLOAT16)
    set_free(monkeypatch, 10**8)
    both, one = (
        sum(memory.predicted_bytes(*sizes, keep=INPUTS, exact=exact).values())
        for exact in (True, False)
    )
    assert both - one == 800_000
    for free, resident in ((both, {torch.float16, torch.float32}), (both - 1, {torch.float16})):
        set_free(monkeypatch, free)
        assert memory.allot(*sizes, n=3, keep=INPUTS).resident == resident
    set_free(monkeypatch, one - 1)
    with pytest.raises(MemoryError, match="needs"):
        memory.allot(*sizes, n=3, keep=INPUTS)


def test_8_bits_are_chosen_only_where_the_copy_stays(monkeypatch):
    """V takes 2.4 MB in float32 and is there; 0.6 in 8 bits."""
    monkeypatch.setattr("paperlib.precision.fast_int8", lambda device: True)
    model = paperlib.RandomFeatures(600, 1000, placement="auto")
    set_free(monkeypatch, 10**8)
    list(model.weight_blocks())
    for free, products in ((1_100_000, torch.int8), (900_000, torch.float32)):
        set_free(monkeypatch, free)
        assert single_formats(model) == Formats(torch.float32, products)


@pytest.mark.parametrize(
    ("other", "agreed"),
    [(BFLOAT16, BFLOAT16), (FLOAT32, FLOAT32), (Formats(torch.float32, torch.int8), FLOAT32)],
)
def test_processes_take_the_same_formats(monkeypatch, other, agreed):
    model = paperlib.RandomFeatures(50, 4000)

    def add_votes(tensors):
        tensors[0][CHOICES.index(other)] += 1

    monkeypatch.setattr(model, "sum_over_processes", add_votes)
    assert agreed_formats(model, BFLOAT16) == agreed


def test_no_process_begins_where_another_has_no_room(monkeypatch):
    data = paperlib.sphere(3, 40, seed=1)
    model = paperlib.RandomFeatures(40, 600)
    theta = paperlib.fit_min_norm(model, data.X, data.y)

    def refused_elsewhere(tensors):
        if tensors[0].shape == (1,):  # whether there is no room
            tensors[0] += 1

    monkeypatch.setattr(model, "sum_over_processes", refused_elsewhere)
    with pytest.raises(MemoryError, match="another process has no room"):
        paperlib.reconstruct(model, theta, 3, progress=False)


def test_a_run_whose_exchanges_would_not_fit_is_refused(monkeypatch):
    data = paperlib.sphere(3, 40, seed=1)
    model = paperlib.RandomFeatures(40, 240, placement="streamed")  # p = 2 d n
    theta = paperlib.fit_min_norm(model, data.X, data.y)
    monkeypatch.setattr("paperlib.second_order.exchange_bytes", lambda *sizes: 10**9)
    set_free(monkeypatch, 10**8)
    with pytest.raises(MemoryError, match="activations 1 GB"):
        paperlib.reconstruct(model, theta, 3, progress=False)


def test_a_limit_of_the_users_counts_what_the_process_has_taken(monkeypatch):
    cpu = torch.device("cpu")
    free = memory.free_bytes(cpu)
    monkeypatch.setenv("PAPERLIB_MEMORY", "1000 TB")
    assert memory.free_bytes(cpu) == pytest.approx(free, rel=0.5)  # other processes come and go
    taken = memory.psutil.Process().memory_info().rss
    monkeypatch.setenv("PAPERLIB_MEMORY", f"{taken + 10_000_000_000} B")
    assert memory.free_bytes(cpu) <= 10_100_000_000
    monkeypatch.setenv("PAPERLIB_MEMORY", "1 MB")
    assert memory.free_bytes(cpu) == 0
    monkeypatch.setenv("PAPERLIB_MEMORY", "plenty")
    with pytest.raises(ValueError, match="must be a size such as \"4 GB\", got 'plenty'"):
        memory.free_bytes(cpu)


def test_what_is_free_on_a_gpu(monkeypatch):
    """torch gives out again what it has of the memory and no tensor is in."""
    gpu = torch.device("cuda", 0)
    said = {"memory_allocated": 3_000, "memory_reserved": 5_000, "mem_get_info": (20_000, 90_000)}
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, {gpu: value}.__getitem__)
    assert memory.free_bytes(gpu) == 22_000
    monkeypatch.setenv("PAPERLIB_MEMORY", "10 kB")
    assert memory.free_bytes(gpu) == 7_000


@pytest.mark.parametrize(
    ("free", "placement", "released"),
    [(300_000, "auto", True), (10**6, "auto", False), (300_000, "resident", False)],
)
def test_the_copy_of_the_bulk_stage_comes_first(monkeypatch, free, placement, released):
    """800 kB in float32, 400 kB in 16 bits: given up only where there is no room for both."""
    model = paperlib.RandomFeatures(50, 4000, placement=placement)
    list(model.weight_blocks())
    assert model.holds(torch.float32)
    set_free(monkeypatch, free)
    memory.make_room(model, BFLOAT16)
    assert model.holds(torch.float32) != released


def test_v_stored_in_float16_is_v_rounded_once():
    exact = paperlib.RandomFeatures(50, 4000, placement="resident", block_rows=2048)
    stored = paperlib.RandomFeatures(50, 4000, placement="resident", block_rows=2048)
    tiles = list(stored.weight_blocks(dtype=torch.float16))
    assert {V.dtype for _, V in tiles} == {torch.float32}  # widened for the product
    assert torch.equal(torch.cat([V for _, V in tiles]), exact.V.half().float())
    assert stored.holds(torch.float16) and not stored.holds(torch.float32)
    assert {block.stored.dtype for block in stored.blocks(dtype=torch.float16)} == {torch.float16}
    kept = sum(V.numel() * V.element_size() for V in stored._resident[torch.float16])
    assert kept == memory.predicted_bytes(stored, 3, 1, FLOAT16)["weights"] / 2 == 400_000


def test_tiles_fit_the_cache_and_cover_v(monkeypatch):
    monkeypatch.setattr(paperlib.matrix_units, "available", lambda: False)
    for d, rows in ((100, 8192), (3072, 1280), (100_000, 256)):
        assert paperlib.RandomFeatures(d, 10_000).tile_rows(torch.float32) == rows
    model = paperlib.RandomFeatures(3072, 3000)
    starts = [(first, len(V)) for first, V in model.weight_blocks()]
    assert starts == [(0, 1280), (1280, 1280), (2560, 440)]


def test_blocks_for_matrix_units_are_whole(monkeypatch):
    monkeypatch.setattr(paperlib.matrix_units, "available", lambda: True)
    model = paperlib.RandomFeatures(3072, 10_000)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
        assert model.tile_rows(dtype) == 8192
    assert paperlib.RandomFeatures(3072, 9000, dtype=torch.float64).tile_rows(torch.float64) == 512


def point(
    keep,
    *,
    dtype=None,
    curvature_dtype=None,
    name="relu+tanh",
    lift=True,
    model_dtype=None,
    outputs=2,
):
    model_dtype = model_dtype or torch.float64
    model = paperlib.RandomFeatures(6, 2500, name, seed=2, dtype=model_dtype, block_rows=1024)
    data = paperlib.sphere(4, 6, seed=1, dtype=model_dtype)
    labels = torch.stack([data.y, data.y.flip(0)], 1)[:, :outputs]
    theta = paperlib.fit_min_norm(model, data.X, labels)
    X = paperlib.sphere(5, 6, seed=3, dtype=model_dtype).X
    lifted = Lift(model, theta, dtype=model_dtype) if lift else None
    return Linearization(
        model,
        theta if lifted is None else lifted.theta,
        X,
        lift=lifted,
        dtype=dtype,
        curvature_dtype=curvature_dtype,
        curvature=True,
        keep=keep,
    )


def product(at):
    generator = torch.Generator().manual_seed(5)
    new = lambda *shape: torch.randn(*shape, generator=generator).to(at.X.dtype)  # noqa: E731
    outputs = len(at.theta)
    return at.product(new(5, 6), new(5, outputs), new(outputs, 6) if at.lift else None)


@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("keep", [INPUTS, NOTHING])
def test_what_is_kept_between_passes_does_not_change_the_numbers(keep, lift):
    full, lean = point(PRODUCTS, lift=lift), point(keep, lift=lift)
    torch.testing.assert_close(lean.gradient, full.gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lean.slope_gram, full.slope_gram, rtol=1e-12, atol=0)
    assert lean.loss == pytest.approx(full.loss, rel=1e-12)
    for ours, theirs in zip(product(lean), product(full), strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16, torch.int8])
def test_products_in_fewer_bits_are_those_of_float32_to_their_rounding(keep, lift, outputs, low):
    problem = {"model_dtype": torch.float32, "lift": lift, "outputs": outputs}
    exact = point(PRODUCTS, **problem)
    rough = point(keep, curvature_dtype=low, **problem)
    assert rough.loss == pytest.approx(exact.loss, rel=1e-5)  # evaluated in float32
    rounding = {torch.float16: 2e-3, torch.bfloat16: 3e-2, torch.int8: 6e-2}[low]
    errors = [
        float((ours - theirs).norm() / theirs.norm())
        for ours, theirs in zip(product(rough), product(exact), strict=True)
        if theirs is not None
    ]
    assert max(errors) < rounding
    # Without a lift, what changes alpha is nearly all features, which are not rounded again.
    assert min(errors if lift else errors[:1]) > 1e-6
    if low == torch.int8:
        return  # for products only
    whole = point(keep, dtype=low, **problem)
    assert whole.loss == pytest.approx(exact.loss, rel=0.05)


@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize(
    ("dtype", "products"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.float32, torch.int8),
    ],
)
def test_the_prediction_of_the_activations_is_what_is_kept(keep, dtype, products):
    own = torch.float64 if dtype == torch.float64 else torch.float32
    at = point(keep, model_dtype=own, dtype=dtype, curvature_dtype=products)
    before = kept_bytes(at)
    at._forward(True)  # a trial step, beside the point that it starts from
    peak, trial = before + kept_bytes(at), at._kept.arrays[:1]
    at._kept.lower(products)
    # One array after another is rounded to what products need. No finish here: n = 0.
    peak += sum(array.nbytes for array in at._kept.arrays[:1] if array.dtype != trial[0].dtype)
    formats = Formats(dtype, products)
    assert peak == memory.activation_bytes(5, 0, 2500, keep, own, formats)


def test_message_passing_is_counted_where_it_takes_more():
    model = paperlib.RandomFeatures(50, 4000)
    descent = memory.predicted_bytes(model, 3, 2, FLOAT32, keep=INPUTS)["activations"]
    assert descent == 2 * 3 * 4000 * 4
    starts = message_bytes(3, 2, 4000, 50)
    both = memory.predicted_bytes(model, 3, 2, FLOAT32, keep=INPUTS, starts=starts)
    scores = 3 * (3 + 2) * 4000 * 4  # of samples and outputs
    assert both["activations"] == scores + 2 * 4000 * 4 + 2 * 50 * 50 * 8  # outputs, and moments


@pytest.mark.parametrize(("restarts", "refused"), [(2, False), (3, True)])
def test_a_run_whose_messages_would_not_fit_is_refused(monkeypatch, restarts, refused):
    data = paperlib.sphere(3, 40, seed=1)
    model = paperlib.RandomFeatures(40, 600, placement="streamed")  # p = 5 d n
    theta = paperlib.fit_min_norm(model, data.X, data.y)
    monkeypatch.setattr("paperlib.second_order.message_bytes", lambda *sizes: 10**9)
    monkeypatch.setattr("paperlib.second_order.search_bytes", lambda *sizes: 0)
    set_free(monkeypatch, 10**8)
    if refused:
        with pytest.raises(MemoryError, match="activations 1 GB"):
            paperlib.reconstruct(model, theta, 3, restarts=restarts, progress=False)
    else:
        assert paperlib.reconstruct(model, theta, 3, restarts=restarts, progress=False).explained


def test_less_is_kept_where_less_fits(monkeypatch):
    small, large = paperlib.RandomFeatures(50, 40_000), paperlib.RandomFeatures(1024, 40_000)
    size = 4 * 50 * 40_000  # V of the small one; 30 candidates take 19 MB twice over, inputs 10

    def chosen(model, free):
        set_free(monkeypatch, free)
        return memory.choose_kept(model, 30, 1, FLOAT32, n=20)

    assert chosen(small, size + 40_000_000) == PRODUCTS
    assert chosen(small, size + 20_000_000) == INPUTS
    assert chosen(small, 2_000_000) == NOTHING
    assert chosen(large, 10**10) == INPUTS  # what follows from them is cheap


def test_an_attack_with_v_in_float16_and_exact_passes_drawn_again(monkeypatch):
    data = paperlib.sphere(6, 40, seed=3)
    model = paperlib.RandomFeatures(40, 6000, seed=5)
    theta = paperlib.fit_min_norm(model, data.X, data.y)
    low = paperlib.RandomFeatures(40, 6000, seed=5)
    set_free(monkeypatch, 1_200_000)  # 960 kB in float32, 480 kB in float16
    monkeypatch.setattr("paperlib.memory.check_memory", lambda *sizes, **options: {})
    found = paperlib.reconstruct(low, theta, 6, seed=1, bulk="float16", progress=False)
    assert low.holds(torch.float16) and not low.holds(torch.float32)
    assert {s["dtype"] for s in found.stages if s["stage"] == "bulk"} == {"float16"}
    assert paperlib.compare(data.X, found.samples).recovered(1e-3) == 6
    # The loss that is reported is exact: it is that of the samples under V as it was drawn.
    assert found.explained
    loss = float(paperlib.projection_loss(model, theta, found.samples))
    assert found.loss == pytest.approx(loss, rel=1e-3)


def test_an_unknown_way_of_keeping_is_an_error():
    model = paperlib.RandomFeatures(4, 100)
    with pytest.raises(ValueError, match="keep must be one of .*, got 'everything'"):
        paperlib.reconstruct(model, torch.ones(1, 100), 2, keep="everything")


@pytest.mark.parametrize(
    ("size", "words"), [(12, "12 bytes"), (3.2e9, "3.2 GB"), (4.5e11, "450 GB")]
)
def test_sizes_in_words(size, words):
    assert memory.readable(size) == words
