"""Taking superfluous candidates out where several share a sample; and when restarts agree."""

import pytest
import torch
from stage_by_stage import second_order_solver

from paperlib import RandomFeatures, sphere
from paperlib.attempts import Attempt
from paperlib.elimination import eliminate
from paperlib.sphere import to_sphere

N, D = 4, 20


def attempts(*, tiny, seed):
    """A solver, and the data of which the last sample has the coefficient `tiny`."""
    X = sphere(N, D, seed, dtype=torch.float64).X
    model = RandomFeatures(D, 20 * D * N, "relu", seed=seed, dtype=torch.float64)
    alpha = torch.tensor([[1.0, 1.0, 1.0, tiny]], dtype=torch.float64)
    solver = second_order_solver(model, alpha @ model.features(X), N, lift=True)
    return solver, X


def shared(X, *, seed):
    """The samples, the first of them twice, each time a little beside it."""
    generator = torch.Generator().manual_seed(70 + seed)
    aside = 0.03 * torch.randn(1, D, generator=generator, dtype=torch.float64)
    return to_sphere(torch.cat([X[:1] + aside, X[:1] - aside, X[1:]]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tiny", [1e-2, 1e-3])
def test_a_sample_with_a_tiny_coefficient_outlasts_candidates_that_share_one(tiny, seed):
    solver, X = attempts(tiny=tiny, seed=seed)
    point = solver._evaluate(shared(X, seed=seed), lifted=True, exact=False)
    plain = eliminate(point, N).kept
    assert plain.tolist() == [0, 1, 2, 3]  # the tiny one is gone: this is the case
    found = solver._thinned(point, point.X[plain], 0)
    assert found.shape == (N, D)
    cosines = (found @ X.T / D).abs().amax(0)
    assert cosines.min() > 0.99, cosines
    assert solver._evaluate(found, lifted=True, exact=True).loss < 1e-8
    assert {stage["stage"] for stage in solver.stages} == {"lift", "eliminate"}


def test_what_elimination_leaves_is_kept_where_nothing_explains_the_parameters():
    solver, X = attempts(tiny=1.0, seed=0)
    candidates = shared(X, seed=0)[:-1]  # one sample is missing altogether
    extra = sphere(2, D, 9, dtype=torch.float64).X
    solver.max_steps = 2
    point = solver._evaluate(torch.cat([candidates, extra]), lifted=True, exact=False)
    plain = point.X[eliminate(point, N).kept]
    assert torch.equal(solver._thinned(point, plain, 0), plain)


@pytest.mark.parametrize(
    ("losses", "agreed"), [((0.01, 0.02, 0.02, 0.02), False), ((0.02, 0.02, 0.01), True)]
)
def test_restarts_that_agree_say_nothing_of_another_result(monkeypatch, losses, agreed):
    """The best stands alone in the first case: the others found the same, but worse."""
    solver, X = attempts(tiny=1.0, seed=0)
    solver.restarts, solver.messages, solver.searches = len(losses), False, False
    alone = sphere(N, D, seed=7, dtype=torch.float64).X
    found = [X if agreed or k else alone for k in range(len(losses))]
    outcomes = iter(zip(found, losses, strict=True))
    monkeypatch.setattr(solver, "_attempt", lambda start, k: Attempt(*next(outcomes), k))
    best = solver.solve()
    assert best.loss == min(losses) and best.agreed == agreed


def steps_of(solver, stage):
    """How many steps each stage of that name has taken, in order."""
    steps = [record["step"] for record in solver.history if record["stage"] == stage]
    return [k for k, after in zip(steps, [*steps[1:], 1], strict=True) if after == 1]


@pytest.mark.parametrize("seed", range(3))
def test_a_finish_that_misses_a_sample_gives_up_soon_and_looks_for_it(seed):
    solver, X = attempts(tiny=0.01, seed=seed)
    best = solver._evaluate(shared(X, seed=seed)[:-1], lifted=True, exact=False)
    point = solver._impatient_finish(best, 0)
    assert point.loss > solver.tolerance and len(solver.history) <= 10
    found = solver._concluded(point, 0, gave_up=True)
    assert found.loss <= solver.tolerance
    assert (found.X @ X.T / D).abs().amax(0).min() > 0.99
    early = [stage["ended"] for stage in solver.stages if stage["stage"] == "refine"]
    assert early[0] == "stalled"


def test_a_finish_that_gave_up_goes_on_where_no_sample_is_missing(monkeypatch):
    """Noise is not explained by more candidates; the best fit to it takes all its steps."""
    solver, X = attempts(tiny=1.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(solver.theta.shape, generator=generator, dtype=torch.float64)
    noise *= 0.01 * solver.theta.norm() / noise.norm()
    solver = second_order_solver(solver.model, solver.theta + noise, N, lift=True)
    point = solver._impatient_finish(solver._evaluate(X, lifted=True, exact=False), 0)
    monkeypatch.setattr(solver, "_reseed", lambda point, *rest: point)
    (gave_up,) = steps_of(solver, "finish")
    assert solver._concluded(point, 0).X is point.X  # of an attempt that never gave up
    found = solver._concluded(point, 0, gave_up=True)
    assert gave_up <= 3 and steps_of(solver, "finish")[1] > 2 * gave_up
    assert solver.tolerance < found.loss <= point.loss
