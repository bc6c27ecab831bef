"""Counting the signs that come back wrong."""

import pytest
import torch

from paperlib import RandomFeatures, fit_min_norm, sphere
from paperlib.experiments.sign_ambiguity import (
    check_sign_cell,
    count_signs,
    flipped_losses,
    run_sign_cell,
)


def test_signs_are_counted():
    X = sphere(4, 60, seed=0).X
    fresh = sphere(1, 60, seed=9).X
    samples = torch.cat([-X[2:3], X[:2], fresh])
    assert count_signs(X, samples) == {"right": 2, "wrong": 1, "missed": 1}
    assert count_signs(X, samples[:1]) == {"right": 0, "wrong": 1, "missed": 3}


def test_flipped_signs_cost_relu_something_and_tanh_nothing():
    data = sphere(4, 20, seed=1, dtype=torch.float64)
    for activation, least, most in (("relu", 1e-3, 1.0), ("tanh", 0.0, 1e-20)):
        model = RandomFeatures(20, 800, activation, seed=1, dtype=torch.float64)
        losses = flipped_losses(model, fit_min_norm(model, data.X, data.y), data.X)
        assert len(losses) == 5 and losses[0] < 1e-20
        assert all(least <= loss <= most for loss in losses[1:])


def test_default_solver_gives_no_wrong_sign_unless_the_activation_is_odd():
    assert run_sign_cell("relu", n=5, d=20, p_over_dn=10.0)["right"] == 5
    odd = run_sign_cell("tanh", n=5, d=20, p_over_dn=10.0)
    assert odd["missed"] == 0 and odd["wrong"] > 0


def test_published_cell():
    options = {"n": 3, "d": 10, "p_over_dn": 5.0, "max_steps": 50}
    slow = run_sign_cell("relu", "published", learning_rate=1e-6, **options)
    assert slow["right"] + slow["wrong"] + slow["missed"] == 3
    assert slow["projection_loss"] > 1e-3  # the learning rate was handed on
    with pytest.raises(ValueError, match="learning_rate belongs"):
        check_sign_cell("relu", "levenberg-marquardt", 3, 10, 5.0, 0, 50, 5.0)
