"""What lies between the two products, against the formulas in float64."""

import signal
import subprocess
import sys

import pytest
import torch

import paperlib
from paperlib import between_products, few_rows
from paperlib.between_products import Given, TwoSlopes
from paperlib.instructions import fast_kernels
from paperlib.int8 import Int8Rows
from paperlib.lift import Lift
from paperlib.memory import KEPT, PRODUCTS
from paperlib.projection import Linearization

# bfloat16 is rounded to the nearest; in 8 bits a step is asked for, entry by entry.
FORMATS = {"float32": 1e-6, "bfloat16": 2.5e-3, "int8": None}
AVAILABLE = [name for name in FORMATS if few_rows.available(getattr(torch, name))]
# What an older processor would compile; the work between products in 8 bits is on float32.
OLDER = ["float32", "int8"] if fast_kernels(torch.device("cpu")) else []

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs AVX2 and a C++ compiler")


@pytest.fixture(
    params=[("", name) for name in AVAILABLE] + [("-mno-avx512f", name) for name in OLDER],
    ids=" ".join,
)
def name(request, compile_with):
    flags, name = request.param
    compile_with(flags)
    return name


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(n, h, dtype, *, lifted=True, wide=0):
    """U; features and slopes, views of wider arrays; alpha and da."""
    U = randn(n + lifted, h).to(dtype)
    given = Given(*(randn(n, h + wide, seed=s).to(dtype)[:, wide:] for s in (1, 2)))
    return U, given, randn(n, seed=3), randn(n, seed=4)


def exact(U, activations, alpha, da, *, linear=1.0, scales=None):
    """T times the scales, W and Ha, in float64."""
    if isinstance(activations, TwoSlopes):
        u = activations.inputs.double()
        slopes = torch.where(u > 0, activations.right, activations.left)
        features = slopes * u
    else:
        features, slopes = activations
    U, features, slopes, alpha, da = (x.double() for x in (U, features, slopes, alpha, da))
    n = len(features)
    scales = torch.ones(U.shape[1]).double() if scales is None else scales.double()
    T = scales * (alpha @ (slopes * U[:n]) + linear * U[n:].sum(0)) + da @ features
    back = T * scales
    W = torch.cat([slopes * back, back[None]])[: len(U)]
    return W, features @ T


def close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm() / expected.norm()) < tolerance


def two_slopes(n, h, dtype, *, wide=0, left=-0.25, right=0.75):
    inputs = randn(n, h + wide, seed=1).to(dtype)[:, wide:]
    inputs[:, 1::3] = 0.0  # where the slope is that from the left
    return TwoSlopes(inputs, left, right)


KINDS = ["given", torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("lifted", [True, False])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("n", "h", "wide"), [(1, 1, 0), (3, 16, 0), (5, 37, 7), (30, 999, 5)])
def test_it_is_the_formulas(name, lifted, kind, n, h, wide):
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    arrays = problem(n, h, dtype, lifted=lifted, wide=wide)
    if kind != "given":
        U, _, *numbers = arrays
        arrays = U, two_slopes(n, h, kind, wide=wide), *numbers
        if kind not in between_products.INPUT_FORMATS[dtype]:
            assert not between_products.takes(*arrays[:2], 1)
            return
    assert between_products.takes(*arrays[:2], 1)
    options = {}
    if name == "int8":
        options = {"linear": 0.3, "scales": 0.1 + randn(h, seed=5).abs()}
    W, Ha = between_products.turn(*arrays, **options)
    expected_W, expected_Ha = exact(*arrays, **options)
    close(Ha, expected_Ha, 2e-6 * max(1, float(expected_Ha.norm() ** -1)))
    if name == "int8":
        assert int(W.values.abs().amax()) == 127
        step = expected_W.abs().amax(1, keepdim=True) / 127
        assert bool(((W.float() - expected_W).abs() <= 0.501 * step).all())
    else:
        assert W.dtype == dtype
        close(W, expected_W, FORMATS[name])


def test_nothing_is_written_beyond_its_end(name, monkeypatch):
    """Rows end within a register here."""
    n, h, room = 3, 37, 64
    U, given, *numbers = problem(n, h, torch.bfloat16 if name == "bfloat16" else torch.float32)
    kinds = given, TwoSlopes(given.features, 0.0, 1.0)
    kernel, ends = between_products.call, []

    def with_room(source, function, *arguments):
        *others, W, W_scales, Ha = arguments
        wide = W.new_full((W.numel() + room,), 77)
        kernel(source, function, *others, wide, W_scales, Ha)
        ends.append(wide[W.numel() :])

    monkeypatch.setattr(between_products, "call", with_room)
    scales = torch.ones(h) if name == "int8" else None
    for activations in kinds:
        between_products.turn(U, activations, *numbers, scales=scales)
    assert len(ends) == 2 and all(bool((end == 77).all()) for end in ends)


def test_threads_change_nothing():
    arrays = problem(6, 500, torch.float32)
    alone = between_products.turn(*arrays)
    torch.set_num_threads(3)
    together = between_products.turn(*arrays)
    assert all(map(torch.equal, alone, together))


@pytest.mark.skipif("int8" not in AVAILABLE, reason="no instructions for 8 bits")
def test_nothing_goes_back_as_zeros():
    U, given, alpha, da = problem(2, 40, torch.float32)
    W, Ha = between_products.turn(0 * U, given, alpha, 0 * da, scales=torch.ones(40))
    assert isinstance(W, Int8Rows)
    assert torch.equal(W.values, torch.zeros(3, 40, dtype=torch.int8))
    assert bool((W.scale > 0).all()) and torch.equal(Ha, torch.zeros(2))


@pytest.mark.skipif(not OLDER, reason="needs a CPU with AVX-512")
@pytest.mark.parametrize("lacks", ["bw", "dq", "vl", "bw dq vl"])
def test_the_first_processors_with_avx512_had_no_more_of_it_than_f(lacks, compile_with):
    compile_with(" ".join(f"-mno-avx512{part}" for part in lacks.split()))
    arrays = problem(3, 37, torch.float32)
    assert between_products.takes(*arrays[:2], 1)
    W, Ha = between_products.turn(*arrays)
    expected_W, expected_Ha = exact(*arrays)
    close(W, expected_W, 1e-6)
    close(Ha, expected_Ha, 2e-6)


# More than a processor can address.
TOO_MUCH = {
    "between_products.cpp": "call(source, 'turn_float32', a, a, 0, a, 0, a, a, 0.0, None, "
    "0, 0, 2**45, a, a, a)",
    "few_rows.cpp": "call(source, 'project_float32', a, a, a, 2**46, 1, 1)",
}


@pytest.mark.parametrize("source", TOO_MUCH)
def test_without_memory_a_kernel_says_so_and_ends(source):
    """Nothing is written to where there is none."""
    program = (
        "import torch; from paperlib.compiled import call, library\n"
        f"a, source = torch.ones(100), {source!r}; library(source)\n{TOO_MUCH[source]}"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert "paperlib: no memory for 281474976710656 bytes" in done.stderr


def test_it_takes_nothing_where_its_own_source_does_not_compile(monkeypatch):
    U, given, *_ = problem(4, 50, torch.float32)
    monkeypatch.setattr("paperlib.compiled.library", lambda name: None)
    assert not between_products.takes(U, given, 1)


def test_it_takes_one_output_in_the_formats_of_the_kernels():
    U, (features, slopes), *_ = problem(4, 50, torch.float32)
    takes = between_products.takes
    assert takes(U, Given(features, slopes), 1)
    assert not takes(U, Given(features, slopes), 2)
    assert not takes(U.double(), Given(features.double(), slopes.double()), 1)
    assert not takes(U, Given(features.T.contiguous().T, slopes), 1)
    assert not takes(U, Given(features, slopes.bfloat16()), 1)
    assert not takes(U.to("meta"), Given(features.to("meta"), slopes.to("meta")), 1)
    inputs = TwoSlopes(features, 0.0, 1.0)
    assert takes(U, inputs, 1)
    assert not takes(U, inputs, 2)
    assert not takes(U, inputs._replace(inputs=features.T.contiguous().T), 1)
    assert not takes(U, inputs._replace(inputs=features.double()), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lifted", [True, False])
def test_two_slopes_written_out_are_what_a_block_computes(dtype, lifted):
    model = paperlib.RandomFeatures(20, 1500, seed=1)
    X = paperlib.sphere(4, 20, seed=2).X
    for block in model.blocks(dtype=dtype):
        inputs = block.inputs(X.to(dtype))
        inputs[:, :10] = 0.0
        found = TwoSlopes(inputs, *block.two_slopes(lifted=lifted)).written_out(dtype)
        for part, expected in zip(found, block.activate(inputs, lifted=lifted), strict=True):
            assert part.dtype == dtype
            torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-12)


def test_only_an_activation_of_two_slopes_says_so():
    for name in paperlib.activation_names():
        slopes = paperlib.activation(name).two_slopes
        assert (slopes is not None) == (name == "relu")
    u = torch.linspace(-2, 2, 5)
    left, right = paperlib.activation("relu").two_slopes
    assert torch.equal(torch.where(u > 0, right * u, left * u), torch.relu(u))


@pytest.mark.parametrize("lifted", [True, False])
@pytest.mark.parametrize("keep", KEPT)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_product_with_the_normal_matrix_is_the_same_with_and_without_it(
    name, lifted, keep, activation, monkeypatch
):
    dtype = getattr(torch, name)
    model = paperlib.RandomFeatures(40, 5000, activation, seed=1)
    theta, X = randn(1, 5000), paperlib.sphere(4, 40, seed=2).X
    lift = Lift(model, theta, dtype=torch.float32) if lifted else None
    point = Linearization(
        model,
        lift.theta if lifted else theta,
        X,
        lift=lift,
        dtype=torch.float32 if name == "int8" else dtype,
        curvature_dtype=dtype,
        curvature=True,
        keep=keep,
    )
    step = randn(4, 40, seed=3), randn(4, 1, seed=4), randn(1, 40, seed=5) if lifted else None
    calls = []
    turn = between_products.turn
    monkeypatch.setattr(
        between_products,
        "turn",
        lambda U, given, *args, **options: (
            calls.append(type(given)) or turn(U, given, *args, **options)
        ),
    )
    with_it = point.product(*step)
    follow = activation == "relu" and keep != PRODUCTS
    assert set(calls) == {TwoSlopes if follow else Given}
    monkeypatch.setattr(between_products, "takes", lambda *arguments: False)
    without = point.product(*step)
    for found, expected in zip(with_it, without, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            close(found, expected.double(), {"float32": 1e-5, "bfloat16": 2e-2, "int8": 2e-2}[name])
