"""Sums in float64 of products in fewer digits."""

import pytest
import torch

from paperlib.long_sum import GROUP, LongSum


def parts(dtype, count=50, height=700):
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(3, height, generator=generator).to(dtype),
            torch.randn(height, 4, generator=generator).to(dtype),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 3e-6), (torch.bfloat16, 1e-2)]
)
def test_products_and_parts_add_up(dtype, tolerance):
    exact = sum(A.double() @ B.double() for A, B in parts(dtype))
    by_product, by_part = LongSum(3, 4, device="cpu"), LongSum(3, 4, device="cpu")
    for A, B in parts(dtype):
        by_product.add_product(A, B)
        by_part.add(A @ B, A.shape[1])
    for total in (by_product.total, by_part.total):
        assert total.dtype == torch.float64
        assert float((total - exact).norm() / exact.norm()) < tolerance


def test_a_sum_may_be_read_at_any_time():
    total, exact = LongSum(3, 4, device="cpu"), torch.zeros(3, 4, dtype=torch.float64)
    for A, B in parts(torch.float64, count=5):
        total.add_product(A, B)
        exact += A @ B
        torch.testing.assert_close(total.total, exact, rtol=1e-13, atol=1e-13)


def test_groups_end_in_float64():
    """After a large group, a small one is not lost to float32."""
    ones = torch.ones(1, GROUP)
    total = LongSum(1, 1, device="cpu")
    total.add_product(ones, 2.0**20 * torch.ones(GROUP, 1))
    total.add_product(ones, torch.full((GROUP, 1), 2.0**-13))
    assert float(total.total) == 2.0**20 * GROUP + 1


def test_nothing_adds_up_to_zero():
    assert torch.equal(LongSum(2, 2, device="cpu").total, torch.zeros(2, 2, dtype=torch.float64))
