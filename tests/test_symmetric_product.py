"""Sums of symmetric products, by the kernel where there is one, against float64."""

import pytest
import torch

import paperlib
from paperlib import matrix_units, symmetric_product
from paperlib.lift import Lift
from paperlib.long_sum import GROUP
from paperlib.symmetric_product import LEAST_COLUMNS, SOURCE, SymmetricSum

UNITS = pytest.mark.skipif(
    not matrix_units.available(), reason="needs matrix units and a C++ compiler that knows them"
)

# Sums are in float32, whatever the factors are rounded to.
TOLERANCE = 1e-6

# Rows and columns: every remainder of tiles, blocks, groups and steps.
SHAPES = [(1, 1), (33, 40), (700, 97), (1100, 640), (70, 1700), (2100, 300)]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(dtype, h, d):
    """Rows y_k v_k and v_k."""
    V, y = randn(h, d).to(dtype), torch.randint(-2, 3, (h, 1)).to(dtype)
    return V * y, V


def close(found, exact):
    assert found.shape == exact.shape
    assert float((found - exact).norm() / exact.norm().clamp(min=1e-30)) < TOLERANCE


@pytest.fixture(params=["kernel", "bands"])
def way(request, monkeypatch):
    """Both ways, for few columns as well."""
    if request.param == "kernel":
        if not matrix_units.available():
            pytest.skip("needs matrix units and a C++ compiler that knows them")
        monkeypatch.setattr(symmetric_product, "LEAST_COLUMNS", 1)
    else:
        monkeypatch.setattr(symmetric_product, "takes", lambda A, B: False)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_sum_of_all_blocks_of_rows(shape, dtype, way):
    if way == "bands" and dtype == torch.bfloat16:
        pytest.skip("the libraries return bfloat16")
    found, exact = SymmetricSum(shape[1], device=torch.device("cpu")), 0
    for _ in range(2):
        A, V = factors(dtype, *shape)
        found.add(A, V)
        exact = exact + A.double().T @ V.double()
    close(found.total, exact)
    assert torch.equal(found.total, found.total.T)


def test_long_sums_go_into_float64(way):
    """Added to 2^25 in float32, ones would be lost."""
    sums = SymmetricSum(64, device=torch.device("cpu"))
    sums.add(torch.full((GROUP, 64), 64.0), torch.full((GROUP, 64), 64.0))
    sums.add(torch.ones(1, 64), torch.ones(1, 64))
    exact = torch.full((64, 64), 64.0**2 * GROUP + 1, dtype=torch.float64)
    assert torch.equal(sums.total, exact)


def test_of_nothing_it_is_zero():
    assert not SymmetricSum(5, device=torch.device("cpu")).total.any()


def test_factors_of_other_shapes_are_refused(way):
    V = randn(20, 64)
    sums = SymmetricSum(64, device=torch.device("cpu"))
    for A, B in ((V[:, 1:], V[:, 1:]), (V, V[1:]), (V, V[:, 1:]), (V[0], V[0])):
        with pytest.raises(ValueError, match=r"of one shape \(h, 64\), got \("):
            sums.add(A, B)
    sums.add(V, V)
    with pytest.raises(ValueError, match=r"got \(20, 65\) and \(20, 65\)"):
        sums.add(randn(20, 65), randn(20, 65))
    close(sums.total, V.double().T @ V.double())


def test_later_factors_may_lie_anyhow(way):
    A, V = factors(torch.float32, 33, 64)
    sums = SymmetricSum(64, device=torch.device("cpu"))
    sums.add(A, V)
    sums.add(A.T.contiguous().T, torch.cat([V, V], 1)[:, 64:])
    close(sums.total, 2 * A.double().T @ V.double())


def test_sums_are_where_they_are_asked_for(way):
    """Not where torch puts tensors by default."""
    A, V = factors(torch.float32, 33, 64)
    with torch.device("meta"):
        sums = SymmetricSum(64, device=torch.device("cpu"))
        sums.add(A, V)
        found = sums.total
    close(found, A.double().T @ V.double())


@UNITS
def test_later_factors_that_the_kernel_does_not_multiply_are_refused():
    A, V = factors(torch.float32, 33, LEAST_COLUMNS)
    sums = SymmetricSum(LEAST_COLUMNS, device=torch.device("cpu"))
    sums.add(A, V)
    for other in (V.bfloat16(), V.double(), V.to("meta"), V.clone().requires_grad_()):
        with pytest.raises(ValueError, match=f"got torch.float32 on cpu and {other.dtype} on"):
            sums.add(A, other)
    with pytest.raises(ValueError, match="torch.float64 on cpu and torch.float64 on cpu"):
        sums.add(A.double(), V.double())
    sums.add(A.bfloat16(), V.bfloat16())  # that it multiplies, too
    rounded = A.bfloat16().double().T @ V.bfloat16().double()
    close(sums.total, A.double().T @ V.double() + rounded)


@UNITS
@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_share_the_columns(dtype, threads):
    A, V = factors(dtype, 300, 2000)
    totals = []
    for count in (1, threads):
        torch.set_num_threads(count)
        sums = SymmetricSum(2000, device=torch.device("cpu"))
        sums.add(A, V)
        totals.append(sums.total)
    assert torch.equal(*totals)


@UNITS
def test_what_the_kernel_takes(monkeypatch):
    V = randn(10, LEAST_COLUMNS)
    takes = symmetric_product.takes
    assert takes(V, V) and takes(V.bfloat16(), V.bfloat16())
    assert not takes(V, V.bfloat16()) and not takes(V.double(), V.double())
    assert not takes(V[:, 1:], V[:, 1:]) and not takes(V, V.T.contiguous().T)
    assert not takes(V[:, 1:].contiguous(), V[:, 1:].contiguous())
    assert not takes(V.clone().requires_grad_(), V)
    monkeypatch.setattr(matrix_units, "available", lambda: False)
    assert not takes(V, V)


@UNITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_lift_is_made_by_it(dtype, monkeypatch):
    model = paperlib.RandomFeatures(LEAST_COLUMNS, 9000, seed=1)
    calls, call = [], symmetric_product.call
    monkeypatch.setattr(
        symmetric_product, "call", lambda *a: calls.append((a[0], len(a[2]))) or call(*a)
    )
    V = model.V.to(dtype).double()
    close(Lift(model, randn(1, 9000), dtype=dtype).gram, V.T @ V)
    assert calls == [(SOURCE, 8192), (SOURCE, 808)]
