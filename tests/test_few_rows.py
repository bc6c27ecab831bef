"""The kernels for few rows: the products of wider numbers, whatever the sizes and the threads."""

import pytest
import torch

import paperlib
from paperlib import few_rows, matrix_product
from paperlib.few_rows import BOUNDS, MOST_SHIFTED_TERMS, SOURCE, WORTHWHILE
from paperlib.instructions import fast_kernels

# bfloat16 is 1.7e-3 when numbers are rounded to the nearest, twice that when they are cut off.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.int8: 0}
AVAILABLE = [dtype for dtype in TOLERANCES if few_rows.available(dtype)]

# What an older processor would compile.
OLDER = [("-mno-avx512f", torch.float32)] if fast_kernels(torch.device("cpu")) else []
# The first processors with AVX-512 had no more of it than F, and compile the same.
FIRST = "-mno-avx512bw -mno-avx512dq -mno-avx512vl"

# float32 on matrix units.
IN_PARTS = [("in parts", torch.float32)] if few_rows.matrix_units.available() else []

# What a processor with AVX-512 would use that has no matrix units.
VECTORS = [("vectors", dtype) for dtype in (torch.bfloat16, torch.int8) if IN_PARTS]

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs AVX2 and a C++ compiler")

# (rows of A, rows of V, d): every remainder of blocks, panels, strips, chunks and runs.
SHAPES = [(m, 4 * m + 1, 40 + m) for m in range(1, 31)]
SHAPES += [(3, 700, 512), (31, 257, 640), (14, 1025, 65), (1, 2049, 31), (140, 300, 97)]
SHAPES += [(8, 37, 2500), (7, 66, 9000)]


def in_parts_from(rows, monkeypatch):
    monkeypatch.setattr(few_rows, "PARTS_LEAST_ROWS", rows)
    monkeypatch.setattr(few_rows, "PARTS_LEAST_ROWS_ELSEWHERE", rows)


@pytest.fixture(params=[("", dtype) for dtype in AVAILABLE] + OLDER + IN_PARTS + VECTORS, ids=str)
def dtype(request, compile_with, monkeypatch):
    kind, dtype = request.param
    in_parts_from(1 if kind == "in parts" else 1000, monkeypatch)
    compile_with(kind if kind.startswith("-") else "")
    if kind == "vectors":
        monkeypatch.setattr(few_rows.matrix_units, "multiply", lambda dtype: False)
    return dtype


@pytest.mark.skipif(not OLDER, reason="needs a CPU with AVX-512")
@pytest.mark.parametrize("flags", ["-mno-avx512f", FIRST])
def test_older_processors_multiply_float32_alone(flags, compile_with):
    A, W, V = factors(torch.float32, 7, 30, 20)
    compile_with(flags)
    assert few_rows.available(torch.float32)
    assert not few_rows.has(SOURCE, "project_bfloat16") and not few_rows.has(SOURCE, "project_int8")
    assert error(few_rows.project(A, V), A.double() @ V.double().T) < 1e-6
    assert error(few_rows.combine(W, V), W.double() @ V.double()) < 1e-6


def random(dtype, *shape, seed=0):
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.int8:
        numbers = (60 * numbers).round().clamp(-127, 127)
    return numbers.to(dtype)


def factors(dtype, m, h, d):
    """A (m, d), W (m, h) and V (h, d)."""
    return random(dtype, m, d), random(dtype, m, h, seed=1), random(dtype, h, d, seed=2)


def error(found, exact):
    assert found.shape == exact.shape
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_wider_numbers(dtype, shape):
    A, W, V = factors(dtype, *shape)
    assert error(few_rows.project(A, V), A.double() @ V.double().T) <= TOLERANCES[dtype]
    # Sums over features are not rounded to bfloat16.
    exact = min(TOLERANCES[dtype], 1e-6)
    assert error(few_rows.combine(W, V), W.double() @ V.double()) <= exact


def test_a_row_does_not_depend_on_the_others(dtype):
    A, W, V = factors(dtype, 31, 600, 700)
    projected, combined = few_rows.project(A, V), few_rows.combine(W, V)
    for i in (0, 6, 30):
        assert torch.equal(few_rows.project(A[i : i + 1], V)[0], projected[i])
        assert torch.equal(few_rows.combine(W[i : i + 1], V)[0], combined[i])


@pytest.mark.parametrize("threads", [2, 5])
def test_nor_on_the_number_of_threads(dtype, threads):
    A, W, V = factors(dtype, 9, 601, 777)
    projected, combined = few_rows.project(A, V), few_rows.combine(W, V)
    torch.set_num_threads(threads)
    assert torch.equal(few_rows.project(A, V), projected)
    together = few_rows.combine(W, V)
    if dtype == torch.int8 or not few_rows.matrix_units.multiply(dtype):
        assert torch.equal(together, combined)
    else:  # each thread sums over rows of its own
        assert error(together, combined.double()) < 1e-6


def test_threads_without_rows_add_nothing(dtype):
    _, W, V = factors(dtype, 9, 601, 777)
    torch.set_num_threads(5)
    # The memory that threads keep has sums of the product before.
    for h in 3 * [601, 3]:
        found, exact = few_rows.combine(W[:, :h], V[:h]), W[:, :h].double() @ V[:h].double()
        assert error(found, exact) <= min(TOLERANCES[dtype], 1e-6)


# Cut off, not rounded: half of them in the mean, and of either factor.
SIXTEEN_DIGITS = 2 * 2.0**-16
IN_FLOAT16 = [*SHAPES[::7], (3, 700, 512), (31, 257, 640), (33, 70, 500), (140, 300, 97)]


@pytest.mark.skipif(not IN_PARTS, reason="needs matrix units")
@pytest.mark.parametrize("shape", IN_FLOAT16)
def test_float16_is_multiplied_as_it_is(shape, monkeypatch):
    """Beside numbers of 1, among them some that float16 holds as subnormal ones."""
    A, W, V = factors(torch.float32, *shape)
    V = torch.cat([V[:1], V[1:] * 1e-6]).half()
    monkeypatch.setattr(few_rows, "WORTHWHILE", 0)
    source = few_rows.matrix_units.PARTS_SOURCE
    all_sizes = BOUNDS[source]._replace(least_dimension=1, share=100)
    monkeypatch.setitem(few_rows.BOUNDS, source, all_sizes)
    assert few_rows.takes(A, V) and not few_rows.takes(A.half(), V)
    for found, exact in (
        (matrix_product.project(A, V), A.double() @ V.double().T),
        (matrix_product.combine(W, V), W.double() @ V.double()),
    ):
        assert found.dtype == torch.float32 and error(found, exact) < SIXTEEN_DIGITS
    tail = matrix_product.project(A, V)[:, 1:]
    assert error(tail, A.double() @ V[1:].double().T) < SIXTEEN_DIGITS


def test_float16_is_widened_where_no_kernel_takes_it(monkeypatch):
    A, W, V = factors(torch.float32, 5, 300, 200)
    V = V.half()
    monkeypatch.setattr(few_rows, "takes", lambda A, V: False)
    assert error(matrix_product.project(A, V), A.double() @ V.double().T) < 1e-6
    assert error(matrix_product.combine(W, V), W.double() @ V.double()) < 1e-6


def test_largest_sums_of_whole_numbers_do_not_overflow():
    if torch.int8 not in AVAILABLE:
        pytest.skip("no instructions for 8 bits")
    ones = torch.full((2, MOST_SHIFTED_TERMS), 127, dtype=torch.int8)
    for sign in (1, -1):
        found = few_rows.project(sign * ones[:1], ones)
        assert found.tolist() == [[pytest.approx(sign * 127.0**2 * MOST_SHIFTED_TERMS)] * 2]
        turned = ones.T.contiguous()
        assert few_rows.combine(sign * ones, turned).unique().tolist() == [
            pytest.approx(sign * 127.0**2 * MOST_SHIFTED_TERMS)
        ]
    assert not few_rows.takes(
        ones.new_ones(1, MOST_SHIFTED_TERMS + 1), ones.new_ones(600, MOST_SHIFTED_TERMS + 1)
    )


@pytest.mark.skipif(torch.int8 not in AVAILABLE, reason="no instructions for 8 bits")
def test_whole_numbers_are_multiplied_exactly_however_one_sided_they_are():
    """A sum of 3,000 numbers near 127 is far beyond what float32 tells from its neighbours."""
    V = random(torch.int8, 3000, 3000, seed=2)
    A = torch.full((2, 3000), 127, dtype=torch.int8)
    assert torch.equal(few_rows.project(A, V).double(), A.double() @ V.double().T)
    assert torch.equal(few_rows.combine(A, V).double(), A.double() @ V.double())


def test_left_factors_of_other_columns_are_refused(dtype):
    """They would be read beyond their end."""
    A, W, V = factors(dtype, 5, 300, 200)
    for columns in (199, 201):
        with pytest.raises(ValueError, match=rf"A of shape \(m, 200\), got \(5, {columns}\)"):
            few_rows.project(random(dtype, 5, columns), V)
    for columns in (299, 301):
        with pytest.raises(ValueError, match=rf"W of shape \(m, 300\), got \(5, {columns}\)"):
            few_rows.combine(random(dtype, 5, columns), V)
    with pytest.raises(ValueError, match=r"A of shape \(m, 200\), got \(200,\)"):
        few_rows.project(A[0], V)
    with pytest.raises(ValueError, match=r"W of shape \(m, 300\), got \(300,\)"):
        few_rows.combine(W[0], V)


def test_left_factors_may_lie_anyhow(dtype):
    A, W, V = factors(dtype, 5, 300, 200)
    assert torch.equal(few_rows.project(A.T.contiguous().T, V), few_rows.project(A, V))
    assert torch.equal(few_rows.combine(torch.cat([W, W], 1)[:, :300], V), few_rows.combine(W, V))


def test_they_take_what_they_are_faster_for_and_can_do(monkeypatch):
    in_parts_from(1000, monkeypatch)
    d, most, share = BOUNDS[SOURCE]
    h = WORTHWHILE // d + 1
    A, W, V = factors(torch.float32, 3, h, d)
    takes = few_rows.takes
    assert takes(A, V) and takes(W, V)
    assert not takes(A.double(), V.double())
    assert not takes(A, V.half().float().T.contiguous().T)  # columns are not rows
    assert not takes(A[:, 1:].contiguous(), V[:, 1:].contiguous())
    assert not takes(A[:1], V[: h // 2])
    rows = int(share * d)
    assert takes(A[:1].expand(rows, -1), V) and not takes(A[:1].expand(rows + 1, -1), V)
    wide = V[:1].expand(h, -1).repeat(1, 8)
    rows = wide[:1].expand(most, -1)
    assert takes(rows, wide) and not takes(rows[:1].expand(most + 1, -1), wide)
    assert not takes(A.clone().requires_grad_(), V)
    with torch.no_grad():
        assert takes(A.clone().requires_grad_(), V)
    assert not takes(A.to("meta"), V.to("meta"))


@pytest.mark.skipif(not IN_PARTS, reason="no matrix units")
def test_parts_of_float32_are_whole(monkeypatch):
    """Every digit counts, however far apart the sizes of numbers are, and whatever their signs."""
    in_parts_from(1, monkeypatch)
    sizes = 2.0 ** torch.arange(-60, 60, dtype=torch.float64)
    numbers = ((1 + torch.rand(120, dtype=torch.float64)) * sizes).float()
    numbers[::2] *= -1
    ones = torch.eye(120)
    assert torch.equal(few_rows.project(torch.diag(numbers), ones), torch.diag(numbers))
    assert torch.equal(few_rows.combine(torch.diag(numbers), ones), torch.diag(numbers))
    assert torch.equal(few_rows.project(ones, torch.diag(numbers)), torch.diag(numbers))
    assert torch.equal(few_rows.combine(ones, torch.diag(numbers)), torch.diag(numbers))


@pytest.mark.skipif(not IN_PARTS, reason="no matrix units")
@pytest.mark.parametrize(
    ("d", "least"), [(448, "PARTS_LEAST_ROWS"), (200, "PARTS_LEAST_ROWS_ELSEWHERE")]
)
def test_they_take_more_rows_of_float32_in_parts(d, least, monkeypatch):
    many = getattr(few_rows, least)
    V = torch.randn(2000, d)
    whole = d >= BOUNDS[SOURCE].least_dimension
    assert few_rows.takes(V[:many], V) and few_rows.takes(V[: many - 1], V) == whole
    assert not few_rows.takes(V[: d // 2 + 1], V)
    assert not few_rows.takes(V[:many].double(), V.double())
    used = []
    monkeypatch.setattr(few_rows, "call", lambda source, *arguments: used.append(source))
    for rows in (many - 1, many):
        few_rows.project(V[:rows], V)
    assert used == [SOURCE, few_rows.matrix_units.PARTS_SOURCE]


def test_matrix_units_that_no_compiler_knows_are_left_to_the_libraries(monkeypatch):
    monkeypatch.setattr(few_rows, "bfloat16_units", lambda device: True)
    monkeypatch.setattr(few_rows.matrix_units, "available", lambda: False)
    few_rows.available.cache_clear()
    try:
        assert few_rows.available(torch.float32)
        assert not few_rows.available(torch.bfloat16) and not few_rows.available(torch.int8)
    finally:
        few_rows.available.cache_clear()


def test_an_attack_ends_the_same_with_and_without_them(monkeypatch):
    data = paperlib.sphere(3, 520, seed=3)
    model = paperlib.RandomFeatures(520, 10 * 3 * 520, seed=5)
    theta = paperlib.fit_min_norm(model, data.X, data.y)
    calls = []
    monkeypatch.setattr(few_rows, "WORTHWHILE", 0)
    kernel = few_rows._call
    monkeypatch.setattr(
        few_rows, "_call", lambda *arguments: calls.append(arguments[0]) or kernel(*arguments)
    )

    def attack():
        record = paperlib.reconstruct(model, theta, 3, seed=1, start="random", progress=False)
        return record, paperlib.compare(data.X, record.samples)

    record, errors = attack()
    assert set(calls) == {"project", "combine"}
    calls.clear()
    monkeypatch.setattr(few_rows, "takes", lambda A, V: False)
    other, others = attack()
    assert not calls
    assert record.explained and other.explained
    assert max(errors.signed.max(), others.signed.max()) < 1e-3
