"""The paper's momentum gradient descent: its formula, its settings, and what it finds."""

import math
import weakref

import numpy as np
import pytest
import torch

from paperlib import RandomFeatures, compare, fit_min_norm, projection_loss, reconstruct, sphere
from paperlib import published as published_module
from paperlib.published import PRESETS, loss_and_gradient, momentum_descent
from paperlib.sphere import random_on_sphere
from paperlib.streams import stream

PUBLISHED = {"solver": "published", "progress": False}


def problem(n, d, p, name="relu", *, seed=0, C=1, **options):
    model = RandomFeatures(d, p, name, seed=seed, **options)
    data = sphere(n, d, seed, dtype=model.dtype)
    generator = torch.Generator().manual_seed(seed)
    y = data.y[:, None] if C == 1 else torch.randn(n, C, generator=generator).to(model.dtype)
    return model, fit_min_norm(model, data.X, y), data


def candidates(n, d, seed=9):
    return random_on_sphere(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["relu", "relu+tanh", "tanh", "gelu"])
@pytest.mark.parametrize("C", [1, 3])
def test_loss_and_gradient_are_those_of_the_projection_loss(name, C):
    """Both solvers minimise the same L; with relu_slope = 0 the gradients agree as well."""
    model, theta, _ = problem(4, 6, 2500, name, C=C, dtype=torch.float64, block_rows=1024)
    X = candidates(4, 6).requires_grad_()
    expected = projection_loss(model, theta, X)
    expected.backward()
    total = float(theta.square().sum())
    loss, gradient = loss_and_gradient(model, theta, X.detach(), total=total, relu_slope=0.0)
    assert loss == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(gradient, X.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["relu", "relu+tanh"])
@pytest.mark.parametrize("C", [1, 2])
def test_surrogate_slope_against_a_dense_formula(name, C):
    """Slope 0.02 on the inactive side, evaluated at the candidates: nothing else changes."""
    model, theta, _ = problem(4, 6, 80, name, C=C, dtype=torch.float64)
    X, V = candidates(4, 6), model.V
    U = X @ V.T
    Phi = model.activation.value(U)
    alpha = torch.linalg.solve(Phi @ Phi.T, Phi @ theta.T)
    E = theta - alpha.T @ Phi
    slope = (U > 0).double() + 0.02 * (U <= 0).double()
    if name == "relu+tanh":
        slope = slope + 1 - torch.tanh(U).square()
    total = float(theta.square().sum())
    expected = -2 / total * (slope * (alpha @ E)) @ V
    loss, gradient = loss_and_gradient(model, theta, X, total=total, relu_slope=0.02)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert loss == pytest.approx(float(E.square().sum()) / total, rel=1e-10)
    # It is a surrogate: the gradient of L is another one.
    _, true = loss_and_gradient(model, theta, X, total=total, relu_slope=0.0)
    assert float((gradient - true).norm()) > 1e-3 * float(true.norm())


def test_surrogate_slope_leaves_smooth_activations_alone():
    model, theta, _ = problem(4, 6, 80, "tanh", dtype=torch.float64)
    X = candidates(4, 6)
    _, with_slope = loss_and_gradient(model, theta, X, total=1.0, relu_slope=0.02)
    _, without = loss_and_gradient(model, theta, X, total=1.0, relu_slope=0.0)
    assert torch.equal(with_slope, without)


class Silent:
    """Progress that shows nothing."""

    def step(self, loss, X):
        pass


def descend(model, theta, X, **changes):
    options = {
        "tolerance": 1e-7,
        "learning_rate": 0.5,
        "momentum": 0.9,
        "max_steps": 5,
        "relu_slope": 0.02,
        "watch": Silent(),
    }
    return momentum_descent(model, theta, X, **{**options, **changes})


def test_steps_are_those_of_torch_sgd_with_momentum():
    """Gradient descent by torch's own optimiser on our loss, rows put back after each step."""
    model, theta, _ = problem(3, 6, 200, "tanh", dtype=torch.float64)
    start = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    X = start.clone().requires_grad_()
    optimiser = torch.optim.SGD([X], lr=0.5, momentum=0.9)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        projection_loss(model, theta, X).backward()
        optimiser.step()
        with torch.no_grad():
            X *= math.sqrt(6) / X.norm(dim=1, keepdim=True)
        losses.append(projection_loss(model, theta, X).item())
    found, steps, ended, records = descend(model, theta, start)
    torch.testing.assert_close(found, X.detach(), rtol=1e-9, atol=1e-11)
    assert (steps, ended) == (5, "step limit")
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-9)


def test_presets_are_the_published_settings():
    synthetic, cifar10 = PRESETS["synthetic"], PRESETS["cifar10"]
    assert (synthetic.n, synthetic.d, synthetic.p) == (20, 100, 20_000)
    assert (cifar10.n, cifar10.d, cifar10.p) == (10, 3072, 100_000)
    assert synthetic.activation == cifar10.activation == "relu"
    assert synthetic.options["learning_rate"] == 20
    assert cifar10.options["learning_rate"] == 2000
    model, theta, _ = problem(3, 10, 300)
    for preset in PRESETS.values():
        found = reconstruct(model, theta, 3, max_steps=2, **PUBLISHED, **preset.options)
        assert found.options["learning_rate"] == preset.options["learning_rate"]
        assert found.options["momentum"] == 0.9
        assert found.options["relu_slope"] == 0.02
        assert found.options["tolerance"] == 1e-7


def test_default_step_limit_is_that_of_the_paper():
    model, theta, data = problem(1, 10, 300)
    found = reconstruct(model, theta, 1, learning_rate=2.0, **PUBLISHED)
    assert found.options["max_steps"] == 1_000_000
    assert found.options["restarts"] == 1
    assert compare(data.X, found.samples).recovered(1e-2) == 1


def test_candidates_start_from_normal_entries_of_their_own_stream(monkeypatch):
    starts = []

    def spy(model, theta, X, **options):
        starts.append(X.clone())
        return momentum_descent(model, theta, X, **options)

    monkeypatch.setattr(published_module, "momentum_descent", spy)
    model, theta, data = problem(20, 100, 300, seed=4)
    reconstruct(model, theta, 20, seed=4, max_steps=1, restarts=2, **PUBLISHED)
    first, second = starts
    assert first.dtype == torch.float32 and first.shape == (20, 100)
    assert abs(float(first.mean())) < 0.1 and abs(float(first.std()) - 1) < 0.1
    assert float(first.norm(dim=1).std()) > 0.3  # not on the sphere
    assert not torch.equal(first, second)
    default = random_on_sphere(20, 100, generator=stream("candidates", 4)).float()
    for other in (data.X, default, model.V[:20] * 10, second):
        cosines = torch.nn.functional.cosine_similarity(first[:, None], other[None], dim=2)
        assert float(cosines.abs().max()) < 0.6


@pytest.mark.parametrize("name", ["relu", "relu+tanh"])
def test_it_finds_the_samples_of_an_easy_problem(name):
    model, theta, data = problem(2, 10, 1000, name, seed=1)
    found = reconstruct(
        model, theta, 2, learning_rate=2.0, max_steps=20_000, restarts=5, **PUBLISHED
    )
    assert found.explained and found.loss <= 1e-7
    assert found.stages[-1]["ended"] == "converged"
    assert compare(data.X, found.samples).recovered(0.01) == 2
    # The descent's own float32 loss and the one reported agree on what was reached.
    assert found.history[-1]["loss"] == pytest.approx(found.loss, rel=1e-2)
    torch.testing.assert_close(
        found.samples.norm(dim=1), torch.full((2,), math.sqrt(10)), rtol=1e-5, atol=0
    )
    again = reconstruct(
        model, theta, 2, learning_rate=2.0, max_steps=20_000, restarts=5, **PUBLISHED
    )
    assert torch.equal(again.samples, found.samples)


def test_reported_loss_is_that_of_the_samples():
    model, theta, _ = problem(5, 20, 1000)
    found = reconstruct(model, theta, 5, max_steps=50, **PUBLISHED)
    assert found.loss == float(projection_loss(model, theta, found.samples))
    assert not found.explained
    assert found.status.startswith("not explained: stopped at loss")


def test_passes_and_stages_are_counted():
    """Two passes a step and for the start, two for the loss that is reported."""
    model, theta, _ = problem(5, 20, 1000)
    seen = []
    found = reconstruct(
        model,
        theta,
        5,
        max_steps=12,
        restarts=3,
        callback=lambda stage, loss, X: seen.append((stage, loss, X.shape)),
        **PUBLISHED,
    )
    assert found.passes == 3 * (2 * 13 + 2)
    assert [stage["ended"] for stage in found.stages] == ["step limit"] * 3
    assert found.loss == min(stage["loss"] for stage in found.stages)
    assert found.stages[found.restart]["loss"] == found.loss
    assert len(seen) == len(found.history) == 36
    assert seen[0][0] == "descent" and seen[-1][0] == "restart 3, descent"
    assert [record["loss"] for record in found.history] == [loss for _, loss, _ in seen]
    assert found.elimination_losses == []
    assert [record["passes"] for record in found.history[:3]] == [4, 6, 8]
    assert {stage["products"] for stage in found.stages} == {"float32"}


def test_a_streamed_v_is_never_held_as_a_whole(monkeypatch):
    model = RandomFeatures(8, 16 * 1024, block_rows=1024, placement="streamed")
    rows_of, alive, most = model.weight_blocks, [], []

    def watched(**options):
        for start, V in rows_of(**options):
            alive.append(weakref.ref(V))
            most.append(sum(V() is not None for V in alive))
            yield start, V

    monkeypatch.setattr(model, "weight_blocks", watched)
    theta = torch.randn(1, model.p)
    loss_and_gradient(model, theta, candidates(3, 8).float(), total=1.0, relu_slope=0.02)
    assert len(alive) == 32 and max(most) <= 2


def test_a_descent_that_cannot_fit_is_refused_before_v_is_drawn(monkeypatch):
    model = RandomFeatures(50, 4000, placement="resident")
    monkeypatch.setattr("paperlib.memory.free_bytes", lambda device: 850_000)
    with pytest.raises(MemoryError, match="features and slopes 96 kB, weights 800 kB"):
        reconstruct(model, torch.ones(1, 4000), 3, **PUBLISHED)
    assert not model.holds(torch.float32)


def test_restarts_end_with_the_first_that_explains():
    model, theta, _ = problem(1, 10, 300)
    found = reconstruct(model, theta, 1, learning_rate=2.0, max_steps=300, restarts=50, **PUBLISHED)
    assert found.explained
    assert len(found.stages) == found.restart + 1 < 50


def test_history_of_a_long_run_is_thinned(monkeypatch):
    monkeypatch.setattr(published_module, "MOST_RECORDS", 16)
    model, theta, _ = problem(2, 5, 50)
    X = candidates(2, 5).float()
    _, steps, _, records = descend(model, theta, X, max_steps=1001, tolerance=1e-30)
    assert steps == 1001
    numbers = [record["step"] for record in records]
    assert len(numbers) <= 18
    assert numbers[-1] == 1001
    assert len(set(np.diff(numbers[:-1]))) == 1  # evenly spaced
    _, _, _, records = descend(model, theta, X, max_steps=16, tolerance=1e-30)
    assert [record["step"] for record in records] == list(range(1, 17))


def test_it_stops_where_it_starts_if_that_explains_the_parameters():
    model, theta, data = problem(3, 10, 300, dtype=torch.float64)
    found, steps, ended, records = descend(model, theta, data.X)
    assert (steps, ended, records) == (0, "converged", [])
    torch.testing.assert_close(found, data.X)


def test_equal_candidates_do_not_break_the_gram_system():
    model, theta, _ = problem(3, 10, 300, dtype=torch.float64)
    X = candidates(2, 10)
    total = float(theta.square().sum())
    loss, gradient = loss_and_gradient(model, theta, X, total=total, relu_slope=0.02)
    twice = torch.cat([X, X[:1]])
    merged, shared = loss_and_gradient(model, theta, twice, total=total, relu_slope=0.02)
    assert merged == pytest.approx(loss, rel=1e-6)
    assert torch.isfinite(shared).all()
    torch.testing.assert_close(shared[0] + shared[2], gradient[0], rtol=1e-5, atol=1e-9)


def test_a_descent_that_diverges_returns_the_last_sound_candidates(monkeypatch):
    model, theta, _ = problem(3, 10, 300)
    calls = []

    def breaks(*arguments, **options):
        calls.append(None)
        loss, gradient = loss_and_gradient(*arguments, **options)
        return (math.nan, gradient) if len(calls) == 4 else (loss, gradient)

    monkeypatch.setattr(published_module, "loss_and_gradient", breaks)
    found = reconstruct(model, theta, 3, max_steps=50, **PUBLISHED)
    assert found.stages[0]["ended"] == "diverged"
    assert torch.isfinite(found.samples).all() and math.isfinite(found.loss)
    assert not found.explained
    assert [record["step"] for record in found.history] == [1, 2]


def test_both_solvers_agree_where_the_published_one_ends():
    """Same L at the same candidates, to rounding in float32."""
    model, theta, _ = problem(5, 20, 1000)
    found = reconstruct(model, theta, 5, max_steps=200, **PUBLISHED)
    assert found.history[-1]["loss"] == pytest.approx(found.loss, rel=1e-3)
    refined = reconstruct(model, theta, 5, progress=False)
    assert refined.loss < found.loss
