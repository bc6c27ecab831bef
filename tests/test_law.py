"""One cell of the law against closed forms, and its place in a sweep."""

import math

import pytest
import torch

from paperlib import RandomFeatures, fit_min_norm, sphere, sweep
from paperlib.experiments.law import (
    ATTACK_RESULTS,
    check_law_cell,
    least_squares_loss,
    run_law_cell,
    training_loss,
)


def test_many_parameters_give_the_data_back():
    cell = run_law_cell(5, 20, 10.0)
    assert cell["p"] == 1000
    assert cell["training_loss"] < 1e-9
    assert cell["recovered"] == 5 and cell["explained"]
    assert cell["signed_error"] < 1e-3
    assert cell["published_error"] <= cell["up_to_sign_error"] <= cell["signed_error"]


def test_few_parameters_fit_the_labels_and_not_the_data():
    cell = run_law_cell(5, 20, 0.1)
    assert cell["training_loss"] < 1e-9
    assert cell["recovered"] == 0
    assert cell["signed_error"] > 0.5


def test_fewer_parameters_than_samples_leave_a_training_loss_and_no_attack():
    cell = run_law_cell(20, 10, 0.05)
    assert cell["p"] == 10
    assert 0.01 < cell["training_loss"] < 1
    assert {cell[name] for name in ATTACK_RESULTS} == {None}


def test_least_squares_loss_is_that_of_the_normal_equations():
    data = sphere(30, 10, seed=3)
    model = RandomFeatures(10, 7, "gelu", seed=3, dtype=torch.float64)
    X, y = data.X.double(), data.y.double()
    F = model.features(X)
    theta = torch.linalg.solve(F.T @ F, F.T @ y)
    expected = ((F @ theta - y).square().mean() / y.square().mean()).item()
    assert least_squares_loss(model, X, y) == pytest.approx(expected, rel=1e-9)


def test_least_squares_with_a_feature_that_is_zero_on_all_samples():
    data = sphere(3, 4, seed=0)
    model = RandomFeatures(4, 2, "relu", seed=next(_seeds_with_a_dead_feature(data.X)))
    assert math.isfinite(least_squares_loss(model, data.X, data.y))


def _seeds_with_a_dead_feature(X):
    for seed in range(1000):
        if (RandomFeatures(4, 2, "relu", seed=seed).features(X) == 0).all(dim=0).any():
            yield seed


def test_training_loss_is_one_for_a_model_that_says_nothing():
    data = sphere(8, 6, seed=1)
    model = RandomFeatures(6, 50, "relu", seed=1)
    theta = fit_min_norm(model, data.X, data.y)
    assert training_loss(model, 0 * theta, data.X, data.y) == pytest.approx(1)
    assert training_loss(model, theta, data.X, data.y) < 1e-9


def test_the_same_cell_gives_the_same_numbers():
    first, second = run_law_cell(4, 12, 4.0, seed=2), run_law_cell(4, 12, 4.0, seed=2)
    for timed in (first, second):
        del timed["attack_seconds"]
    assert first == second
    assert run_law_cell(4, 12, 4.0, seed=3)["projection_loss"] != first["projection_loss"]


def test_both_solvers_in_a_sweep(tmp_path):
    solvers = ("levenberg-marquardt", "published")
    grid = [{"n": 3, "d": 8, "p_over_dn": 5, "solver": name, "max_steps": 20} for name in solvers]
    grid.append({"n": 30, "d": 8, "p_over_dn": 0.1})
    options = {"store": tmp_path, "check": check_law_cell, "client": False, "progress": False}
    table = sweep(run_law_cell, grid, **options)
    assert list(table.status) == ["ok"] * 3
    assert list(table.recovered.isna()) == [False, False, True]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n must"),
        ({"d": 0}, "d must"),
        ({"p_over_dn": -1.0}, "p_over_dn"),
        ({"activation": "step"}, "activation must be one of"),
        ({"solver": "adam"}, "solver must be one of"),
        ({"device": "abacus"}, "device must be"),
        ({"seed": -1}, "seed"),
    ],
)
def test_a_cell_without_sense_is_refused_before_anything_runs(tmp_path, wrong, message):
    grid = [{"n": 3, "d": 8, "p_over_dn": 5.0, **wrong}]
    with pytest.raises(ValueError, match=message):
        sweep(run_law_cell, grid, store=tmp_path, check=check_law_cell, client=False)
