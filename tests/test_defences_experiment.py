"""The experiment on defences against its definitions."""

import math

import pytest
import torch

from paperlib import RandomFeatures, compare, digits, fit_min_norm, sweep
from paperlib.experiments.defences import (
    DEFENCES,
    accuracy_of,
    check_defence_cell,
    defend_and_attack,
    predicted_errors,
    private_options,
    released,
    run_defence_cell,
)
from paperlib.levenberg_marquardt import levenberg_marquardt
from paperlib.projection import Linearization, projection_loss

QUICK = {"n": 4, "p_over_dn": 12.0, "test": 50, "restarts": 2, "max_steps": 40}

STRENGTHS = {
    "none": 0.0,
    "noise": 0.1,
    "ridge": 10.0,
    "early stopping": 3,
    "checkpoint average": 3,
    "model average": 2,
    "pruning": 0.3,
    "quantisation": 4.0,
    "private": 1e4,
}


@pytest.fixture(scope="module")
def work():
    data = digits(6, labels="one-hot", dtype=torch.float64)
    model = RandomFeatures(64, 300, "relu+tanh", dtype=torch.float64)
    return model, data.X, data.y, fit_min_norm(model, data.X, data.y)


@pytest.mark.parametrize("defence", DEFENCES)
def test_which_defences_leave_theta_in_the_span(work, defence):
    model, X, Y, plain = work
    theta = released(defence, STRENGTHS[defence], model, X, Y, plain, seed=0)
    assert theta.shape == plain.shape
    off = float(projection_loss(model, theta, X))
    inside = defence in ("none", "ridge", "early stopping", "checkpoint average", "model average")
    assert off < 1e-12 if inside else off > 1e-4
    assert torch.equal(theta, plain) == (defence == "none")


def test_strengths_are_in_the_units_that_are_said(work):
    model, X, Y, plain = work
    noisy = released("noise", 0.5, model, X, Y, plain, seed=0)
    assert float((noisy - plain).norm() / plain.norm()) == pytest.approx(0.5, rel=0.05)
    pruned = released("pruning", 0.4, model, X, Y, plain, seed=0)
    gone = (pruned == 0).all(0)
    assert int(gone.sum()) == 120
    sizes = plain.norm(dim=0)
    assert float(sizes[gone].max()) <= float(sizes[~gone].min())
    Phi = model.features(X)
    shrunk = released("ridge", 2.0, model, X, Y, plain, seed=0)
    system = Phi @ Phi.T + 2.0 * Phi.square().sum() / 6 * torch.eye(6).double()
    torch.testing.assert_close(shrunk, torch.linalg.solve(system, Y).T @ Phi)


def test_pruned_features_are_left_out_of_the_attack():
    run = defend_and_attack("pruning", 0.25, **QUICK)
    assert run.model.p == round(0.75 * 12 * 64 * 4 / 10) == run.theta.shape[1]
    assert run.residual_at_truth < 1e-9
    assert compare(run.data.X[:4], run.record.samples).signed_error == run.errors.signed_error


def test_averaged_models_give_the_samples_of_both_away():
    cell = run_defence_cell("model average", 2, **QUICK | {"p_over_dn": 20.0})
    assert cell["samples"] == 8 and len(cell["errors"]) == 8
    assert cell["residual_at_truth"] < 1e-9 and cell["recovered"] >= 6


def test_the_predicted_error_is_that_of_least_squares():
    data = digits(3, labels="binary", dtype=torch.float64)
    model = RandomFeatures(64, 500, "relu+tanh", dtype=torch.float64)
    theta = fit_min_norm(model, data.X, data.y)
    sigma = 1e-3 * float(theta.norm()) / math.sqrt(500)
    predicted = predicted_errors(model, theta, data.X, sigma)
    squares = torch.zeros(3, dtype=torch.float64)
    for trial in range(20):
        generator = torch.Generator().manual_seed(trial)
        noise = sigma * torch.randn(theta.shape, generator=generator, dtype=torch.float64)
        run = levenberg_marquardt(
            lambda X, noisy=theta + noise: Linearization(model, noisy, X, curvature=True),
            data.X,
            target=0.0,
            max_steps=8,
        )
        squares += (run.point.X - data.X).square().sum(1) / 64 / 20
    torch.testing.assert_close(squares.sqrt(), predicted, rtol=0.15, atol=0)


def test_accuracy_of_one_output_and_of_several():
    features = torch.eye(3)
    classes = torch.tensor([0, 1, 1])
    assert accuracy_of(torch.tensor([[-1.0, 2.0, -3.0]]), features, classes) == pytest.approx(2 / 3)
    theta = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    assert accuracy_of(theta, features, classes) == 1.0


def test_the_bound_of_a_private_release_does_not_look_at_data():
    model = RandomFeatures(64, 500, seed=0)
    bound = private_options(model)["bound"]
    # E relu(g)^2 = 1/2 for each feature.
    assert bound == pytest.approx(math.sqrt(250), rel=0.1)


def test_cells_run_in_a_sweep(tmp_path):
    grid = [QUICK | {"defence": d, "strength": s} for d, s in (("none", 0.0), ("noise", 5.0))]
    grid += [QUICK | {"labels": "binary", "p_over_dn": 5.0}]
    options = {"check": check_defence_cell, "client": False, "progress": False}
    table = sweep(run_defence_cell, grid, store=tmp_path, **options)
    assert list(table.status) == ["ok"] * 3
    assert table.recovered[0] == 4 and table.recovered[1] == 0
    assert table.parameters[2] == 5 * 64 * 4


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"defence": "prayer"}, "defence must be one of"),
        ({"labels": "x"}, "labels must be one of"),
        ({"activation": "step"}, "activation must be one of"),
        ({"n": 0}, "n must"),
        ({"defence": "quantisation", "strength": 3.0}, "bits must be one of"),
        ({"defence": "pruning", "strength": 1.0}, "pruning must be above 0 and below 1"),
        ({"defence": "early stopping", "strength": 1.5}, "whole number"),
        ({"defence": "noise", "strength": 0.0}, "strength of noise must be above 0"),
    ],
)
def test_cells_without_sense_are_refused(tmp_path, wrong, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sweep(run_defence_cell, [wrong], store=tmp_path, check=check_defence_cell, client=False)
