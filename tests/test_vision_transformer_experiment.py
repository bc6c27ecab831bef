"""The vision-transformer experiment against its definitions, and its place in a sweep."""

import pytest
import torch

from paperlib import VisionTransformer, compare, projection_loss, sweep
from paperlib.experiments.classification import labelled_data
from paperlib.experiments.vision_transformer import (
    attack_transformer,
    check_transformer_cell,
    count_tokens,
    count_transformer_parameters,
    run_transformer_cell,
    transformer,
)

QUICK = {
    "n": 2,
    "outputs": 2,
    "max_train_steps": 2000,
    "restarts": 1,
    "max_steps": 30,
    "tolerance": 1e-3,
}


@pytest.fixture(scope="module")
def wide():
    return attack_transformer(p_over_dn=8.0, head_scale=0.0, seed=1, **QUICK)


def test_all_layers_were_trained_and_the_last_one_gives_the_data_back(wide):
    start = VisionTransformer((8, 8), wide.network.p // 4, 2, patch=4, depth=1, seed=1)
    start.scale_head(0.0)
    assert wide.training.reached and wide.training.drift > 0
    moved = [
        not torch.equal(before, after)
        for before, after in zip(start.parameters(), wide.network.parameters(), strict=True)
    ]
    assert all(moved)
    assert torch.equal(wide.training.theta, wide.network.head.weight)
    assert wide.errors.recovered() == 2
    assert compare(wide.data.X, wide.record.samples).signed_error == wide.errors.signed_error
    truth = projection_loss(wide.features, wide.training.theta, wide.data.X).item()
    assert wide.residual_at_truth == pytest.approx(truth, rel=1e-2)


def test_the_last_layer_alone_gives_the_data_back_exactly():
    cell = run_transformer_cell(p_over_dn=8.0, layers="last", **QUICK)
    assert cell["drift"] == 0 and cell["residual_at_truth"] < 1e-9
    assert cell["largest_error"] < 1e-3 and cell["recovered"] == cell["near"] == 2


def test_the_last_layer_reads_all_tokens_and_has_the_parameters_asked_for():
    data = labelled_data("digits", 4, 4)
    assert [count_tokens(data, patch) for patch in (1, 2, 4, 8)] == [64, 16, 4, 1]
    for patch, ratio in ((4, 5.0), (2, 5.0), (8, 1.0)):
        network = transformer(data, ratio, patch=patch)
        per_token = network.p // count_tokens(data, patch)
        assert network.p % count_tokens(data, patch) == 0 and per_token % 4 == 0
        assert network.last_layer_parameters == pytest.approx(ratio * data.d * 4, rel=0.1)
    with pytest.raises(ValueError, match="patch must divide 8 and 8, got 3"):
        transformer(data, 1.0, patch=3)


def test_the_cell_reports_what_the_attack_did(wide):
    cell = run_transformer_cell(p_over_dn=8.0, head_scale=0.0, seed=1, **QUICK)
    assert (cell["d"], cell["tokens"]) == (64, 4)
    assert cell["parameters"] == 2 * 4 * cell["width"] == wide.network.last_layer_parameters
    assert cell["numbers"] == 2 * (64 - 1 + 2)
    assert cell["errors"] == pytest.approx(wide.errors.signed.tolist())
    distance = (torch.tensor(cell["matched"]) - wide.data.X).norm(dim=1) / 8
    assert distance.tolist() == pytest.approx(cell["errors"], abs=1e-5)


@pytest.mark.parametrize(("patch", "width", "outputs"), [(4, 32, 1), (4, 33, 1), (2, 9, 1)])
def test_the_last_normalisation_costs_one_parameter_a_token(patch, width, outputs):
    count = count_transformer_parameters(2, width, outputs, patch=patch)
    assert count["equations"] == outputs * count["p"] == outputs * count["tokens"] * width
    assert count["relations"] == count["tokens"] == (8 // patch) ** 2
    assert count["rank"] == min(count["free"], count["unknowns"])
    assert count["identified"] == (outputs * (count["p"] - count["tokens"]) >= 2 * 64)


@pytest.mark.parametrize("outputs", [1, 2])
def test_training_all_layers_gives_one_relation_back(outputs):
    width = {1: 32, 2: 16}[outputs]
    before = count_transformer_parameters(2, width, outputs)
    after = count_transformer_parameters(2, width, outputs, layers="all")
    assert after["relations"] == before["relations"] - 1 == 3
    assert before["rank"] == before["free"] == after["rank"] - outputs


def test_theta_of_the_last_layer_adds_up_to_zero_in_every_token():
    run = attack_transformer(p_over_dn=2.0, layers="last", **QUICK | {"max_steps": 1})
    theta = run.training.theta.reshape(2, 4, -1)
    assert (theta.sum(2).norm() / theta.norm()).item() < 1e-5


def test_cells_run_in_a_sweep_and_few_features_are_not_attacked(tmp_path):
    few = {"p_over_dn": 0.2, "patch": 8, "max_steps": 2}
    grid = [QUICK | few | {"n": n} for n in (2, 5)]
    table = sweep(
        run_transformer_cell,
        grid,
        store=tmp_path,
        check=check_transformer_cell,
        client=False,
        progress=False,
    )
    assert list(table.status) == ["ok", "ok"]
    narrow = run_transformer_cell(5, 0.01, outputs=2, patch=8, max_train_steps=1)
    assert narrow["width"] == 4 and narrow["errors"] is None and narrow["near"] is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n must"),
        ({"p_over_dn": 0.0}, "p_over_dn"),
        ({"outputs": 11}, "digits have 10 classes"),
        ({"dataset": "faces"}, "dataset must be one of"),
        ({"dataset": "letters"}, "dataset must be one of"),
        ({"layers": "first"}, "layers must be one of"),
        ({"patch": 0}, "patch"),
        ({"heads": 0}, "heads"),
        ({"head_scale": -1.0}, "head_scale must be at least 0 and finite"),
        ({"momentum": 1.0}, "momentum"),
        ({"device": "abacus"}, "device must be"),
    ],
)
def test_a_cell_without_sense_is_refused_before_anything_runs(tmp_path, wrong, message):
    grid = [{"n": 3, "p_over_dn": 5.0, **wrong}]
    with pytest.raises(ValueError, match=message):
        sweep(
            run_transformer_cell, grid, store=tmp_path, check=check_transformer_cell, client=False
        )
