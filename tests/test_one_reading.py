"""A Gauss-Newton product in one reading of V, on matrix units, against the formulas in float64."""

import subprocess
import sys

import pytest
import torch

import paperlib
from paperlib import between_products, compiled, few_rows, matrix_units, one_reading
from paperlib.between_products import Given, TwoSlopes
from paperlib.int8 import Int8Rows
from paperlib.lift import Lift
from paperlib.memory import INPUTS, NOTHING, PRODUCTS
from paperlib.normal_product import NormalProduct
from paperlib.outlying_directions import SecondMoment
from paperlib.projection import Linearization

pytestmark = pytest.mark.skipif(
    not matrix_units.available(), reason="needs matrix units and a C++ compiler that knows them"
)

# What goes back through V is rounded to bfloat16, or to 8 bits: the largest of some hundred to 127.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.int8: 1.5e-2}

# Candidates, rows of V and d: every remainder of tiles, panels and chunks.
SHAPES = [(1, 1, 1), (3, 40, 33), (15, 64, 64), (16, 97, 130), (31, 257, 640), (40, 1025, 97)]
# .. of which float32 has no more than two tiles.
ALL_SHAPES = [
    (dtype, shape)
    for dtype in TOLERANCES
    for shape in SHAPES
    if dtype != torch.float32 or shape[0] < one_reading.FLOAT32_MOST_ROWS
]
WIDE_SHAPES = [(dtype, shape) for dtype, shape in ALL_SHAPES if dtype != torch.int8]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found, exact, tolerance):
    assert found.shape == exact.shape
    assert float((found.double() - exact).norm() / exact.norm()) < tolerance


class Problem:
    """A step, V and activations in a format, and the product in float64."""

    def __init__(self, dtype, n, h, d, *, lifted=True, two_slopes=True, inputs=None):
        A, V = randn(n + lifted, d), randn(h, d, seed=1)
        self.alpha, self.da = randn(n, seed=2), randn(n, seed=3)
        self.linear = 1.0
        number = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        if two_slopes:
            u = randn(n, h + 5, seed=4).to(inputs or number)[:, 5:]
            self.activations = TwoSlopes(u, -0.25, 0.75)
            features, slopes = self.activations.written_out(torch.float64)
        else:
            features, slopes = (randn(n, h + 3, seed=s).to(number)[:, 3:] for s in (4, 5))
            self.activations = Given(features, slopes)
            features, slopes = features.double(), slopes.double()
        if dtype == torch.int8:
            self.A, self.V = Int8Rows.of(A), Int8Rows.of(V)
            exact_A, exact_V = self.A.float().double(), self.V.float().double()
            self.linear = float(self.A.scale[-1])
            numbers = self.alpha * self.A.scale[:n]
        else:
            self.A, self.V = A.to(dtype), V.to(dtype)
            exact_A, exact_V = self.A.double(), self.V.double()
            numbers = self.alpha
        U = exact_A @ exact_V.T
        T = self.alpha.double() @ (slopes * U[:n]) + U[n:].sum(0) + self.da.double() @ features
        back = torch.cat([slopes * T, T[None]])[: n + lifted]
        self.numbers = numbers, self.da
        self.HX, self.Ha = back @ exact_V, (features @ T)[:, None]

    def product(self, dtype=torch.float32):
        """HX and Ha, added to ones."""
        sums = torch.ones_like(self.HX, dtype=dtype), torch.ones_like(self.Ha, dtype=dtype)
        one_reading.add_product(
            self.A, self.V, self.activations, *self.numbers, *sums, linear=self.linear
        )
        return [total - 1 for total in sums]


@pytest.mark.parametrize("lifted", [True, False])
@pytest.mark.parametrize("two_slopes", [True, False])
@pytest.mark.parametrize(("dtype", "shape"), ALL_SHAPES, ids=str)
def test_it_is_the_formulas(dtype, shape, two_slopes, lifted):
    problem = Problem(dtype, *shape, lifted=lifted, two_slopes=two_slopes)
    HX, Ha = problem.product()
    close(HX + 1, problem.HX + 1, TOLERANCES[dtype])  # with what was there
    close(Ha, problem.Ha, 1e-4)  # never rounded, but the ones are taken off in float32


def test_inputs_in_float32_come_in_two_formats():
    for dtype in (torch.int8, torch.float32):
        for inputs in between_products.INPUT_FORMATS[torch.float32]:
            problem = Problem(dtype, 20, 300, 100, inputs=inputs)
            close(problem.product()[0], problem.HX, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_sums_in_float64_are_added_to_as_well(dtype):
    problem = Problem(dtype, 5, 200, 300)
    for found, exact in zip(problem.product(torch.float64), problem.product(), strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found.float(), exact, rtol=1e-5, atol=1e-4)


def by_columns(array):
    """The same numbers, in memory column after column."""
    return array.T.contiguous().T


@pytest.mark.parametrize("sums", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_sums_may_lie_column_after_column(dtype, sums):
    problem = Problem(dtype, 5, 200, 300)
    HX, Ha = by_columns(torch.ones(6, 300, dtype=sums)), torch.ones(5, 3, dtype=sums)
    one_reading.add_product(
        problem.A, problem.V, problem.activations, *problem.numbers, HX, Ha[:, 1:2],
        linear=problem.linear,
    )  # fmt: skip
    close(HX - 1, problem.HX, TOLERANCES[dtype])
    close(Ha[:, 1:2] - 1, problem.Ha, 1e-4)
    assert torch.equal(Ha[:, ::2], torch.ones(5, 2, dtype=sums))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_takes_samples_column_after_column(dtype):
    X, V, _ = passes(dtype, 5, 200, 300)
    expected = one_reading.forward(X, V, -0.25, 0.75)
    found = one_reading.forward(by_columns(X), V, -0.25, 0.75)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_a_step_may_lie_column_after_column(dtype):
    model = paperlib.RandomFeatures(1024, 9000, seed=1)
    theta, X = randn(1, 9000), paperlib.sphere(4, 1024, seed=2).X
    exact = torch.float32 if dtype == torch.int8 else dtype
    point = Linearization(
        model, theta, X, dtype=exact, curvature_dtype=dtype, curvature=True, keep=INPUTS
    )
    dX, da = randn(4, 1024, seed=3), randn(4, 1, seed=4)
    expected = point.product(dX, da, None)
    for found, part in zip(point.product(by_columns(dX), da, None), expected, strict=True):
        assert (found is None and part is None) or torch.equal(found, part)
    sums = NormalProduct(da, by_columns(dX), by_columns(da), None, dtype=exact)
    assert sums.HX.is_contiguous() and sums.Ha.is_contiguous()  # added to as they lie


MANY_THREADS = """
import torch
from paperlib import few_rows, matrix_units, one_reading
matrix_units.available()
torch.set_num_threads(1100)
for dtype in (torch.bfloat16, torch.float32):
    V = torch.ones(1100 * 32, 64, dtype=dtype)
    found = [one_reading.second_moment(V[:3], V, torch.ones(len(V)))]
    if dtype == torch.bfloat16:
        found.append(few_rows.combine(torch.ones(3, len(V), dtype=dtype), V) * 64)
    print(all(bool((sums == 64 * len(V)).all()) for sums in found))
"""


def test_there_may_be_more_than_a_thousand_threads():
    """In a process of its own: threads stay with the one that made them."""
    done = subprocess.run([sys.executable, "-c", MANY_THREADS], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], (done.returncode, done.stderr)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_threads_share_the_rows(dtype, threads):
    problem = Problem(dtype, 20, 1000, 300)
    torch.set_num_threads(threads)
    HX, Ha = problem.product()
    close(HX, problem.HX, TOLERANCES[dtype])
    close(Ha, problem.Ha, 1e-4)


def test_the_libraries_find_the_units_as_they_left_them():
    problem = Problem(torch.bfloat16, 20, 300, 512)
    A, B = randn(200, 300).bfloat16(), randn(300, 400).bfloat16()
    alone = A @ B
    for _ in range(3):
        problem.product()
        assert torch.equal(A @ B, alone)
    close(problem.product()[0], problem.HX, TOLERANCES[torch.bfloat16])


def test_nothing_goes_back_as_zeros():
    problem = Problem(torch.int8, 3, 200, 100)
    problem.numbers = torch.zeros(3), torch.zeros(3)
    problem.linear = 0.0
    assert not any(total.any() for total in problem.product())


def test_it_takes_what_its_two_products_take(monkeypatch):
    monkeypatch.setattr(few_rows, "WORTHWHILE", 0)
    takes = one_reading.takes
    for dtype in TOLERANCES:
        problem = Problem(dtype, 5, 300, 512)
        arrays = problem.A, problem.V, problem.activations
        assert takes(*arrays, 1)
        assert not takes(*arrays, 2)
        odd = problem.activations._replace(inputs=problem.activations.inputs.double())
        assert not takes(problem.A, problem.V, odd, 1)
        monkeypatch.setattr(matrix_units, "available", lambda: False)
        few_rows.available.cache_clear()
        assert not takes(*arrays, 1)
        monkeypatch.undo()
        few_rows.available.cache_clear()
        monkeypatch.setattr(few_rows, "WORTHWHILE", 0)


def test_it_takes_nothing_where_its_own_source_does_not_compile(monkeypatch):
    """The other sources do: the products are theirs then."""
    library = compiled.library
    monkeypatch.setattr(
        compiled, "library", lambda name: None if name == one_reading.SOURCE else library(name)
    )
    for dtype in TOLERANCES:
        problem = Problem(dtype, 5, 3000, 512)
        values = (x.values if dtype == torch.int8 else x for x in (problem.A, problem.V))
        assert few_rows.takes(*values)
        assert not one_reading.takes_pass(problem.A, problem.V)
        assert not one_reading.takes(problem.A, problem.V, problem.activations, 1)


def test_float32_goes_in_parts_and_only_few_rows_of_it():
    V, most = randn(300, 512), one_reading.FLOAT32_MOST_ROWS
    A = randn(most + 1, 512)
    assert one_reading.takes_pass(A[:most], V)
    assert few_rows.takes(A, V) and not one_reading.takes_pass(A, V)


def passes(dtype, n, h, d):
    """X and V, and the exact inputs."""
    X, V = randn(n, d).to(dtype), (randn(h, d, seed=1) * d**-0.5).to(dtype)
    return X, V, X.double() @ V.double().T


@pytest.mark.parametrize(("dtype", "shape"), WIDE_SHAPES, ids=str)
def test_forward_is_inputs_features_and_their_sums(shape, dtype):
    X, V, exact = passes(dtype, *shape)
    inputs, features, through = one_reading.forward(X, V, -0.25, 0.75)
    assert inputs.dtype == features.dtype == dtype
    close(inputs, exact, TOLERANCES[dtype])
    expected = TwoSlopes(inputs, -0.25, 0.75).written_out(torch.float64).features
    close(features, expected, TOLERANCES[dtype])
    close(through, features.double() @ V.double(), 1e-6)


@pytest.mark.parametrize("wide", [0, 7])
@pytest.mark.parametrize(("dtype", "shape"), WIDE_SHAPES, ids=str)
def test_backward_is_the_residual_and_its_sums(shape, wide, dtype):
    n, h, d = shape
    X, V, inputs = passes(dtype, *shape)
    inputs = torch.cat([torch.ones(n, wide), inputs], 1).to(dtype)[:, wide:]
    w, theta, alpha = randn(1, d, seed=2).to(dtype), randn(h, seed=3), randn(n, seed=4)
    activations = TwoSlopes(inputs, -0.25, 0.75)
    E, through = one_reading.backward(w, V, activations, theta, alpha)
    # Features are those that `forward` gave: rounded.
    features = activations.written_out(torch.float32).features.to(dtype)
    exact = theta - alpha.double() @ features.double() - (V.double() @ w.double().T)[:, 0]
    close(E, exact, 1e-6)
    slopes = activations.written_out(torch.float64).slopes
    close(through, (slopes * exact) @ V.double(), TOLERANCES[dtype])


@pytest.mark.parametrize(("dtype", "shape"), ALL_SHAPES, ids=str)
def test_second_moment_weighs_the_rows_of_v(shape, dtype):
    q, h, d = shape
    Q, V, Y = randn(q, d), randn(h, d, seed=1), randn(h, seed=2) ** 5  # numbers that differ much
    Q, V = (Int8Rows.of(A) if dtype == torch.int8 else A.to(dtype) for A in (Q, V))
    wide = [A.float().double() for A in (Q, V)]
    exact = (wide[0] @ wide[1].T * Y) @ wide[1]
    # 16 bits go back through V in 8, and 8 in bfloat16.
    tolerance = 5e-4 if dtype == torch.int8 else TOLERANCES[dtype]
    close(one_reading.second_moment(Q, V, Y), exact, tolerance)


@pytest.fixture
def double_by_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_second_moment_is_float32_whatever_torch_makes_by_default(dtype, double_by_default):
    A = [randn(k, 100, seed=k).float() for k in (3, 200)]
    Q, V = (Int8Rows.of(a) if dtype == torch.int8 else a.to(dtype) for a in A)
    Y = randn(200, seed=2).float()
    with torch.device("meta"):
        found = one_reading.second_moment(Q, V, Y)
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    wide = [a.float().double() for a in (Q, V)]
    close(found, (wide[0] @ wide[1].T * Y) @ wide[1], 4e-3)


def test_second_moment_of_nothing_is_zero():
    Q, V = Int8Rows.of(randn(3, 100)), Int8Rows.of(randn(200, 100, seed=1))
    assert not one_reading.second_moment(Q, V, torch.zeros(200)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [INPUTS, NOTHING])
def test_an_evaluation_of_the_loss_is_made_by_it(keep, dtype, monkeypatch):
    model = paperlib.RandomFeatures(512, 9000, seed=1)
    X = paperlib.sphere(4, 512, seed=2).X
    theta = randn(1, 4) @ model.features(X)
    lift = Lift(model, theta, dtype=torch.float32)
    X = X + 0.1 * randn(4, 512, seed=3)

    def evaluate(dtype=dtype, keep=keep):
        return Linearization(model, lift.theta, X, lift=lift, dtype=dtype, keep=keep)

    calls = []
    for name in ("forward", "backward"):
        kernel = getattr(one_reading, name)
        monkeypatch.setattr(
            one_reading, name, lambda *a, k=kernel, name=name: calls.append(name) or k(*a)
        )
    found = evaluate()
    assert calls == ["forward"] * 2 + ["backward"] * 2
    calls.clear()
    others = evaluate(keep=PRODUCTS)
    assert not calls
    few = dtype == torch.bfloat16
    assert found.loss == pytest.approx(others.loss, rel=2e-3 if few else 1e-6)
    for part in ("alpha", "gradient", "residual"):
        close(getattr(found, part), getattr(others, part).double(), 3e-2 if few else 1e-4)


@pytest.mark.parametrize("own", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_directions_are_looked_for_by_it(dtype, own, monkeypatch):
    model = paperlib.RandomFeatures(512, 9000, seed=1, dtype=own)
    moment = SecondMoment(model, randn(1, 9000).to(own), dtype=dtype)
    Q, rows = randn(6, 512, seed=3).to(own), []
    kernel = one_reading.second_moment
    monkeypatch.setattr(
        one_reading, "second_moment", lambda Q, V, Y: rows.append(len(V)) or kernel(Q, V, Y)
    )
    found = moment(Q)
    assert rows == [8192, 808]
    monkeypatch.setattr(one_reading, "takes_pass", lambda *arrays: False)
    close(found, moment(Q).double(), 2e-3 if dtype == torch.int8 else 1e-2)
    two = SecondMoment(model, randn(2, 9000).to(own), dtype=dtype)
    two(Q)
    assert len(rows) == 2


def test_matrix_units_are_for_fewer_dimensions_and_fewer_rows(monkeypatch):
    monkeypatch.setattr(few_rows, "WORTHWHILE", 0)
    least, most, _ = few_rows.BOUNDS[few_rows.matrix_units.SOURCE]
    for d, rows in ((least, least // 2), (4 * most, most)):
        V = torch.ones(10, d, dtype=torch.bfloat16)
        A = V[:1].expand(rows + 1, -1)
        assert one_reading.takes_pass(A[:rows], V) and not one_reading.takes_pass(A, V)
    assert not one_reading.takes_pass(A[:1, 1:least], V[:, 1:least].contiguous())


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_products_of_the_solver_are_made_by_it(name, activation, monkeypatch):
    dtype = getattr(torch, name)
    model = paperlib.RandomFeatures(1024, 9000, activation, seed=1)
    theta, X = randn(1, 9000), paperlib.sphere(4, 1024, seed=2).X
    lift = Lift(model, theta, dtype=torch.float32)
    exact = torch.float32 if name == "int8" else dtype
    point = Linearization(
        model, lift.theta, X, lift=lift, dtype=exact, curvature_dtype=dtype, curvature=True,
        keep=INPUTS,
    )  # fmt: skip
    step = randn(4, 1024, seed=3), randn(4, 1, seed=4), randn(1, 1024, seed=5)
    rows = []
    add = one_reading.add_product
    monkeypatch.setattr(
        one_reading,
        "add_product",
        lambda A, V, *others, **options: rows.append(len(V)) or add(A, V, *others, **options),
    )
    found = point.product(*step)
    assert rows == [8192, 808]  # whole blocks, of two tiles or more elsewhere
    monkeypatch.setattr(one_reading, "takes", lambda *arguments: False)
    for part, other in zip(found, point.product(*step), strict=True):
        close(part, other.double(), 2e-2)
