"""The quantities of the two theorems against dense linear algebra."""

import math

import pytest
import torch

from paperlib import RandomFeatures, sphere
from paperlib.experiments.theorems import (
    check_theorem_cell,
    count_merged,
    floor_without_own_candidate,
    off_span,
    run_floor_cell,
    run_theorem_cell,
)


def test_off_span_against_least_squares():
    rows = torch.randn(3, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    basis = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    fit = torch.linalg.lstsq(basis.T, rows.T).solution.T @ basis
    torch.testing.assert_close(off_span(rows, basis), (rows - fit).norm(dim=1) / math.sqrt(30))
    assert float(off_span(basis[:1] + basis[1:2], basis)[0]) < 1e-12
    # Two candidates at one point span what one of them spans.
    torch.testing.assert_close(off_span(rows, basis[[0, 0]]), off_span(rows, basis[:1]))


def test_merged_candidates_are_counted():
    X = sphere(3, 40, seed=0).X
    assert count_merged(X, X) == {"close_candidates": 3, "merged": 0, "missed": 0}
    samples = torch.stack([X[0], X[0] + 0.01, -X[1]])
    assert count_merged(X, samples) == {"close_candidates": 2, "merged": 1, "missed": 2}


def test_theorem_cell_on_both_sides_of_the_threshold():
    above = run_theorem_cell(4, 20, 10.0)
    assert above["off_span"] < 1e-4 and above["distance"] < 1e-3 and above["missed"] == 0
    below = run_theorem_cell(4, 20, 0.3)
    assert below["off_span"] > 0.1 and below["distance"] > 0.5
    odd = run_theorem_cell(4, 20, 10.0, "tanh")
    assert odd["distance"] < 1e-3 and odd["off_span"] < 1e-4


def test_floor_bounds_every_merged_pair():
    data = sphere(3, 10, seed=2, dtype=torch.float64)
    model = RandomFeatures(10, 600, "relu+tanh", seed=2, dtype=torch.float64)
    floor = floor_without_own_candidate(model, data.X, 2)
    assert floor > 0.1
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = 1e-4 * torch.randn(2, 10, dtype=torch.float64, generator=generator)
        pair = torch.cat([data.X[:2], (data.X[:1] + step[:1])])
        reached = float(off_span(model.features(data.X[2:]), model.features(pair))[0])
        assert reached >= floor - 1e-3


def test_floor_is_zero_when_the_derivatives_span_everything():
    # (n - 1) (d + 1) = 44 columns in dimension p = 15
    assert run_floor_cell(5, 10, 0.3, "relu+tanh")["floor"] < 1e-10
    assert run_floor_cell(2, 10, 20.0)["floor"] > 0.3


def test_the_floor_is_the_least_of_the_first_three_samples():
    data = sphere(5, 10, seed=4, dtype=torch.float64)
    model = RandomFeatures(10, 400, "gelu", seed=4, dtype=torch.float64)
    norms = model.features(data.X).norm(dim=1) / 20
    floors = [floor_without_own_candidate(model, data.X, i) / float(norms[i]) for i in range(3)]
    assert run_floor_cell(5, 10, 8.0, "gelu", seed=4) == {"floor": pytest.approx(min(floors))}
    assert max(floors) > 1.001 * min(floors)


def test_cells_without_sense_are_refused():
    with pytest.raises(ValueError, match="oversampling"):
        check_theorem_cell(2, 10, 5.0, "relu", 0, 10, 1, 0.5)
    with pytest.raises(ValueError, match="p must be at least n"):
        check_theorem_cell(20, 10, 0.01, "relu", 0, 10, 1, 1.0)
