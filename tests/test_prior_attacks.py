"""The attacks on all layers: their losses against dense sums, what they find, what they refuse."""

import math

import pytest
import torch
from torch import nn

from paperlib import (
    GradientFeatures,
    TwoLayer,
    compare,
    first_layer_attack,
    fit_min_norm,
    kkt_attack,
    ntk_attack,
    sphere,
    sweep,
    train,
)
from paperlib.experiments import prior_attacks
from paperlib.experiments.prior_attacks import (
    ATTACKS,
    PRIORS,
    check_prior_attack_cell,
    effective_rank,
    make_arena,
    ranks,
    run_prior_attack_cell,
)
from paperlib.first_layer_attack import FirstLayer, Found
from paperlib.gradient_matching import (
    Matched,
    Settings,
    matching_loss,
    outside,
    record_of,
    sharpness_at,
)
from paperlib.identifiability import parameter_jacobian
from paperlib.kkt_attack import allowed, candidate_labels, signed_coefficients

D, N = 10, 3


def problem(activation="relu", width=40, outputs=1, seed=0, n=N):
    network = TwoLayer(D, width, outputs, activation=activation, seed=seed, dtype=torch.float64)
    features = GradientFeatures(network, D, weights=None if outputs == 1 else [1.0] * outputs)
    X = sphere(n, D, seed=seed, dtype=torch.float64).X
    y = torch.tensor([1.0, -1.0, 1.5, -0.7][:n], dtype=torch.float64)
    return network, features, X, fit_min_norm(features, X, y)


# The loss that tangent and margin share


def test_matching_loss_is_the_dense_one_and_zero_at_the_truth():
    _, features, X, theta = problem()
    Phi = features.features(X)
    A = torch.linalg.lstsq(Phi.T, theta.T).solution
    assert float(matching_loss(features, theta, X, A).detach()) < 1e-20
    B = torch.randn_like(A)
    dense = (theta[0] - B[:, 0] @ Phi).square().sum() / theta.square().sum()
    torch.testing.assert_close(matching_loss(features, theta, X, B), dense)


def test_box_penalty_and_annealing():
    X = torch.tensor([[0.5, 2.0], [-3.0, 0.0]])
    assert float(outside(X, (-1.0, 1.0))) == pytest.approx((1 + 2) / 2)
    assert sharpness_at((1.0, 100.0), 0.0) == 1.0
    assert sharpness_at((1.0, 100.0), 0.45) == pytest.approx(10.0)
    assert sharpness_at((1.0, 100.0), 1.0) == 100.0


def test_a_descent_that_diverges_ends_before_and_says_so():
    _, features, _, theta = problem()
    options = {"steps": 50, "multiplier_unit": 1e3, "restarts": 2, "progress": False}
    record = kkt_attack(features, theta, N, multiplier_rate=1e308, optimizer="sgd", **options)
    assert {stage["ended"] for stage in record.stages} == {"diverged"}
    assert record.passes == sum(stage["passes"] for stage in record.stages) < 2 * 2 * 50
    assert record.samples.isfinite().all() and record.coefficients.isfinite().all()
    assert record.status.startswith("not explained") and not record.explained
    assert record.options["restarts"] == 2 and record.options["labels"] == [1, -1, 1, -1, 1, -1]


def test_a_start_whose_loss_is_no_number_is_never_the_best():
    _, features, X, theta = problem()
    A = torch.ones(N, 1, dtype=torch.float64)
    found = [Matched(X, A, loss, [], 0.0, 1, "step limit") for loss in (math.nan, 0.5)]
    settings = Settings(1, 0.1, 0.1, "adam", None, None, 1.0)
    record = record_of(features, theta, N, found, {"tolerance": 1e-6}, settings, 0.0)
    assert record.loss == 0.5 and record.restart == 1


# Tangent


def test_ntk_attack_finds_the_data_of_a_smooth_network():
    _, features, X, theta = problem("gelu")
    record = ntk_attack(
        features,
        theta,
        N,
        steps=500,
        sharpness=None,
        learning_rate=0.05,
        restarts=2,
        tolerance=1e-5,
        progress=False,
    )
    assert record.loss < 1e-2 and compare(X, record.samples).recovered(0.2) >= 2
    torch.testing.assert_close(
        record.loss, float(matching_loss(features, theta, record.samples, record.coefficients))
    )
    assert record.options["attack"] == "ntk" and record.coefficients.shape == (N, 1)


def test_descent_lowers_the_loss_stays_on_the_sphere_and_repeats():
    _, features, _, theta = problem()
    runs = [ntk_attack(features, theta, N, steps=60, seed=4, progress=False) for _ in range(2)]
    other = ntk_attack(features, theta, N, steps=60, seed=5, progress=False)
    assert torch.equal(runs[0].samples, runs[1].samples)
    assert not torch.equal(runs[0].samples, other.samples)
    assert runs[0].history[-1]["loss"] < runs[0].history[0]["loss"]
    torch.testing.assert_close(runs[0].samples.norm(dim=1), torch.full((N,), D**0.5).double())
    assert runs[0].passes == 120 and "not explained" in runs[0].status


def test_neurons_that_are_off_at_all_samples_are_no_equations():
    _, features, X, theta = problem(n=1)
    told = int((theta != 0).sum())
    guess = (told + features.p) // 2 // D
    assert told < guess * D < features.p
    for attack in (ntk_attack, kkt_attack):
        options = {"steps": 1, "restarts": 1, "progress": False}
        assert not attack(features, theta, guess, **options).identifiable
        assert attack(features, theta, told // D - 1, **options).identifiable


# Margin


def test_coefficients_of_two_and_of_several_classes():
    ones = torch.ones(3, 1)
    labels = torch.tensor([1, -1, 1])
    assert signed_coefficients(ones, labels, 1)[:, 0].tolist() == [1, -1, 1]
    multipliers = torch.tensor([[5.0, 1.0, 2.0], [3.0, 5.0, 4.0]])
    A = signed_coefficients(multipliers, torch.tensor([0, 1]), 3)
    assert A.tolist() == [[3.0, -1.0, -2.0], [-3.0, 7.0, -4.0]]
    assert allowed(multipliers, torch.tensor([0, 1]), 3).tolist() == [[0, 1, 2], [3, 0, 4]]
    assert candidate_labels(None, 4, 1).tolist() == [1, -1, 1, -1]
    assert candidate_labels(None, 4, 3).tolist() == [0, 1, 2, 0]
    classes = candidate_labels(torch.tensor([0, 1], dtype=torch.int32), 2, 3)
    assert torch.equal(signed_coefficients(multipliers, classes, 3), A)


@pytest.mark.parametrize("outputs", [1, 3])
def test_kkt_attack_meets_the_conditions_at_a_point_that_has_them(outputs):
    # theta is made to be a sum with positive multipliers; candidates start from random points.
    network, features, X, _ = problem("gelu", outputs=outputs)
    labels = candidate_labels(None, N, outputs)
    multipliers = torch.tensor([[1.0], [0.6], [0.8]]).double().expand(N, outputs)
    A = signed_coefficients(multipliers, labels, outputs)
    theta = features.combine(X, A).detach()[None]
    record = kkt_attack(
        features,
        theta,
        N,
        labels=labels,
        candidates=N,
        steps=400,
        learning_rate=0.05,
        sharpness=None,
        progress=False,
    )
    assert record.loss < 0.1
    free = record.coefficients
    if outputs == 1:
        assert bool((free[:, 0] * labels > 0).all())
    else:
        own = free.gather(1, labels[:, None])
        assert bool((own > 0).all())
        torch.testing.assert_close(free.sum(1), torch.zeros(N).double(), atol=1e-9, rtol=0)


def test_least_multiplier_keeps_every_candidate_in_use():
    _, features, _, theta = problem()
    record = kkt_attack(
        features,
        theta,
        N,
        steps=200,
        least_multiplier=0.3,
        multiplier_weight=10.0,
        multiplier_rate=0.02,
        progress=False,
    )
    assert record.samples.shape == (2 * N, D)
    unit = record.options["multiplier_unit"]
    assert float((record.coefficients.abs() / unit).min()) > 0.2


# First layer


def test_delta_is_the_gradient_in_the_outputs_of_the_first_layer():
    network, features, X, theta = problem()
    layer = FirstLayer(features, theta, N)
    W1, w2 = network.body[0].weight.detach(), network.head.weight.detach()[0]
    expected = w2 * (X @ W1.T > 0)
    torch.testing.assert_close(layer.deltas(X) * layer.sizes, expected)
    assert float(layer.criterion(layer.deltas(X), []).max()) < 1e-14
    away = sphere(N, D, seed=9, dtype=torch.float64).X
    assert float(layer.criterion(layer.deltas(away), []).min()) > 1e-2
    torch.testing.assert_close(X @ layer.basis.T @ layer.basis, X)


def test_what_was_found_no_longer_attracts():
    _, features, X, theta = problem(width=200)
    layer = FirstLayer(features, theta, N)
    deltas = layer.deltas(X)
    found = [Found(X[0], deltas[0], 0.0)]
    assert float(layer.criterion(deltas[1:], found).max()) < 1e-12  # the others still count
    near = layer.deltas(X[:1] + 0.05 * X[1:2])
    assert 0 < float(layer.criterion(near, [])) < 0.1
    assert float(layer.criterion(near, found)) > 0.5
    assert layer.among(deltas[0], found) and not layer.among(deltas[1], found)


def test_first_layer_attack_finds_every_sample_and_their_number():
    _, features, X, theta = problem()
    record = first_layer_attack(features, theta, starts=12, steps=15, progress=False)
    assert record.explained and len(record.samples) == N
    assert compare(X, record.samples).recovered(1e-4) == N
    assert [stage["found"] for stage in record.stages][-1] == N


def test_the_criterion_is_zero_at_the_data_of_a_deeper_network_alone():
    torch.manual_seed(2)
    network = nn.Sequential(
        nn.Linear(D, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 1)
    ).double()
    features = GradientFeatures(network, D)
    X = sphere(N, D, seed=1, dtype=torch.float64).X
    layer = FirstLayer(features, fit_min_norm(features, X, torch.tensor([1.0, -1.0, 0.5])), N)
    assert float(layer.criterion(layer.deltas(X), []).max()) < 1e-14
    away = layer.random(50, torch.Generator().manual_seed(0))  # in the row space, off the data
    assert float(layer.criterion(layer.deltas(away), []).min()) > 1e-3


def test_the_move_of_the_first_layer_spans_the_data_along_gradient_descent():
    network, _, X, _ = problem()
    before = GradientFeatures(network, D)
    train(network, X, torch.tensor([1.0, -1.0, 1.0]), progress=False)
    move = before.flatten(network) - before.flatten(before.network)
    block = before.block_of(move, "body.0.weight")[0]
    basis = torch.linalg.qr(X.T).Q
    assert float((block - block @ basis @ basis.T).norm()) < 1e-10 * float(block.norm())


def test_what_is_not_found_is_filled_up():
    _, features, _, theta = problem()
    record = first_layer_attack(features, theta, N, starts=2, steps=1, rounds=1, polish=0)
    assert record.samples.shape == (N, D) and not record.explained


# The experiment


def test_effective_rank_and_the_jacobian():
    assert effective_rank(torch.ones(4)) == pytest.approx(4.0)
    assert effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1.0)
    _, features, X, theta = problem("gelu")
    alpha = torch.linalg.lstsq(features.features(X).T, theta.T).solution
    values = torch.linalg.svdvals(parameter_jacobian(features, X, alpha))
    assert ranks(features, theta, X)[1] == pytest.approx(effective_rank(values), rel=1e-6)


def arena_of(kind, counted="all layers"):
    arena = make_arena(kind, 2, 3.0, counted, "relu", 1, 0.1)
    network = TwoLayer(64, arena.last.p, seed=1)
    return arena, network, GradientFeatures(network, 64)


def test_the_linearised_arena_fits_the_labels_to_first_order():
    arena, network, features = arena_of("linearised")
    X, y = arena.data.X, arena.data.y
    fitted = network(X)[:, 0] + features.features(X) @ arena.theta[0]
    torch.testing.assert_close(fitted, y, rtol=1e-3, atol=1e-3)
    assert arena.training_loss < 1e-9
    torch.testing.assert_close(arena.last.features(X), network.body(X))
    torch.testing.assert_close(arena.last_theta, arena.theta[:, -arena.last.p :])


def test_the_arena_of_descent_shows_the_move_and_the_trained_body():
    arena, network, features = arena_of("descent")
    X, before = arena.data.X, features.flatten(network).clone()
    head = network.head.weight.detach().clone()
    run = train(network, X, arena.data.y, progress=False)
    torch.testing.assert_close(arena.theta, features.flatten(network) - before)
    torch.testing.assert_close(arena.last_theta, network.head.weight.detach() - head)
    torch.testing.assert_close(arena.last.features(X), network.body(X))
    torch.testing.assert_close(arena.features.features(X), features.features(X))
    assert arena.training_loss == run.loss


def test_the_arena_of_the_margin_shows_the_parameters_themselves():
    arena, _, _ = arena_of("margin")
    scores = arena.last.features(arena.data.X) @ arena.last_theta[0]
    assert bool((scores * arena.data.y > 10).all())  # far into the margin
    assert 0 < arena.training_loss <= 1e-10
    torch.testing.assert_close(arena.last_theta, arena.theta[:, -arena.last.p :])


@pytest.mark.parametrize("counted", ["all layers", "last layer"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_reports_what_it_was_made_on(attack, counted):
    options = {"counted": counted, "seed": 1, "budget": 4}
    cell = run_prior_attack_cell("linearised", attack, 2, 1.5, **options)
    width = {"all layers": 3, "last layer": 192}[counted]
    assert cell["width"] == width and cell["priors"] == PRIORS[attack]
    assert cell["parameters"] == (width if attack == "last layer" else 65 * width)
    assert cell["candidates"] == (4 if attack == "margin" else 2)
    # Gradients of all layers explain the move; the last layer's features explain its part.
    assert cell["residual_at_truth"] < 1e-9
    assert cell["passes"] > 0 and cell["products"] >= 2 * cell["passes"]
    assert cell["best_half"] <= cell["signed_error"] + 1e-6


@pytest.mark.parametrize(("attack", "name"), [("tangent", "ntk"), ("margin", "kkt")])
@pytest.mark.parametrize("box", [True, False])
def test_first_order_attacks_try_every_configuration_and_keep_the_best(
    monkeypatch, attack, name, box
):
    arena, _, _ = arena_of("linearised")
    function, made = getattr(prior_attacks, f"{name}_attack"), []

    def watched(*given, **options):
        made.append((options, function(*given, **options)))
        return made[-1][1]

    monkeypatch.setattr(prior_attacks, f"{name}_attack", watched)
    best, passes = prior_attacks.run_attack(arena, attack, budget=6, seed=2, box=box)
    tries = getattr(prior_attacks, f"{attack.upper()}_TRIES")
    assert [(o["learning_rate"], o["sharpness"]) for o, _ in made] == list(tries)
    X = arena.data.X
    for options, _ in made:
        assert options["steps"] == 3 and options["seed"] == 2
        assert options["box"] == ((float(X.min()), float(X.max())) if box else None)
    assert best.loss == min(record.loss for _, record in made)
    assert passes == sum(record.passes for _, record in made)


def test_cells_run_in_a_sweep(tmp_path):
    grid = [
        {"arena": arena, "attack": attack, "n": 2, "p_over_dn": 5.0, "budget": 40}
        for arena, attack in [("linearised", "first layer"), ("margin", "margin")]
    ]
    table = sweep(
        run_prior_attack_cell,
        grid,
        store=tmp_path,
        check=check_prior_attack_cell,
        client=False,
        progress=False,
    )
    assert list(table.status) == ["ok", "ok"], table.error.tolist()
    assert table.residual_at_truth[0] < 1e-9 and list(table.candidates) == [2, 4]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"arena": "ring"}, "arena must be one of linearised"),
        ({"attack": "brute"}, "attack must be one of last layer"),
        ({"counted": "first"}, "counted must be one of"),
        ({"n": 0}, "n must be at least 1"),
        ({"budget": 1}, "budget must be at least 2"),
        ({"start_scale": 0.0}, "start_scale must be above 0"),
    ],
)
def test_a_cell_without_sense_is_refused(tmp_path, wrong, message):
    grid = [{"arena": "margin", "attack": "margin", "n": 2, "p_over_dn": 5.0, **wrong}]
    with pytest.raises(ValueError, match=message):
        sweep(run_prior_attack_cell, grid, store=tmp_path, check=check_prior_attack_cell)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, t: ntk_attack(3, t, N), TypeError, "must be GradientFeatures, got int"),
        (lambda f, t: ntk_attack(f, t[:, 1:], N), ValueError, "theta must have shape"),
        (lambda f, t: ntk_attack(f, t, 0), ValueError, "n must be at least 1, got 0"),
        (lambda f, t: ntk_attack(f, t, N, steps=0), ValueError, "steps must be at least 1"),
        (lambda f, t: ntk_attack(f, t, N, optimizer="x"), ValueError, "optimizer must be one of"),
        (lambda f, t: ntk_attack(f, t, N, sharpness=3), ValueError, "None or two numbers, got 3"),
        (lambda f, t: ntk_attack(f, t, N, box=(1, 0)), ValueError, r"\(least, largest\)"),
        (lambda f, t: kkt_attack(f, t, N, labels=[1, -1]), ValueError, r"shape \(6,\), got \(2,\)"),
        (
            lambda f, t: kkt_attack(f, t, N, candidates=2, labels=torch.tensor([0, 1])),
            ValueError,
            "labels must be -1 or",
        ),
        (lambda f, t: kkt_attack(f, t, N, least_multiplier=-1.0), ValueError, "least_multiplier"),
        (lambda f, t: first_layer_attack(f, t, 10), ValueError, r"below min\(h, d\) = 10, got 10"),
        (lambda f, t: first_layer_attack(f, t, 5), ValueError, "at most the rank 3 .* got 5"),
        (lambda f, t: first_layer_attack(f, t, 3, starts=0), ValueError, "starts must be at"),
    ],
)
def test_bad_input(call, error, message):
    _, features, _, theta = problem()
    with pytest.raises(error, match=message):
        call(features, theta)


def test_networks_whose_first_layer_does_not_see_the_input_are_refused():
    network = nn.Sequential(nn.Tanh(), nn.Linear(D, 12), nn.Tanh(), nn.Linear(12, 1)).double()
    features = GradientFeatures(network, D)
    with pytest.raises(ValueError, match="must be nn.Linear on the whole input, d = 10"):
        first_layer_attack(features, torch.ones(1, features.p, dtype=torch.float64), 2)
    with pytest.raises(ValueError, match="no ReLU whose slope"):
        ntk_attack(features, torch.ones(1, features.p, dtype=torch.float64), 2)
