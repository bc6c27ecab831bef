"""Taking superfluous candidates out where several share a sample; and when restarts agree."""

import math
import weakref

import pytest
import torch
from stage_by_stage import second_order_solver, with_outcomes

from paperlib import RandomFeatures, sphere
from paperlib.attempts import Attempt
from paperlib.elimination import eliminate
from paperlib.levenberg_marquardt import Damping
from paperlib.message_passing import Beliefs
from paperlib.record import conclude
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
    point = solver._impatient_finish(best.X, best.loss, 0)
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
    begun = solver._evaluate(X, lifted=True, exact=False)
    point = solver._impatient_finish(begun.X, begun.loss, 0)
    monkeypatch.setattr(solver, "_reseed", lambda point, *rest: point)
    (gave_up,) = steps_of(solver, "finish")
    assert solver._concluded(point, 0).X is point.X  # of an attempt that never gave up
    found = solver._concluded(point, 0, gave_up=True)
    assert gave_up <= 3 and steps_of(solver, "finish")[1] > 2 * gave_up
    assert solver.tolerance < found.loss <= point.loss


def ten_samples(**options):
    """A solver for p = 3 d n, where searches come first and messages later; and the data."""
    X = sphere(10, 100, 0).X
    model = RandomFeatures(100, 3000, "relu")
    return second_order_solver(model, torch.ones(1, 10) @ model.features(X), 10, **options), X


def test_searches_and_messages_that_miss_the_same_sample_do_not_end_the_attack(monkeypatch):
    """They begin in the same directions, so that nine of ten alike prove nothing."""
    solver, X = ten_samples(restarts=5)

    def outcome(kind, k):
        others = sphere(10, 100, seed=k + 1).X
        return others if kind == "random" else torch.cat([X[:9], others[:1]]), 2e-3

    made = with_outcomes(solver, monkeypatch, outcome)
    best = solver.solve()
    assert made == ["search", "search", "messages", "random", "messages"] and not best.agreed


def test_every_second_start_by_messages_has_free_lengths(monkeypatch):
    solver, X = ten_samples()
    seen = []

    class Passing:
        def __init__(self, *problem, **options):
            pass

        def begin(self):
            pass

        def run(self, iterations, *, on_sphere: bool, on_step):
            seen.append(on_sphere)
            return Beliefs(X, torch.zeros(10), torch.ones(10, 1), 0.1, 1, "narrow")

        def forget_scores(self):
            pass

    monkeypatch.setattr("paperlib.attempts.MessagePassing", Passing)
    monkeypatch.setattr(solver, "_settle", lambda X, restart: None)
    monkeypatch.setattr(solver, "_concluded", lambda point, restart: None)
    for restart in (1, 3, 5):  # the others are not made by messages
        solver._attempt_by_messages(restart, None)
    assert seen == [True, False, True]


@pytest.mark.parametrize("few", [N - 1, N])
def test_v_t_v_is_given_up_before_it_is_made_in_float32(monkeypatch, few):
    monkeypatch.setattr("paperlib.attempts.FEW_SAMPLES", few)
    X = sphere(N, D, 0).X
    model = RandomFeatures(D, 20 * D * N, "relu")
    theta = torch.ones(1, N) @ model.features(X)
    solver = second_order_solver(model, theta, N, lift=True, bulk="bfloat16")
    near = to_sphere(X + 0.01 * sphere(N, D, 1).X)
    left = solver._evaluate(near, lifted=False, exact=True)
    assert solver.tolerance < left.loss <= 1e-3
    first, alive, make = weakref.ref(solver.lift), [], solver._make_lift
    rounds = [lambda *_: solver._evaluate(near, lifted=True, exact=False)] * 2
    monkeypatch.setattr(solver, "_rounds", lambda *_: rounds.pop()())
    monkeypatch.setattr(solver, "_impatient_finish", lambda *_: left)
    monkeypatch.setattr(solver, "_concluded", lambda point, *_, **__: point)

    def made_anew():
        alive.append(first() is not None)
        return make()

    monkeypatch.setattr(solver, "_make_lift", made_anew)
    solver._attempt_in_subspaces(0)
    assert alive == [False] and solver.bulk == torch.float32


def test_an_attack_cut_off_in_an_exchange_remembers_how_many_gained_nothing(monkeypatch):
    solver, X = ten_samples()
    point = solver._evaluate(X, lifted=False, exact=True)
    trial = {"X": X, "loss": 1e-4, "since": 17}
    state = {"X": X[:9], "restart": 0, "cut off": {"stage": "exchange"}, "fallback": trial}
    seen = {}
    monkeypatch.setattr(solver, "_evaluate", lambda X, **_: point)

    def exchanged(point, restart, since):
        seen.update(since=since)
        return point

    monkeypatch.setattr(solver, "_exchanged", exchanged)
    monkeypatch.setattr(solver, "_reseed", lambda point, *_: point)
    solver.exchanges = True
    solver.damping = Damping(start=500.0)  # of the descent that was cut off, which is not taken up
    solver._go_on(state, searched=False)
    assert seen == {"since": 17} and solver.damping == Damping()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_lift_that_is_cut_off_leaves_no_plan_on_the_model(monkeypatch, error):
    def cut_off(*problem, **options):
        assert not model.keeps(torch.float64)
        raise error

    X = sphere(N, D, 0).X
    model = RandomFeatures(D, 20 * D * N, "relu", seed=0)
    theta = torch.ones(1, N) @ model.features(X)
    monkeypatch.setattr("paperlib.second_order.Lift", cut_off)
    with pytest.raises(error):
        second_order_solver(model, theta, N, lift=True)
    assert model.keeps(torch.float64)


@pytest.mark.parametrize("losses", [(math.nan, 0.3), (0.3, math.nan)])
def test_a_loss_that_is_no_number_is_never_the_best(monkeypatch, losses):
    solver, X = attempts(tiny=1.0, seed=0)
    solver.restarts, solver.searches, solver.messages = 2, False, False
    outcomes = iter(losses)
    attempt = lambda *_: Attempt(X, next(outcomes), 0, [])  # noqa: E731
    monkeypatch.setattr(solver, "_attempt", attempt)
    assert solver.solve().loss == 0.3
    for agreed in (True, False):
        said = conclude(math.nan, 1e-6, identifiable=True, agreed=agreed)
        assert said.startswith("not explained")
