"""Closing the gap: what its cells report, and what they refuse."""

import math

import pytest
import torch

from paperlib import RandomFeatures, fit_min_norm, photographs, sphere
from paperlib.experiments.gap import (
    METHODS,
    captured_by_span,
    check_gap_cell,
    load,
    run_gap_cell,
)

QUICK = {"n": 4, "d": 30, "p_over_dn": 2.0, "restarts": 1, "max_steps": 20, "published_steps": 50}
WHOLE = QUICK | {"activation": "relu", "method": "default", "data": "sphere", "seed": 0}


@pytest.mark.parametrize("method", METHODS)
def test_every_way_reports_the_same_things(method):
    cell = run_gap_cell(method=method, **QUICK)
    assert cell["p"] == 240
    assert 0 <= cell["recovered"] <= 4 and 0 <= cell["near"] <= 4
    assert cell["whole"] == (cell["recovered"] == 4)
    assert cell["passes"] > 0 and cell["restarts_used"] == 1
    if method != "one round of messages":
        assert cell["explained"] == (cell["projection_loss"] <= 1e-10)


def test_the_default_finds_what_it_should():
    cell = run_gap_cell(**(QUICK | {"restarts": 3, "max_steps": 60}))
    assert cell["whole"] and cell["explained"] and cell["near"] == 4


def test_data_have_the_dimension_and_the_seed_asked_for():
    grey = photographs(3, size=8, grey=True, seed=1)
    assert torch.equal(load("photographs", 3, 64, seed=1).X, grey.X)
    assert not torch.equal(load("photographs", 3, 64, seed=2).X, grey.X)
    assert torch.equal(load("sphere", 3, 64, seed=1).X, sphere(3, 64, seed=1).X)


def test_the_span_captures_all_of_one_sample_from_many_parameters():
    model = RandomFeatures(20, 4000)
    X = sphere(1, 20, 0).X
    theta = fit_min_norm(model, X, torch.ones(1))
    assert float(captured_by_span(model, theta, X)) > 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "guess"}, "method must be one of"),
        ({"data": "noise"}, "data must be one of"),
        ({"activation": "step"}, "activation must be one of"),
        ({"restarts": 0}, "restarts must be at least 1"),
        ({"d": 1}, "d must be at least 2"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"p_over_dn": math.inf}, "p_over_dn must be above 0, got inf"),
        ({"p_over_dn": 0.1}, "p must be at least n and d, got 12"),
    ],
)
def test_values_that_cannot_be_computed_with_are_refused(change, message):
    check_gap_cell(**WHOLE)
    with pytest.raises(ValueError, match=message):
        check_gap_cell(**(WHOLE | change))
