"""Random features: V as a function of its seed alone, and the products against dense Jacobians."""

import math

import numpy as np
import pytest
import torch

from paperlib import RandomFeatures, activation_names, sphere
from paperlib.random_features import ROWS_PER_DRAW
from paperlib.sphere import random_on_sphere
from paperlib.streams import stream, stream_seed

D, P = 4, 2500  # three draws, the last one cut


def points(n, d=D, *, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1000 + seed)
    return random_on_sphere(n, d, generator=generator).to(dtype)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(2000 + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_features_are_the_activation_of_v_x():
    model = RandomFeatures(D, P, "tanh", seed=3, dtype=torch.float64)
    X = points(3)
    assert model.features(X).shape == (3, P)
    torch.testing.assert_close(model.features(X), torch.tanh(X @ model.V.T), rtol=1e-14, atol=0)


@pytest.mark.parametrize("block_rows", [1024, 2048, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_v_depends_on_its_seed_alone(block_rows, dtype):
    reference = RandomFeatures(D, P, "relu", seed=7).V
    model = RandomFeatures(D, P, "tanh", seed=7, dtype=dtype, block_rows=block_rows)
    assert model.V.dtype == dtype
    assert torch.equal(model.V.float(), reference)
    assert torch.equal(model.V, reference.to(dtype))  # drawn in float32 in either case


def test_v_does_not_depend_on_p_or_on_the_global_generator():
    torch.manual_seed(1)
    long = RandomFeatures(D, P, seed=7).V
    torch.manual_seed(2)
    before = torch.get_rng_state()
    short = RandomFeatures(D, 1500, seed=7).V
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(long[:1500], short)


def test_v_does_not_depend_on_the_number_of_threads():
    one = RandomFeatures(D, P, seed=7).V
    torch.set_num_threads(2)
    assert torch.equal(RandomFeatures(D, P, seed=7).V, one)


def test_entries_of_v_are_normal_with_variance_one_over_d():
    V = RandomFeatures(50, 8 * ROWS_PER_DRAW, seed=1).V.double() * math.sqrt(50)
    count = V.numel()
    assert abs(float(V.mean())) < 4 / math.sqrt(count)
    assert abs(float(V.var()) - 1) < 4 * math.sqrt(2 / count)
    assert abs(float((V**4).mean()) - 3) < 4 * math.sqrt(96 / count)
    # Draws are independent of one another: no row comes twice.
    assert len(np.unique(V[:, 0].numpy())) > 0.999 * len(V)
    halves = V.view(8, -1)
    cosines = torch.corrcoef(halves) - torch.eye(8)
    assert float(cosines.abs().max()) < 5 / math.sqrt(halves.shape[1])


def test_other_seeds_give_other_weights():
    assert not torch.equal(RandomFeatures(D, P, seed=0).V, RandomFeatures(D, P, seed=1).V)


def test_streams_for_equal_seeds_share_nothing():
    """Data, weights and candidates drawn with the same seed are unrelated directions."""
    d, seed = 400, 0
    rows = {
        "V": RandomFeatures(d, 64, seed=seed).V.double(),
        "data": sphere(64, d, seed, dtype=torch.float64).X,
        "candidates": random_on_sphere(64, d, generator=stream("candidates", seed)),
        "published": random_on_sphere(64, d, generator=stream("published candidates", seed)),
    }
    names = list(rows)
    unit = {name: X / X.norm(dim=1, keepdim=True) for name, X in rows.items()}
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            cosines = (unit[a] @ unit[b].T).abs()
            assert float(cosines.max()) < 0.35, f"{a} and {b} share directions"


def test_stream_seeds():
    assert stream_seed("V", 0) != stream_seed("candidates", 0) != stream_seed("V", 1)
    assert stream_seed("V", 5, index=3) == (stream_seed("V", 5) + 3) % 2**32
    with pytest.raises(ValueError, match="seed must be at least 0 and below 2\\^63, got -1"):
        stream_seed("V", -1)


def dense_jacobians(model, X):
    """J_i for every row, (n, p, d), by forward-mode differentiation of act(V x)."""
    V, act = model.V, model.activation.value
    one = torch.func.jacfwd(lambda x: act(V @ x))
    return torch.stack([one(x) for x in X])


@pytest.mark.parametrize("name", activation_names())
def test_products_against_dense_jacobians(name):
    model = RandomFeatures(D, P, name, seed=2, dtype=torch.float64, block_rows=1024)
    X, dX, W = points(3), normal(3, D), normal(3, P, seed=1)
    J = dense_jacobians(model, X)
    forward = torch.einsum("ipd,id->ip", J, dX)
    backward = torch.einsum("ipd,ip->id", J, W)
    torch.testing.assert_close(model.jvp(X, dX), forward, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(model.vjp(X, W), backward, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", activation_names())
def test_products_are_adjoint(name):
    model = RandomFeatures(D, P, name, seed=2, dtype=torch.float64)
    X, dX, W = points(5, seed=1), normal(5, D, seed=2), normal(5, P, seed=3)
    left = (model.jvp(X, dX) * W).sum(1)
    right = (dX * model.vjp(X, W)).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("lifted", [False, True])
def test_blocks_against_dense_with_and_without_the_linear_part(lifted):
    model = RandomFeatures(D, P, "relu+tanh", seed=2, dtype=torch.float64, block_rows=1024)
    X, dX, W = points(3), normal(3, D), normal(3, P, seed=1)
    linear = model.linear_coefficient if lifted else 0.0
    V, act = model.V, model.activation
    U = X @ V.T
    slope = act.slope(U) - linear
    seen, vjp = 0, 0
    for block in model.blocks():
        part = slice(block.start, block.stop)
        features, state = block.linearize(X, lifted=lifted)
        torch.testing.assert_close(features, (act.value(U) - linear * U)[:, part])
        torch.testing.assert_close(block.jvp(state, dX), (slope * (dX @ V.T))[:, part])
        vjp += block.vjp(state, W[:, part])
        assert block.start == seen
        seen = block.stop
    assert seen == P
    torch.testing.assert_close(vjp, (slope * W) @ V)


@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_slope_gram_is_close_to_the_traces_of_the_jacobians(name):
    """tr(J_i^T J_j) / d, with the norms of the rows of V at their mean: exact as d grows."""
    d, p = 200, 3000
    model = RandomFeatures(d, p, name, seed=2, dtype=torch.float64, block_rows=1024)
    X = points(3, d)
    J = dense_jacobians(model, X)
    trace = torch.einsum("ipd,jpd->ij", J, J) / d
    found = sum(block.slope_gram(block.linearize(X)[1]) for block in model.blocks())
    torch.testing.assert_close(found, trace, rtol=0.02, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_do_not_depend_on_the_block_height(dtype):
    X, dX, W = (t.to(dtype) for t in (points(3), normal(3, D), normal(3, P)))
    results = []
    for block_rows in (1024, 2048, 8192):
        model = RandomFeatures(D, P, "gelu", seed=5, dtype=dtype, block_rows=block_rows)
        results.append((model.features(X), model.jvp(X, dX), model.vjp(X, W)))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 7, 8, 20, 63, 64])
def test_inputs_are_those_of_v_for_any_number_of_rows(rows, dtype):
    # A few rows through a wide V take another way through the processor.
    model = RandomFeatures(600, 1500, dtype=dtype, block_rows=1024)
    A = normal(rows, 600).to(dtype)
    for block in model.blocks():
        found = block.project(A)
        assert found.is_contiguous() and found.dtype == dtype
        expected = A.double() @ block.weights.double().T
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_describe_builds_the_same_model():
    model = RandomFeatures(D, P, "relu+tanh", seed=5, dtype=torch.float64)
    about = model.describe()
    assert about.pop("model") == "RandomFeatures"
    again = RandomFeatures(**{**about, "dtype": getattr(torch, about["dtype"])})
    assert torch.equal(again.features(points(2)), model.features(points(2)))
