"""The products with a tile of V, by whichever library."""

import pytest
import torch

import paperlib as pl
from paperlib import matrix_product
from paperlib.instructions import fast_kernels
from paperlib.matrix_product import WORTHWHILE, combine, project

# (rows of A, rows of V, d): below and above what oneDNN is called for, and single rows.
SHAPES = [(3, 50, 7), (20, 1000, 40), (14, 3001, 301), (1, 9000, 1000), (100, 1024, 130)]


def factors(n, h, d, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    A, W, V = (torch.randn(*s, generator=generator) for s in ((n, d), (n, h), (h, d)))
    return A.to(dtype), W.to(dtype), V.to(dtype)


def close(product, A, B, tolerance):
    exact = A.double() @ B.double()
    assert product.shape == exact.shape
    assert float((product.double() - exact).norm() / exact.norm()) < tolerance


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 3e-6), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_wider_numbers(shape, dtype, tolerance, enabled, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    A, W, V = factors(*shape, dtype)
    close(project(A, V), A, V.T, tolerance)
    close(combine(W, V), W, V, tolerance)
    assert project(A, V).dtype == dtype
    assert combine(W, V).dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_may_be_views(shape):
    A, W, V = factors(*shape)
    wide = torch.cat([W, W], 1)[:, W.shape[1] :]  # rows further apart than they are long
    close(combine(wide, V), W, V, 1e-6)
    turned = V.T.contiguous().T
    for left in (A, A.T.contiguous().T):
        for right in (V, turned):
            close(project(left, right), A, V.T, 1e-6)
            close(combine(W.T.contiguous().T, right), W, V, 1e-6)


def test_one_row_for_all():
    _, W, V = factors(*SHAPES[2])
    close(combine(W[:1].expand(30, -1), V), W[:1].expand(30, -1), V, 1e-6)


def test_products_have_derivatives():
    A, _, V = factors(*SHAPES[2])
    A.requires_grad_()
    (gradient,) = torch.autograd.grad(project(A, V).square().sum(), A)
    expected = 2 * (A.detach().double() @ V.double().T) @ V.double()
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.skipif(not fast_kernels(torch.device("cpu")), reason="needs a CPU with AVX-512")
def test_kernels_are_made_where_they_pay_and_only_there(monkeypatch):
    A, W, V = factors(*SHAPES[2])
    kernel = matrix_product._kernel
    assert A.shape[0] * V.numel() >= WORTHWHILE
    assert kernel(A, V) is not None
    assert kernel(W, V) is not None
    assert kernel(A[:1], V) is None  # too small
    assert kernel(A.double(), V.double()) is None
    assert kernel(A.bfloat16(), V.bfloat16()) is None
    # oneDNN takes thousands of times as long for these.
    assert kernel(A.T.contiguous().T, V) is None
    assert kernel(W[:1].expand(14, -1), V) is None
    assert kernel(A, V.T.contiguous().T) is None
    assert kernel(A.requires_grad_(), V) is None
    A = A.detach()
    assert kernel(A, V) is not None
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert kernel(A, V) is None


@pytest.mark.skipif(
    matrix_product._onednn_linear() is None, reason="needs a torch whose oneDNN works"
)
def test_onednn_is_found_whatever_torch_makes_by_default():
    matrix_product._onednn_linear.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert matrix_product._onednn_linear() is not None
    finally:
        torch.set_default_dtype(torch.float32)
        matrix_product._onednn_linear.cache_clear()


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_of_other_columns_are_refused(shape):
    """By the kernels and by the libraries alike."""
    A, W, V = factors(*shape)
    for left, multiply in ((A, project), (W, combine)):
        for wrong in (left[:, 1:].contiguous(), torch.cat([left, left[:, :1]], 1)):
            with pytest.raises((ValueError, RuntimeError)):
                multiply(wrong, V)


def test_a_build_without_onednn_multiplies_too(monkeypatch):
    A, W, V = factors(*SHAPES[2])
    monkeypatch.setattr(matrix_product, "_onednn_linear", lambda: None)
    close(project(A, V), A, V.T, 1e-6)
    close(combine(W, V), W, V, 1e-6)


def test_the_loss_is_the_same_by_either_library(monkeypatch):
    model = pl.RandomFeatures(300, 20 * 300 * 3, seed=1)
    data = pl.sphere(20, 300, seed=2)
    theta = pl.fit_min_norm(model, data.X, data.y)
    candidates = pl.sphere(20, 300, seed=3).X

    def evaluate(enabled):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        X = candidates.clone().requires_grad_()
        loss = pl.projection_loss(model, theta, X)
        return loss.detach(), torch.autograd.grad(loss, X)[0]

    for one, other in zip(evaluate(True), evaluate(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
