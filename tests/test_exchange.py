"""Exchanging candidates: curvature and directions against dense oracles, and what comes of it."""

import pytest
import torch
from stage_by_stage import second_order_solver

import paperlib
from paperlib import RandomFeatures, activation_names, compare, fit_min_norm, saved_attack, sphere
from paperlib.activations import activation
from paperlib.attempts import Attempts
from paperlib.elimination import removal_costs
from paperlib.exchange import AVERAGED, DIRECTIONS, Exchanges, mean_curvature, split_directions
from paperlib.known_samples import WithoutKnown
from paperlib.message_passing import Beliefs, MessagePassing
from paperlib.projection import Linearization
from paperlib.sphere import to_sphere

DOUBLE = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def alike(n, d, cosine, *, seed):
    """Points of which the first two have that cosine."""
    X = sphere(n, d, seed=seed, dtype=DOUBLE).X
    aside = X[1] - (X[1] @ X[0]) / d * X[0]
    X[1] = to_sphere((cosine * X[0] + (1 - cosine**2) ** 0.5 * to_sphere(aside[None])[0])[None])[0]
    return X


@pytest.mark.parametrize("name", activation_names())
def test_mean_curvature_is_the_second_derivative_on_average(name):
    act, reach = activation(name), 0.4
    z = torch.linspace(-2, 2, 9, dtype=DOUBLE)
    # Twice by parts: the second derivative moves to the density, which needs a fine grid.
    t = torch.linspace(-9, 9, 40001, dtype=DOUBLE)
    density = torch.exp(-t.square() / 2)
    density /= density.sum()
    slopes = act.slope(z[:, None] + reach * t)
    expected = (slopes * t * density).sum(1) / reach
    torch.testing.assert_close(mean_curvature(act, z, reach), expected, rtol=0, atol=0.03)


def test_the_curvature_of_a_relu_is_the_density_of_its_kink():
    z = torch.linspace(-2, 2, 9, dtype=DOUBLE)
    density = torch.exp(-(z / 0.5).square() / 2) / (0.5 * (2 * torch.pi) ** 0.5)
    torch.testing.assert_close(
        mean_curvature(activation("relu"), z, 0.5), density, rtol=0, atol=0.03
    )


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("d", [12, 40])  # all directions at once, and by a Krylov space
def test_the_directions_of_splits_are_the_leading_ones_of_dense_matrices(outputs, d):
    n, p = 3, 2000
    model = RandomFeatures(d, p, "relu", seed=0, dtype=DOUBLE)
    X = sphere(n, d, seed=1, dtype=DOUBLE).X
    alpha = torch.randn(n, outputs, generator=generator(3), dtype=DOUBLE)
    # Something to find at each candidate, and noise.
    residual = torch.randn(outputs, p, generator=generator(2), dtype=DOUBLE)
    for x, a, y in zip(X, alpha, sphere(n, d, seed=4, dtype=DOUBLE).X, strict=True):
        bend = mean_curvature(model.activation, model.V @ x, AVERAGED)
        residual += torch.outer(a / a.norm(), 3 * bend * (model.V @ y).square())
    found, gains, _ = split_directions(model, residual, X, alpha, generator=generator())
    assert found.shape == (n, d) and gains.shape == (n,)
    torch.testing.assert_close((found * X).sum(1), torch.zeros(n, dtype=DOUBLE), atol=1e-9, rtol=0)
    for i, (x, a) in enumerate(zip(X, alpha, strict=True)):
        pull = a / a.norm() @ residual
        bend = mean_curvature(model.activation, model.V @ x, AVERAGED)
        weights = pull * bend
        M = model.V.T @ ((weights - weights.mean())[:, None] * model.V)
        leading = torch.linalg.eigh(M).eigenvectors[:, -DIRECTIONS:].T
        tangent = leading - (leading @ x)[:, None] * x / d
        tangent = tangent * d**0.5 / tangent.norm(dim=1, keepdim=True)
        q = bend * (tangent @ model.V.T).square()
        dense = (q @ pull).clamp(min=0).square() / q.square().sum(1)
        best = int(dense.argmax())
        assert float(gains[i]) == pytest.approx(float(dense[best]), rel=1e-3)
        assert float((found[i] @ tangent[best]).abs()) == pytest.approx(d, rel=1e-3)
        # With a coefficient of its own, q explains that much of the residual.
        fit = torch.linalg.lstsq(q[best][:, None], pull[:, None]).solution[0, 0]
        explained = pull.square().sum() - (pull - fit * q[best]).square().sum()
        assert float(explained) == pytest.approx(float(gains[i]), rel=1e-3)


@pytest.mark.parametrize("name", ["relu", "relu+tanh", "gelu"])
def test_two_samples_that_share_a_candidate_are_told_apart(name):
    d = 30
    X = alike(2, d, 0.9, seed=4)
    model = RandomFeatures(d, 6000, name, seed=4, dtype=DOUBLE)
    theta = torch.tensor([[1.0, 1.0]], dtype=DOUBLE) @ model.features(X)
    point = Linearization(model, theta, to_sphere(X.sum(0, keepdim=True)))
    e, gain, _ = split_directions(
        model, point.residual, point.X, point.alpha, generator=generator()
    )
    assert gain > 0.3 * point.residual_square
    apart = (X[0] - X[1]) / (X[0] - X[1]).norm()
    assert float((e[0] @ apart).abs()) / d**0.5 > 0.9


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("known", [0, 2])
def test_an_exchange_moves_one_candidate_or_two_and_repeats(outputs, known):
    n, d = 6, 20
    data = sphere(n + known, d, seed=5)
    model = RandomFeatures(d, 3 * n * d, "relu", seed=5)
    y = torch.randn(n + known, outputs, generator=generator(6))
    theta = fit_min_norm(model, data.X, y)
    if known:
        model = WithoutKnown(model, data.X[n:])
        theta = model.off(theta)
    point = Linearization(model, theta, sphere(n, d, seed=7).X)
    settled = []

    def settle(X):
        settled.append(len(X))
        return Linearization(model, theta, X)

    beside = set()
    for seed in range(12):
        moves = Exchanges(point, settle=settle, generator=generator(seed))
        moved = moves.next()
        again = Exchanges(point, settle=settle, generator=generator(seed)).next()
        assert torch.equal(moved, again) and moves.passes > 0
        torch.testing.assert_close(moved.norm(dim=1), torch.full((n,), d**0.5))
        stayed = (moved @ point.X.T / d > 1 - 1e-5).any(0)
        beside.add(n - int(stayed.sum()))
    assert beside == {1, 2} and set(settled) == {n - 1}
    alone = Exchanges(settle(point.X[:1]), settle=settle, generator=generator()).next()
    assert alone.shape == (1, d) and not torch.equal(alone, point.X[:1])


def test_what_only_harm_would_come_of_promises_nothing():
    d = 12
    model = RandomFeatures(d, 500, "relu", seed=0, dtype=DOUBLE)
    X = sphere(1, d, seed=1, dtype=DOUBLE).X
    bend = mean_curvature(model.activation, X @ model.V.T, AVERAGED)
    alpha = torch.ones(1, 1, dtype=DOUBLE)
    for sign, promises in ((1.0, True), (-1.0, False)):
        _, gains, _ = split_directions(model, sign * bend, X, alpha, generator=generator())
        assert bool(gains[0] > 0) == promises


def test_a_less_useful_candidate_goes_beside_one_that_promises_much(monkeypatch):
    monkeypatch.setattr(paperlib.exchange, "TO_RESIDUAL", 0.0)
    n, d = 8, 60
    data = sphere(n, d, seed=5, dtype=DOUBLE)
    model = RandomFeatures(d, 3 * n * d, "relu", seed=5, dtype=DOUBLE)
    theta = fit_min_norm(model, data.X, data.y)
    point = Linearization(model, theta, sphere(n, d, seed=7, dtype=DOUBLE).X)
    missed_least = removal_costs(point.gram_inverse, point.alpha).argsort()[: n // 2].tolist()
    left = []

    def settle(X):
        left.append(Linearization(model, theta, X))
        return left[-1]

    seen, signs = set(), set()
    for seed in range(30):
        moved = Exchanges(point, settle=settle, generator=generator(seed)).next()
        others = left[-1].X
        taken = int((point.X @ others.T / d).amax(1).argmin())
        assert taken in missed_least
        beside = moved[-1] @ others.T / d
        i = int(beside.abs().argmax())
        gains = split_directions(
            model, left[-1].residual, others, left[-1].alpha, generator=generator()
        )[1]
        assert i in gains.argsort(descending=True)[: (n - 1) // 2]
        seen.add((taken, i))
        signs.add(bool(beside[i] > 0))
    assert len(seen) > 3 and signs == {True, False}


def test_what_is_taken_away_settles_once():
    n, d = 5, 20
    data = sphere(n, d, seed=5)
    model = RandomFeatures(d, 3 * n * d, "relu", seed=5)
    theta = fit_min_norm(model, data.X, data.y)
    point, taken = Linearization(model, theta, sphere(n, d, seed=7).X), []

    def settle(X):
        taken.append(X.sum().item())
        return Linearization(model, theta, X)

    moves = Exchanges(point, settle=settle, generator=generator())
    for _ in range(20):
        moves.next()
    assert 1 < len(taken) == len(set(taken)) <= n


def stuck_problem(seed):
    """A model, parameters, the data, and candidates two of which hide two that are alike."""
    n, d = 6, 40
    X = alike(n, d, 0.7, seed=seed)
    model = RandomFeatures(d, 2 * n * d, "relu", seed=seed, dtype=DOUBLE)
    alpha = torch.tensor([[1.0, 0.8, -1.0, 0.9, -0.7, 1.1]], dtype=DOUBLE)
    start = X.clone()
    start[0] = to_sphere((X[0] + X[1])[None])[0]
    start[1] = sphere(1, d, seed=100 + seed, dtype=DOUBLE).X[0]
    return model, alpha @ model.features(X), X, start


@pytest.mark.parametrize("seed", range(4))
def test_exchanges_lead_out_of_a_minimum_that_descent_stays_in(seed):
    model, theta, X, start = stuck_problem(seed)
    n = len(X)
    solver = second_order_solver(model, theta, n)
    assert solver.exchanges
    stuck = solver._descend_unlifted(start, 0)
    assert stuck.loss > 1e-5
    found = solver._exchanged(stuck, 0)
    assert found.loss <= 1e-10
    assert compare(X, found.X).recovered() == n
    assert solver.fallback is None
    tries = [stage for stage in solver.stages if stage["stage"] == "exchange"]
    assert {stage["candidates"] for stage in tries} == {n - 1, n}


class Killed(Exception):
    """Stands for whatever ends a process between two steps."""


@pytest.mark.parametrize("after", [1, 25])  # while one is taken away, and later
def test_an_attack_that_is_stopped_among_exchanges_goes_on_there(after, tmp_path, monkeypatch):
    model, theta, X, start = stuck_problem(3)
    monkeypatch.setattr(saved_attack, "INTERVAL", 0.0)
    options = {"restarts": 1, "tolerance": 1e-10, "progress": False, "resume": tmp_path}
    begun = []

    def beliefs(passing, *_, **__):
        begun.append(passing)
        count = len(start)
        return Beliefs(start, torch.zeros(count), torch.ones(count, 1), 0.1, 1, "narrow")

    monkeypatch.setattr(MessagePassing, "run", beliefs)
    steps = []

    def kill(stage, loss, candidates):
        if stage == "exchange":
            steps.append(len(candidates))
            if len(steps) == after:
                raise Killed

    with pytest.raises(Killed):
        paperlib.reconstruct(model, theta, len(X), callback=kill, **options)
    record = paperlib.reconstruct(model, theta, len(X), **options)
    assert steps[0] == len(X) - 1
    assert len(begun) == 1  # what came before the exchanges is not done again
    assert record.explained and compare(X, record.samples).recovered() == len(X)
    assert sum(stage["ended"] == "interrupted" for stage in record.stages) == 1


def test_only_near_the_law_are_candidates_exchanged():
    model, theta, X, start = stuck_problem(0)
    far = RandomFeatures(model.d, 4 * X.numel(), "relu", seed=0, dtype=DOUBLE)
    for chosen, start, exchanges in (
        (model, "auto", True),
        (model, "random", False),
        (far, "auto", False),
        (far, "messages", True),
    ):
        parameters = torch.ones(1, len(X), dtype=DOUBLE) @ chosen.features(X)
        seen = []

        def note(solver, point, restart, since, seen=seen):
            seen.append(restart)
            return point

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Attempts, "_exchanged", note)
            paperlib.reconstruct(
                chosen, parameters, len(X), start=start, restarts=1, max_steps=2, progress=False
            )
        assert bool(seen) == exchanges, (start, exchanges)
