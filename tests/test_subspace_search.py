"""Outlying directions against a dense eigendecomposition, and searches among them."""

import math

import pytest
import torch
from stage_by_stage import kept_bytes, second_order_solver, with_outcomes

from paperlib import (
    ModuleFeatures,
    RandomFeatures,
    compare,
    fit_min_norm,
    reconstruct,
    sphere,
    subspace_search,
)
from paperlib.activations import Activation
from paperlib.elimination import doubtful_candidates
from paperlib.given_features import GivenFeatures
from paperlib.levenberg_marquardt import levenberg_marquardt
from paperlib.lift import Lift
from paperlib.outlying_directions import (
    BEYOND,
    SecondMoment,
    krylov_space,
    outlying_directions,
)
from paperlib.precision import SETTLED
from paperlib.projection import Linearization
from paperlib.remainder import left_by
from paperlib.sphere import random_on_sphere
from paperlib.subspace import SubspaceFeatures
from paperlib.subspace_search import (
    SampledSubspace,
    SubspaceSearch,
    independent_columns,
    search_bytes,
    search_pays,
)

# Without a linear part there is nothing to lift.
EVEN = Activation("magnitude", torch.abs, torch.sign)


def problem(n=5, d=30, ratio=5.0, name="relu", seed=0, C=1, dtype=torch.float64, **options):
    model = RandomFeatures(
        d, round(ratio * d * n), name, seed=seed, dtype=dtype, block_rows=1024, **options
    )
    data = sphere(n, d, seed, dtype=dtype)
    generator = torch.Generator().manual_seed(500 + seed)
    labels = torch.randn(n, C, generator=generator, dtype=torch.float64).to(dtype)
    return model, fit_min_norm(model, data.X, labels), data


def error(found, exact):
    return float((found - exact).norm() / exact.norm())


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def search_of(model, theta, n, *, lift, **options):
    options = {"dtype": model.dtype, "forcing": 0.2} | options
    return SubspaceSearch(
        model,
        lift.theta if lift else theta,
        n,
        candidates=math.ceil(1.4 * n),
        lift=lift,
        generator=generator(),
        **options,
    )


def dense_moments(model, Y):
    V, rest = model.V, Y - Y.mean(1, keepdim=True)
    return torch.stack([(V.T * row) @ V for row in rest]) * model.d / model.p


# Outlying directions


@pytest.mark.parametrize("d", [40, 200])
@pytest.mark.parametrize("C", [1, 3])
def test_outlying_directions_are_the_eigenvectors_beyond_the_edge(C, d):
    # In 40 dimensions all directions are formed, in 200 a Krylov space of at most 128.
    model, theta, _ = problem(4, d, 12.0, C=C)
    Y = Lift(model, theta, dtype=model.dtype).theta
    found, passes = outlying_directions(model, Y, most=20, dtype=model.dtype, generator=generator())
    M = dense_moments(model, Y)
    values, vectors = torch.linalg.eigh(torch.einsum("cij,cjk->ik", M, M))
    variance = float((Y - Y.mean(1, keepdim=True)).square().mean()) * model.d / model.p
    edge = C * variance * (1 + C**-0.5) ** 2
    if C == 1 or d == 40:
        assert len(found) == int((values > BEYOND**2 * edge).sum()) >= 2
    else:
        # The noise of outputs that share few samples is not independent: the edge lies within
        # the bulk of the spectrum, where no few products tell eigenvectors apart.
        found = found[: int((values > 1.5**2 * edge).sum())]
        assert len(found) == 4
    assert passes > 0
    torch.testing.assert_close(found @ found.T, torch.eye(len(found), dtype=found.dtype))
    overlaps = (found @ vectors[:, -len(found) :].flip(1)).diagonal().abs()
    assert overlaps.min() > 0.99, overlaps


def test_outlying_directions_in_fewer_digits_are_the_same():
    model, theta, _ = problem(4, 200, 12.0, dtype=torch.float32)
    Y = Lift(model, theta, dtype=model.dtype).theta
    exact, *others = (
        outlying_directions(model, Y, most=8, dtype=dtype, generator=generator())[0]
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
    )
    for found in others:
        assert found.shape == exact.shape and len(exact) >= 2
        assert float(torch.linalg.svdvals(found @ exact.T).min()) > 0.999


def test_second_moments_in_8_bits_are_as_sharp_as_v_is_in_them():
    model, theta, _ = problem(4, 200, 12.0, dtype=torch.float32)
    Y = Lift(model, theta, dtype=model.dtype).theta
    Q = torch.linalg.qr(torch.randn(200, 20, generator=generator())).Q.T.contiguous()
    exact = SecondMoment(model, Y, dtype=torch.float32)(Q)
    # Rounding the products with Y to 8 bits as well makes it 1.7%.
    assert 0.005 < error(SecondMoment(model, Y, dtype=torch.int8)(Q), exact) < 0.013


def test_noise_has_no_outlying_direction_but_one_is_given():
    model = RandomFeatures(200, 40_000, dtype=torch.float64)
    Y = torch.randn(1, 40_000, generator=generator(), dtype=torch.float64)
    found, _ = outlying_directions(model, Y, most=20, dtype=model.dtype, generator=generator())
    assert found.shape == (1, 200)
    assert float(found.norm()) == pytest.approx(1)


def test_no_more_directions_than_asked_for_and_the_strongest_first():
    model, theta, _ = problem(4, 40, 12.0)
    Y = Lift(model, theta, dtype=model.dtype).theta
    arguments = {"dtype": model.dtype, "generator": generator()}
    found, _ = outlying_directions(model, Y, most=20, **arguments)
    at_most, _ = outlying_directions(model, Y, most=2, **arguments)
    assert len(found) > len(at_most) == 2
    overlaps = (found[:2] @ at_most.T).diagonal().abs()
    assert overlaps.min() > 0.999, overlaps


def test_a_krylov_space_stays_orthonormal_where_the_operator_adds_nothing_new():
    def rank_one(Q):
        return Q[:, :1] @ torch.eye(1, 60).to(Q)

    like = torch.zeros(1, dtype=torch.float64)
    basis, images = krylov_space(rank_one, (4, 60), 5, generator=generator(), like=like)
    assert basis.shape == images.shape == (20, 60)
    torch.testing.assert_close(basis @ basis.T, torch.eye(20).double())
    torch.testing.assert_close(images, rank_one(basis))
    # e_1 lies in the space.
    assert float(basis[:, 0].norm()) == pytest.approx(1, abs=1e-12)


# The sample of the features


def test_sampled_features_are_the_first_of_the_subspace():
    model, theta, data = problem(4, 20, 40.0)
    basis = torch.randn(20, 3, generator=generator(), dtype=torch.float64)
    whole, sample = SubspaceFeatures(model, basis), SampledSubspace(model, basis, 1500)
    assert sample.p == sample.rows == 1500 < whole.p
    Z = random_on_sphere(5, 3, generator=generator()).double()
    given = GivenFeatures(torch.cat([V for _, V in whole.weight_blocks()])[:1500], "relu")
    expected = Linearization(given, theta[:, :1500], Z)
    assert Linearization(sample, theta, Z).loss == pytest.approx(expected.loss, rel=1e-10)
    assert SampledSubspace(model, basis, 10**9).p == model.p


def test_streamed_features_are_drawn_only_as_far_as_they_are_sampled(monkeypatch):
    model = problem(4, 20, 100.0, placement="streamed")[0]
    drawn, draw = [], RandomFeatures.draw

    def watched(self, start, stop, **memory):
        drawn.append(start)
        return draw(self, start, stop, **memory)

    monkeypatch.setattr(RandomFeatures, "draw", watched)
    list(SampledSubspace(model, torch.eye(20).double()[:, :3], 1500).blocks())
    assert drawn == [0, 1024]


def test_independent_columns_span_the_rows_and_nothing_else():
    rows = torch.randn(3, 10, generator=generator(), dtype=torch.float64)
    rows = torch.cat([rows, 1e3 * rows[:1] + 2 * rows[1:2]])
    basis = independent_columns(rows)
    assert basis.shape == (10, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3).double())
    torch.testing.assert_close(rows @ basis @ basis.T, rows)


# The search


def test_first_candidates_lie_near_the_samples():
    model, theta, data = problem(5, 60, 10.0)
    X = search_of(model, theta, 5, lift=Lift(model, theta, dtype=model.dtype)).first()
    assert X.shape == data.X.shape
    torch.testing.assert_close(X.norm(dim=1), data.X.norm(dim=1))
    cosines = (X @ data.X.T / 60).abs().amax(0)
    anywhere = random_on_sphere(5, 60, generator=generator(99)).double()
    chance = (anywhere @ data.X.T / 60).abs().amax(0)
    assert cosines.mean() > 0.6 > chance.mean()


@pytest.mark.parametrize("lifted", [True, False])
def test_a_missing_sample_is_found_from_what_the_others_leave(lifted):
    model, theta, data = problem(5, 40, 8.0, name="relu" if lifted else EVEN)
    lift = Lift(model, theta, dtype=model.dtype) if lifted else None
    X = data.X.clone()
    X[2] = random_on_sphere(1, 40, generator=generator(3)).double()
    point = Linearization(model, lift.theta if lift else theta, X, lift=lift, curvature=True)
    search = search_of(model, theta, 5, lift=lift)
    found = search.next(point)
    missing = data.X[2]
    before = float((X @ missing / 40).abs().max())
    assert float((found @ missing / 40).abs().max()) > 0.9 > before
    assert search.passes > 0


def test_directions_are_sought_in_what_the_sure_candidates_leave(monkeypatch):
    model, theta, data = problem(5, 40, 8.0)
    lift = Lift(model, theta, dtype=model.dtype)
    faintest = int(Linearization(model, lift.theta, data.X, lift=lift).alpha.abs().argmin())
    X = data.X.clone()
    X[faintest] = random_on_sphere(1, 40, generator=generator(3)).double()
    point = Linearization(model, lift.theta, X, lift=lift, curvature=True)
    sure = ~doubtful_candidates(point)
    assert 0 < sure.sum() < 5 and not sure[faintest]
    search, asked = search_of(model, theta, 5, lift=lift), []
    sought = search._outlying
    monkeypatch.setattr(search, "_outlying", lambda Y: asked.append(Y) or sought(Y))
    search.next(point)
    assert [Y.tolist() for Y in asked] == [left_by(point, sure).residual.tolist()]


def test_candidates_that_explain_nothing_are_no_obstacle():
    model, theta, data = problem(3, 40, 10.0)
    lift = Lift(model, theta, dtype=model.dtype)
    X = random_on_sphere(3, 40, generator=generator(3)).double()
    point = Linearization(model, lift.theta, X, lift=lift, curvature=True)
    found = search_of(model, theta, 3, lift=lift).next(point)
    assert (found @ data.X.T / 40).abs().amax(0).mean() > 0.6


# As a start of the default solver


@pytest.mark.parametrize(("n", "d", "ratio", "C"), [(1, 20, 10, 1), (6, 50, 5, 1), (6, 50, 1, 5)])
@pytest.mark.parametrize("name", ["relu", "relu+tanh", "gelu"])
def test_all_samples_come_back(n, d, ratio, C, name):
    model, theta, data = problem(n, d, ratio, name, C=C, dtype=torch.float32)
    found = reconstruct(model, theta, n, start="subspace", progress=False)
    assert found.explained
    assert compare(data.X, found.samples).signed.max() < 1e-3
    stages = [stage["stage"] for stage in found.stages]
    assert stages[:3] == ["lift", "search in a subspace", "bulk"]
    assert found.options["start"] == "subspace"
    assert len(found.elimination_losses) == n + 1


@pytest.mark.parametrize("bulk", ["float32", "bfloat16", "int8"])
def test_directions_are_searched_for_in_the_format_of_the_products(bulk, monkeypatch):
    model, theta, data = problem(4, 60, 5.0, dtype=torch.float32)
    formats = set()
    search = subspace_search.outlying_directions

    def watched(*arguments, dtype, **options):
        formats.add(dtype)
        return search(*arguments, dtype=dtype, **options)

    monkeypatch.setattr(subspace_search, "outlying_directions", watched)
    found = reconstruct(model, theta, 4, start="subspace", bulk=bulk, progress=False)
    assert formats == {getattr(torch, bulk)}
    searches = [stage for stage in found.stages if stage["stage"] == "search in a subspace"]
    assert {(stage["dtype"], stage["products"]) for stage in searches} == {("float32", bulk)}
    assert found.explained
    assert compare(data.X, found.samples).signed.max() < 1e-3


def test_the_first_start_finds_what_random_starts_need_more_work_for():
    passes = {"auto": 0, "random": 0}
    for seed in range(4):
        model, theta, data = problem(8, 120, 4.0, seed=seed, dtype=torch.float32)
        for start in passes:
            found = reconstruct(model, theta, 8, start=start, seed=seed, progress=False)
            passes[start] += found.passes
            if start == "auto":
                assert found.explained and found.restart == 0
                assert compare(data.X, found.samples).signed.max() < 1e-3
    assert passes["auto"] < 0.7 * passes["random"], passes


@pytest.mark.parametrize(("n", "d", "searched"), [(4, 60, True), (30, 30, False)])
def test_a_search_as_large_as_the_whole_problem_is_not_made(n, d, searched):
    model, theta, _ = problem(n, d, 4.0, dtype=torch.float32)
    assert search_pays(model, n, math.ceil(1.4 * n), 1) == searched
    found = reconstruct(model, theta, n, max_steps=1, restarts=1, progress=False)
    assert ("search in a subspace" in {stage["stage"] for stage in found.stages}) == searched


def test_block_height_and_placement_change_nothing_but_rounding():
    model, theta, data = problem(5, 40, 6.0)
    found = reconstruct(model, theta, 5, start="subspace", progress=False)
    for options in ({"block_rows": 2048}, {"placement": "streamed"}):
        options = {"block_rows": 1024} | options
        other = RandomFeatures(40, model.p, dtype=torch.float64, **options)
        again = reconstruct(other, theta, 5, start="subspace", progress=False)
        assert compare(found.samples, again.samples).signed.max() < 1e-8


def test_rounding_ends_the_rounds():
    """In bfloat16 the loss cannot fall to the level that ends them, and more would be in vain."""
    model, theta, data = problem(6, 50, 6.0, dtype=torch.float32)
    found = reconstruct(model, theta, 6, start="subspace", bulk="bfloat16", progress=False)
    assert compare(data.X, found.samples).signed.max() < 1e-3
    ended = [stage["ended"] for stage in found.stages if stage["stage"] == "bulk"]
    assert ended[-1] == "precision floor"
    assert ended.count("precision floor") == 1


@pytest.mark.parametrize("seed", [1, 3])
def test_what_bfloat16_cannot_see_is_searched_in_float32(faint_pair, monkeypatch, seed):
    # Where bfloat16 ends differs from processor to processor: well below it.
    model, X, theta = faint_pair(seed, weights=(0.015, -0.015))
    kept = set()

    def watched(*problem, keep, **options):
        kept.add(keep)
        return Linearization(*problem, keep=keep, **options)

    monkeypatch.setattr("paperlib.stages.Linearization", watched)
    options = {"start": "subspace", "restarts": 1, "seed": seed, "progress": False}
    found = reconstruct(model, theta, 8, bulk="bfloat16", keep="nothing", **options)
    assert kept == {"nothing"}  # as asked for, in both formats
    assert found.explained and compare(X, found.samples).signed.max() < 1e-3
    lifts = [stage["dtype"] for stage in found.stages if stage["stage"] == "lift"]
    assert lifts == ["bfloat16", "float32"]
    assert not model.holds(torch.bfloat16)  # its copy of V made room


@pytest.mark.parametrize("seed", [0, 2])
def test_a_sample_missed_by_all_rounds_is_soon_sought_in_the_residual(faint_pair, seed):
    """A descent without it would go on for twenty steps in each stage."""
    model, X, theta = faint_pair(seed, weights=(0.3, 6e-5))
    options = {"start": "subspace", "restarts": 1, "seed": seed, "progress": False}
    found = reconstruct(model, theta, 8, bulk="bfloat16", **options)
    assert found.explained and compare(X, found.samples).signed.max() < 0.2
    assert "float32" in {stage["dtype"] for stage in found.stages if stage["stage"] == "lift"}
    steps = [step["stage"] for step in found.history]
    assert steps.count("refine") + steps.count("finish") < 45


@pytest.mark.parametrize("seed", [1, 3])
def test_with_many_samples_no_finish_tells_that_bfloat16_hides_some(faint_pair, monkeypatch, seed):
    monkeypatch.setattr("paperlib.attempts.FEW_SAMPLES", 7)
    model, X, theta = faint_pair(seed, weights=(0.015, -0.015))
    options = {"start": "subspace", "restarts": 1, "seed": seed, "progress": False}
    found = reconstruct(model, theta, 8, bulk="bfloat16", **options)
    assert found.explained and compare(X, found.samples).signed.max() < 1e-3
    stages = [(stage["stage"], stage["dtype"]) for stage in found.stages]
    begun = stages.index(("lift", "float32"))
    assert begun < stages.index(("bulk", "float32")) < stages.index(("finish", "float32"))


def test_of_many_samples_that_bfloat16_shows_the_finish_needs_no_more(monkeypatch):
    monkeypatch.setattr("paperlib.attempts.FEW_SAMPLES", 5)
    monkeypatch.setitem(SETTLED, torch.bfloat16, 1e-3)
    model, theta, data = problem(6, 50, 6.0, dtype=torch.float32)
    found = reconstruct(
        model, theta, 6, start="subspace", bulk="bfloat16", restarts=1, progress=False
    )
    assert compare(data.X, found.samples).signed.max() < 1e-3
    assert [stage["dtype"] for stage in found.stages if stage["stage"] == "lift"] == ["bfloat16"]


@pytest.mark.parametrize("few", [7, 8])
def test_where_float32_does_not_fit_the_finish_goes_on(faint_pair, monkeypatch, few):
    monkeypatch.setattr("paperlib.attempts.FEW_SAMPLES", few)
    model, _, theta = faint_pair(0)
    calls = []

    def full(*sizes, **options):
        calls.append(sizes)
        if len(calls) > 1:
            raise MemoryError("full")

    monkeypatch.setattr("paperlib.memory.check_memory", full)
    options = {"start": "subspace", "restarts": 1, "progress": False}
    found = reconstruct(model, theta, 8, bulk="bfloat16", **options)
    stages = [(stage["stage"], stage["dtype"]) for stage in found.stages]
    assert len(calls) >= 2 and ("lift", "float32") not in stages
    assert stages.count(("finish", "float32")) >= 2


@pytest.mark.parametrize(
    ("losses", "order"),
    [
        ((2e-3, 2e-3, 2e-3, 2e-3), ["search", "search", "messages", "random"]),
        ((1e-2, 2e-3, 1e-4, 1e-4), ["search", "search", "messages", "random"]),
        ((1e-4, 1e-5, 1e-6, 1e-7), ["search", "random", "random", "random"]),
    ],
)
def test_a_search_that_leads_nowhere_is_made_anew_before_any_other_start(
    monkeypatch, losses, order
):
    """Other starts follow it, or what lies beside samples that are nearly complete."""
    data = sphere(10, 100, 0)
    model = RandomFeatures(100, 3000, "relu")
    theta = fit_min_norm(model, data.X, data.y)
    solver = second_order_solver(model, theta, 10, restarts=len(losses))
    assert solver.searches and solver.messages and not solver.always_messages
    # No two are alike.
    outcomes = [(sphere(10, 100, k + 1).X, loss) for k, loss in enumerate(losses)]
    made = with_outcomes(solver, monkeypatch, lambda kind, k: outcomes[k])
    solver.solve()
    assert made == order


def test_near_the_threshold_the_start_is_made_by_messages():
    model, theta, _ = problem(4, 30, 2.0, dtype=torch.float32)
    stages = [s["stage"] for s in reconstruct(model, theta, 4, progress=False).stages]
    assert "message passing" in stages and "search in a subspace" not in stages


def test_what_cannot_be_searched_is_refused():
    linear = torch.nn.Sequential(torch.nn.Linear(10, 100), torch.nn.GELU())
    module = ModuleFeatures(linear, (10,))
    for model in (module, RandomFeatures(10, 400, "tanh")):
        theta = torch.randn(1, model.p, generator=generator())
        with pytest.raises(ValueError, match="start='subspace' needs a model with weights V"):
            reconstruct(model, theta, 2, start="subspace", progress=False)
    few = RandomFeatures(50, 80)
    with pytest.raises(ValueError, match="start='subspace' needs the lift"):
        reconstruct(few, torch.randn(1, 80, generator=generator()), 2, start="subspace")


# Memory


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize(("n", "d", "ratio"), [(6, 40, 4.0), (3, 200, 8.0)])
def test_a_search_takes_no_more_than_was_predicted(monkeypatch, n, d, ratio, C):
    # All features of the first model take part, not all of the second.
    model, theta, _ = problem(n, d, ratio, C=C)
    lift = Lift(model, theta, dtype=model.dtype)
    search, taken, sizes = search_of(model, theta, n, lift=lift), [], []

    def watched(evaluate, Z, **options):
        point = evaluate(Z)
        weights = sum(W.numel() * W.element_size() for _, W in point.model.weight_blocks())
        taken.append(2 * kept_bytes(point) + weights)
        sizes.append(point.model.p)
        return levenberg_marquardt(evaluate, Z, **options)

    monkeypatch.setattr("paperlib.subspace_search.levenberg_marquardt", watched)
    X = search.first()
    search.next(Linearization(model, lift.theta, X, lift=lift, curvature=True))
    predicted = search_bytes(model, n, search.candidates, C)
    assert (max(sizes) == model.p) == (d == 40)
    assert 0.3 * predicted < max(taken) <= predicted


@pytest.mark.parametrize("units", [True, False])
def test_large_searches_multiply_in_bfloat16_on_matrix_units(monkeypatch, units):
    monkeypatch.setattr("paperlib.precision.matrix_units", lambda device: units)
    model, theta, data = problem(6, 60, 6.0)
    lift = Lift(model, theta, dtype=model.dtype)
    formats = set()

    def watched(*arguments, **options):
        point = Linearization(*arguments, **options)
        formats.add((point.dtype, point.curvature_dtype))
        return point

    monkeypatch.setattr("paperlib.subspace_search.Linearization", watched)
    small = search_of(model, theta, 6, lift=lift).first()
    assert formats == {(model.dtype, model.dtype)}
    monkeypatch.setattr("paperlib.precision.WORTHWHILE", 0)
    large = search_of(model, theta, 6, lift=lift).first()
    assert ((model.dtype, torch.bfloat16) in formats) == units
    errors = [Linearization(model, lift.theta, X, lift=lift).loss for X in (small, large)]
    assert errors[1] < 1.5 * errors[0] < 1


@pytest.mark.parametrize(("start", "refused"), [("subspace", True), ("random", False)])
def test_a_run_whose_searches_would_not_fit_is_refused(monkeypatch, start, refused):
    model, theta, data = problem(3, 40, 5.0)
    monkeypatch.setattr("paperlib.second_order.search_bytes", lambda *sizes: 10**15)
    if refused:
        with pytest.raises(MemoryError, match="activations 1e\\+06 GB"):
            reconstruct(model, theta, 3, start=start, progress=False)
    else:
        assert reconstruct(model, theta, 3, start=start, progress=False).loss < 1e-3
