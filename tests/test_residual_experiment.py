"""The residual-network experiment against its definitions, and its place in a sweep."""

import pytest
import torch

from paperlib import compare, projection_loss, sweep
from paperlib.experiments.network import features_between, load_data, width_for
from paperlib.experiments.residual import (
    attack_residual,
    check_drift_cell,
    check_residual_cell,
    residual_network,
    run_drift_cell,
    run_residual_cell,
)
from paperlib.networks import ResNet, TwoLayer

# Two samples and one block: seconds, not minutes.
SMALL = {"n": 2, "blocks": 1, "max_train_steps": 2000}
QUICK = SMALL | {"restarts": 1, "max_steps": 30, "tolerance": 1e-3}


@pytest.fixture(scope="module")
def wide():
    return attack_residual(p_over_dn=8.0, seed=1, **QUICK)


def test_all_layers_were_trained_and_the_last_one_gives_the_data_back(wide):
    start = ResNet((8, 8), wide.network.p // 49, 1, blocks=1, seed=1)
    assert wide.training.reached and wide.training.loss <= 1e-7
    for before, after in zip(start.parameters(), wide.network.parameters(), strict=True):
        assert not torch.equal(before, after)
    assert torch.equal(wide.training.theta, wide.network.head.weight - start.head.weight)
    assert wide.errors.recovered(0.2) == 2
    assert compare(wide.data.X, wide.record.samples).signed_error == wide.errors.signed_error


def test_the_features_of_the_attack_are_those_of_the_trained_body(wide):
    trained = wide.network.body(wide.data.X).detach()
    torch.testing.assert_close(wide.features.features(wide.data.X), trained)
    truth = projection_loss(wide.features, wide.training.theta, wide.data.X).item()
    assert wide.residual_at_truth == pytest.approx(truth, rel=1e-2)


def test_the_cell_reports_what_the_attack_did(wide):
    cell = run_residual_cell(p_over_dn=8.0, seed=1, **QUICK)
    assert (cell["d"], cell["outputs"]) == (64, 1)
    assert cell["width"] == round(8 * 64 * 2 / 49) and cell["parameters"] == 49 * cell["width"]
    assert cell["errors"] == pytest.approx(wide.errors.signed.tolist())
    assert cell["near"] == sum(error <= 0.2 for error in cell["errors"])
    matched = torch.tensor(cell["matched"])
    distance = (matched - wide.data.X).norm(dim=1) / 8
    assert distance.tolist() == pytest.approx(cell["errors"], abs=1e-5)
    assert len(cell["shares"]) == 2 and min(cell["shares"]) > 0


def test_the_last_layer_alone_gives_the_data_back_exactly():
    cell = run_residual_cell(p_over_dn=8.0, layers="last", **QUICK)
    assert cell["drift"] == 0 and cell["residual_at_truth"] < 1e-9
    assert cell["largest_error"] < 1e-3


def test_features_between_are_those_of_weights_on_the_straight_line():
    data = load_data("digits", 3, labels="binary", seed=0)
    network = residual_network(data, 1.0, blocks=1)
    start = {name: value.clone() for name, value in network.body.state_dict().items()}
    before = network.body(data.X).detach()
    with torch.no_grad():
        for weight in network.body.parameters():
            weight += 0.1
    after = network.body(data.X).detach()
    torch.testing.assert_close(features_between(network, start, 0.0).features(data.X), before)
    torch.testing.assert_close(features_between(network, start, 1.0).features(data.X), after)
    with torch.no_grad():
        for weight in network.body.parameters():
            weight -= 0.05
    middle = network.body(data.X).detach()
    with torch.no_grad():
        for weight in network.body.parameters():
            weight += 0.05
    torch.testing.assert_close(features_between(network, start, 0.5).features(data.X), middle)


@pytest.mark.parametrize("known", [0.0, 0.5])
def test_who_does_not_know_the_trained_body_attacks_with_other_features(known):
    few = {"max_train_steps": 20, "restarts": 1, "max_steps": 1, "blocks": 1, "seed": 1}
    run = attack_residual(2, 1.0, known=known, **few)
    start = residual_network(run.data, 1.0, blocks=1, seed=1).body.state_dict()
    expected = features_between(run.network, start, known).features(run.data.X)
    torch.testing.assert_close(run.features.features(run.data.X), expected)
    assert not torch.allclose(expected, run.network.body(run.data.X))
    truth = projection_loss(run.features, run.training.theta, run.data.X).item()
    assert run.residual_at_truth == pytest.approx(truth, rel=1e-3)
    assert truth != pytest.approx(run.training.residual_at_truth, rel=1e-2)
    reached = projection_loss(run.features, run.training.theta, run.record.samples).item()
    assert run.record.loss == pytest.approx(reached, rel=1e-3)


def test_a_last_layer_from_zero_lowers_drift_and_residual_and_halfway_lowers_it_more():
    paper, zero = (run_drift_cell(p_over_dn=8.0, head_scale=s, **SMALL) for s in (1.0, 0.0))
    assert paper["trained"] and zero["trained"]
    assert zero["drift"] < 0.7 * paper["drift"]
    assert zero["residual_at_truth"] < 0.5 * paper["residual_at_truth"]
    for cell in (paper, zero):
        assert cell["residuals"][-1] == pytest.approx(cell["residual_at_truth"], rel=1e-3)
        assert min(cell["residuals"][1:4]) < 0.5 * cell["residuals"][-1]


def test_scaling_the_head_scales_what_theta_is_measured_from():
    network = TwoLayer(4, 6, 2)
    before = network.head.weight.detach().clone()
    network.scale_head(0.5)
    torch.testing.assert_close(network.head.weight.detach(), 0.5 * before)
    assert not bool(network.theta.any())
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="factor must be finite"):
            network.scale_head(wrong)


def test_width_is_the_nearest_whole_number_of_channels():
    data = load_data("digits", 10, labels="one-hot", seed=0)
    assert width_for(data, 10, 5.0) == 320
    assert width_for(data, 1, 5.0, positions=49) == round(3200 / 49)
    assert width_for(data, 10, 1e-6) == 1


def test_cells_run_in_a_sweep(tmp_path):
    grid = [QUICK | {"p_over_dn": 0.4, "known": 0.5}]
    table = sweep(
        run_residual_cell,
        grid,
        store=tmp_path,
        check=check_residual_cell,
        client=False,
        progress=False,
    )
    assert list(table.status) == ["ok"] and len(table.errors[0]) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n must"),
        ({"blocks": 0}, "blocks"),
        ({"head_scale": -1.0}, "head_scale"),
        ({"known": 1.5}, "known must be from 0 to 1"),
        ({"layers": "first"}, "layers must be one of"),
        ({"device": "abacus"}, "device must be"),
    ],
)
def test_a_cell_without_sense_is_refused_before_anything_runs(tmp_path, wrong, message):
    grid = [{"n": 3, "p_over_dn": 5.0, **wrong}]
    with pytest.raises(ValueError, match=message):
        sweep(run_residual_cell, grid, store=tmp_path, check=check_residual_cell, client=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"step_scale": 2.0}, "step_scale"),
        ({"target": 0.0}, "target"),
        ({"known": [0.0, 2.0]}, "known must be from 0 to 1"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_training_without_sense_is_refused_before_anything_runs(tmp_path, wrong, message):
    grid = [{"n": 3, "p_over_dn": 5.0, **wrong}]
    with pytest.raises(ValueError, match=message):
        sweep(run_drift_cell, grid, store=tmp_path, check=check_drift_cell, client=False)
