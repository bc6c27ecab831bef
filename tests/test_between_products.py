"""What lies between the two products, against the formulas in float64."""

import pytest
import torch

import paperlib
from paperlib import between_products, few_rows
from paperlib.int8 import Int8Rows
from paperlib.lift import Lift
from paperlib.projection import Linearization

# bfloat16 is rounded to the nearest; in 8 bits a step is asked for, entry by entry.
FORMATS = {"float32": 1e-6, "bfloat16": 2.5e-3, "int8": None}
AVAILABLE = [name for name in FORMATS if few_rows.available(getattr(torch, name))]

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs AVX-512 and a C++ compiler")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def problem(n, h, dtype, *, lifted=True, wide=0):
    """U, features and slopes, the latter two views of wider arrays; alpha and da."""
    U = randn(n + lifted, h).to(dtype)
    features, slopes = (randn(n, h + wide, seed=s).to(dtype)[:, wide:] for s in (1, 2))
    return U, features, slopes, randn(n, seed=3), randn(n, seed=4)


def exact(U, features, slopes, alpha, da, *, linear=1.0, scales=None):
    """T times the scales, W and Ha, in float64."""
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


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("lifted", [True, False])
@pytest.mark.parametrize(("n", "h", "wide"), [(1, 1, 0), (3, 16, 0), (5, 37, 7), (30, 1000, 5)])
def test_it_is_the_formulas(name, lifted, n, h, wide):
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    arrays = problem(n, h, dtype, lifted=lifted, wide=wide)
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


def test_threads_change_nothing():
    arrays = problem(6, 500, torch.float32)
    alone = between_products.turn(*arrays)
    torch.set_num_threads(3)
    try:
        together = between_products.turn(*arrays)
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, alone, together))


@pytest.mark.skipif("int8" not in AVAILABLE, reason="no instructions for 8 bits")
def test_nothing_goes_back_as_zeros():
    U, features, slopes, alpha, da = problem(2, 40, torch.float32)
    W, Ha = between_products.turn(0 * U, features, slopes, alpha, 0 * da, scales=torch.ones(40))
    assert isinstance(W, Int8Rows)
    assert torch.equal(W.values, torch.zeros(3, 40, dtype=torch.int8))
    assert bool((W.scale > 0).all()) and torch.equal(Ha, torch.zeros(2))


def test_it_takes_nothing_where_its_own_source_does_not_compile(monkeypatch):
    U, features, slopes, *_ = problem(4, 50, torch.float32)
    monkeypatch.setattr(between_products, "library", lambda name: None)
    assert not between_products.takes(U, features, slopes, 1)


def test_it_takes_one_output_in_the_formats_of_the_kernels():
    U, features, slopes, *_ = problem(4, 50, torch.float32)
    takes = between_products.takes
    assert takes(U, features, slopes, 1)
    assert not takes(U, features, slopes, 2)
    assert not takes(U.double(), features.double(), slopes.double(), 1)
    assert not takes(U, features.T.contiguous().T, slopes, 1)
    assert not takes(U, features, slopes.bfloat16(), 1)
    assert not takes(*(x.to("meta") for x in (U, features, slopes)), 1)


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize("lifted", [True, False])
def test_a_product_with_the_normal_matrix_is_the_same_with_and_without_it(
    name, lifted, monkeypatch
):
    dtype = getattr(torch, name)
    model = paperlib.RandomFeatures(40, 5000, seed=1)
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
    )
    step = randn(4, 40, seed=3), randn(4, 1, seed=4), randn(1, 40, seed=5) if lifted else None
    calls = []
    turn = between_products.turn
    monkeypatch.setattr(
        between_products, "turn", lambda *args, **options: calls.append(1) or turn(*args, **options)
    )
    with_it = point.product(*step)
    assert calls
    monkeypatch.setattr(between_products, "takes", lambda *arguments: False)
    without = point.product(*step)
    for found, expected in zip(with_it, without, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            close(found, expected.double(), {"float32": 1e-5, "bfloat16": 2e-2, "int8": 2e-2}[name])
