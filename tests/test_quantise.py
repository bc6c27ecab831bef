"""Rounded parameters against numbers worked out by hand, and against numpy."""

import math

import numpy as np
import pytest
import torch

from paperlib import quantise
from paperlib.quantise import BITS


def weights(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_whole_numbers_by_hand():
    theta = torch.tensor([7.0, -3.4, 0.6, 0.4, -7.0])
    assert quantise(theta, "int4").tolist() == [7, -3, 1, 0, -7]
    eighths = quantise(torch.tensor([127.0, -3.4, 0.6, -127.0]) / 8, "int8")
    assert eighths.tolist() == [127 / 8, -3 / 8, 1 / 8, -127 / 8]


def test_signs_by_hand():
    theta = torch.tensor([[1.0, -2.0, 3.0, 0.0], [0.0, 0.0, 0.0, -4.0]])
    assert quantise(theta, "sign").tolist() == [[1.5, -1.5, 1.5, 1.5], [1, 1, 1, -1]]


def test_the_scale_of_signs_is_the_best_one():
    theta = weights(1, 500).double()
    rounded = quantise(theta, "sign")
    best = float((rounded - theta).norm())
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert float((factor * rounded - theta).norm()) > best


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_floats_are_rounded_to_nearest(name):
    theta = weights(3, 200)
    rounded = quantise(theta, name)
    unit = torch.finfo(getattr(torch, name)).eps / 2
    assert float(((rounded - theta) / theta).abs().max()) <= unit
    if name == "float16":
        np.testing.assert_array_equal(rounded.numpy(), theta.numpy().astype(np.float16))


def test_every_row_has_its_own_scale():
    theta = torch.stack([weights(50), 1e4 * weights(50, seed=1)])
    alone = torch.stack([quantise(row, "int4") for row in theta])
    torch.testing.assert_close(quantise(theta, "int4"), alone, rtol=0, atol=0)
    assert bool((alone[0] != 0).any())


def test_groups_have_their_own_scale():
    theta = weights(2, 10)
    grouped = quantise(theta, "int4", group=4)
    for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
        expected = quantise(theta[:, part], "int4")
        torch.testing.assert_close(grouped[:, part], expected, rtol=0, atol=0)
    outlier = torch.cat([weights(64), torch.tensor([1000.0])])
    error = [float((quantise(outlier, "int4", group=g) - outlier).norm()) for g in (None, 8)]
    assert error[1] < error[0] / 3


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_stay_and_rounding_twice_changes_nothing(name, dtype):
    for theta in (weights(40), weights(3, 40)):
        once = quantise(theta.to(dtype), name)
        assert once.shape == theta.shape and once.dtype == dtype
        torch.testing.assert_close(quantise(once, name), once)
        for row in once.reshape(-1, 40):
            assert len(row.unique()) <= 2 ** BITS[name]


def test_fewer_bits_lose_more():
    theta = weights(1, 2000)
    errors = [float((quantise(theta, name) - theta).norm() / theta.norm()) for name in BITS]
    assert errors == sorted(errors) and errors[0] < 1e-3 and errors[-1] > 0.3


def test_rows_of_zeros_stay():
    for name in BITS:
        assert not bool(quantise(torch.zeros(2, 5), name).any())


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_smallest_numbers_have_no_scale_and_become_zero(name, dtype):
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    theta = torch.tensor([[0.0, least, -least], [0.0, 1.0, -1.0]], dtype=dtype)
    assert bool(theta[0].any())
    assert quantise(theta, name).tolist() == [[0, 0, 0], [0, 1, -1]]


@pytest.mark.parametrize(
    ("theta", "options", "error", "message"),
    [
        ([1.0], {"format": "int8"}, TypeError, "theta must be a tensor .* got list"),
        (torch.ones(3).int(), {"format": "int8"}, TypeError, "floating-point numbers, got torch.i"),
        (torch.ones(2, 2, 2), {"format": "int8"}, ValueError, r"theta must have shape \(p,\) or"),
        (torch.ones(0), {"format": "int8"}, ValueError, r"theta must have shape \(p,\) or"),
        (torch.ones(3), {"format": "int3"}, ValueError, "format must be one of .*, got 'int3'"),
        (torch.tensor([math.nan]), {"format": "int8"}, ValueError, "theta must be finite"),
        (torch.tensor([1e6]), {"format": "float16"}, ValueError, "float16 holds numbers up to 655"),
        (torch.ones(3), {"format": "float16", "group": 2}, ValueError, "group is for formats with"),
        (torch.ones(3), {"format": "int4", "group": 0}, ValueError, "group must be at least 1"),
    ],
)
def test_bad_input_is_refused(theta, options, error, message):
    with pytest.raises(error, match=message):
        quantise(theta, **options)
