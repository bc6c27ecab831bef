"""Conjugate gradients against dense solves, on matrices of any size and spread."""

import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from paperlib.conjugate_gradients import conjugate_gradients

DOUBLE = torch.float64


def system(size=30, spread=1e4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=DOUBLE))
    A = (Q * torch.logspace(0, np.log10(spread), size, dtype=DOUBLE)) @ Q.T
    return A, torch.randn(size, generator=generator, dtype=DOUBLE)


PRECONDITIONERS = {
    "none": lambda A: lambda v: v,
    "diagonal": lambda A: lambda v: v / A.diagonal(),
    "exact": lambda A: lambda v: torch.linalg.solve(A, v),
}


@pytest.mark.parametrize("kind", PRECONDITIONERS)
def test_solves_what_a_dense_solve_does(kind):
    A, b = system()
    kept = b.clone()
    found = conjugate_gradients(
        A.mv, b, PRECONDITIONERS[kind](A), tolerance=1e-10, max_iterations=200
    )
    torch.testing.assert_close(found.x, torch.linalg.solve(A, b), rtol=1e-6, atol=1e-8)
    assert torch.equal(b, kept) and found.relative_residual <= 1e-10
    assert found.iterations == 1 or kind != "exact"


@pytest.mark.parametrize("iterations", [1, 2, 7])
def test_stops_at_the_iterate_of_scipy(iterations):
    A, b = system(spread=100)
    found = conjugate_gradients(
        A.mv, b, lambda v: v / A.diagonal(), tolerance=1e-14, max_iterations=iterations
    )
    inverse = scipy.sparse.linalg.aslinearoperator(np.diag(1 / A.diagonal().numpy()))
    expected, _ = scipy.sparse.linalg.cg(
        A.numpy(), b.numpy(), rtol=0, maxiter=iterations, M=inverse
    )
    assert found.iterations == iterations
    torch.testing.assert_close(found.x, torch.from_numpy(expected), rtol=1e-9, atol=1e-12)


def test_no_right_side_takes_no_product_and_negative_curvature_ends_it():
    A, b = system()

    def never(v):
        raise AssertionError("a product")

    same = lambda v: v  # noqa: E731
    nothing = conjugate_gradients(never, 0 * b, same, tolerance=0.1, max_iterations=9)
    assert nothing.iterations == 0 and not nothing.x.any()
    ended = conjugate_gradients(lambda v: -v, b, same, tolerance=0.1, max_iterations=9)
    assert ended.iterations == 1 and not ended.x.any() and ended.relative_residual == 1
    for preconditioner in (lambda v: -v, lambda v: math.nan * v):
        unsolved = conjugate_gradients(never, b, preconditioner, tolerance=0.1, max_iterations=9)
        assert not unsolved.x.any() and unsolved.relative_residual == 1
