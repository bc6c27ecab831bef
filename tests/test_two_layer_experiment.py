"""The two-layer experiment against its definitions, and its place in a sweep."""

import pytest
import torch

from paperlib import compare, projection_loss, sweep
from paperlib.experiments.two_layer import (
    ATTACK_RESULTS,
    attack_two_layer,
    check_two_layer_cell,
    run_two_layer_cell,
)
from paperlib.networks import TwoLayer

QUICK = {"max_steps": 40, "max_train_steps": 3000, "restarts": 2, "tolerance": 1e-3}


@pytest.fixture(scope="module")
def wide():
    return attack_two_layer(5, 20.0, seed=1, **QUICK)


def test_a_wide_network_trained_on_both_layers_gives_the_data_back(wide):
    start = TwoLayer(64, wide.network.p, wide.network.outputs, seed=1)
    assert wide.training.reached and wide.training.loss <= 1e-7
    assert not torch.equal(start.body[0].weight, wide.network.body[0].weight)  # both layers moved
    assert torch.allclose(
        wide.training.theta, wide.network.head.weight.detach() - start.head.weight.detach()
    )
    assert wide.errors.recovered() == 5
    assert compare(wide.data.X, wide.record.samples).signed_error == wide.errors.signed_error


def test_width_counts_last_layer_parameters(wide):
    outputs = wide.network.outputs
    assert wide.network.last_layer_parameters == outputs * round(20 * 64 * 5 / outputs)


def test_the_cell_reports_what_the_attack_did(wide):
    cell = run_two_layer_cell(5, 20.0, seed=1, **QUICK)
    X, C = wide.data.X, wide.network.outputs
    assert cell["d"] == 64 and cell["outputs"] == C
    assert cell["width"] == wide.network.p and cell["parameters"] == C * cell["width"]
    assert cell["numbers"] == 5 * 63 + 5 * C
    mean_square = wide.data.y.square().mean().item()
    assert cell["relative_loss"] == pytest.approx(cell["training_loss"] / mean_square)
    assert cell["signed_error"] == pytest.approx(wide.errors.signed.mean())
    assert cell["largest_error"] == pytest.approx(wide.errors.signed.max())
    truth = projection_loss(wide.training.features, wide.training.theta, X).item()
    assert cell["residual_at_truth"] == pytest.approx(truth, rel=1e-2)
    reached = projection_loss(wide.training.features, wide.training.theta, wide.record.samples)
    assert cell["projection_loss"] == pytest.approx(reached.item(), rel=1e-2)


def test_training_the_last_layer_alone_leaves_no_residual():
    cell = run_two_layer_cell(4, 20.0, layers="last", **QUICK)
    assert cell["drift"] == 0 and cell["residual_at_truth"] < 1e-9
    assert cell["recovered"] == 4


def test_a_narrow_network_drifts_more_and_hides_its_data(wide):
    cell = run_two_layer_cell(5, 0.5, seed=1, **QUICK)
    assert cell["drift"] > 5 * wide.training.drift
    assert cell["recovered"] == 0 and cell["signed_error"] > 0.5


def test_fewer_neurons_than_samples_are_trained_and_not_attacked():
    cell = run_two_layer_cell(10, 0.05, **QUICK | {"max_train_steps": 50})
    assert cell["width"] == 3
    # Outputs of three neurons span three of the ten equal directions of balanced one-hot labels.
    assert cell["relative_loss"] >= 0.7 - 1e-9
    assert not cell["trained"]
    assert {cell[name] for name in ATTACK_RESULTS} == {None}


def test_one_output_for_binary_labels():
    run = attack_two_layer(4, 5.0, labels="binary", momentum=0.9, **QUICK | {"tolerance": 1e-5})
    assert run.network.outputs == 1 and run.network.p == 5 * 64 * 4
    assert set(run.data.y.tolist()) == {-1.0, 1.0}
    assert run.errors.recovered() >= 3


def test_cells_run_in_a_sweep(tmp_path):
    grid = [{"n": 4, "p_over_dn": ratio} | QUICK for ratio in (0.05, 1.0)]
    table = sweep(
        run_two_layer_cell,
        grid,
        store=tmp_path,
        check=check_two_layer_cell,
        client=False,
        progress=False,
    )
    assert list(table.status) == ["ok", "ok"]
    assert list(table.signed_error.isna()) == [True, False]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n must"),
        ({"p_over_dn": 0.0}, "p_over_dn"),
        ({"restarts": 0}, "restarts"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"momentum": 1.0}, "momentum"),
        ({"seed": -1}, "seed"),
        ({"dataset": "letters"}, "dataset must be one of"),
        ({"labels": "ternary"}, "labels must be one of"),
        ({"layers": "first"}, "layers must be one of"),
        ({"activation": "step"}, "activation must be one of"),
        ({"device": "abacus"}, "device must be"),
    ],
)
def test_a_cell_without_sense_is_refused_before_anything_runs(tmp_path, wrong, message):
    grid = [{"n": 3, "p_over_dn": 5.0, **wrong}]
    with pytest.raises(ValueError, match=message):
        sweep(run_two_layer_cell, grid, store=tmp_path, check=check_two_layer_cell, client=False)
