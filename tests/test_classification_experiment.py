"""The experiment on classification losses against its definitions, and its place in a sweep."""

import math

import pytest

from paperlib import projection_loss, sweep
from paperlib.experiments.classification import (
    ATTACK_RESULTS,
    attack_classifier,
    check_classification_cell,
    count_classifier_parameters,
    labelled_data,
    run_classification_cell,
)
from paperlib.identifiability import coefficients

QUICK = {"max_steps": 30, "max_train_steps": 400, "restarts": 2, "target": 1e-3}


def test_binary_labels_for_one_output_and_the_first_classes_for_several():
    binary, three = labelled_data("digits", 6, 1), labelled_data("digits", 6, 3)
    assert set(binary.y.tolist()) == {-1.0, 1.0}
    assert three.y.shape == (6, 3) and three.class_names == ("0", "1", "2")
    names = labelled_data("photographs", 4, 2).class_names
    assert names == ("astronaut", "chelsea")


@pytest.fixture(scope="module")
def logistic():
    return attack_classifier(4, 8.0, layers="last", seed=1, **QUICK)


def test_logistic_loss_on_the_last_layer_leaves_the_data_no_residual(logistic):
    assert logistic.training.reached and logistic.training.drift == 0
    assert logistic.training.residual_at_truth < 1e-9
    assert logistic.errors.recovered() == 4


def test_every_coefficient_has_the_sign_of_its_label(logistic):
    data, training = logistic.data, logistic.training
    alpha = coefficients(training.features, training.theta, data.X)[:, 0]
    assert bool((alpha * data.y > 0).all())


@pytest.mark.parametrize("outputs", [2, 4])
def test_a_softmax_layer_of_the_least_width_determines_its_data(outputs):
    count = count_classifier_parameters(4, outputs)
    assert count["independent"] == outputs - 1 and count["row_sum"] < 1e-12
    assert count["unknowns"] == 4 * (64 - 1) + 4 * (outputs - 1)
    assert count["unknowns"] <= count["equations"] < count["unknowns"] + outputs - 1
    assert count["rank"] == count["unknowns"] and count["identified"]


def test_the_cell_reports_what_training_and_attack_did():
    options = {"loss": "cross-entropy", "outputs": 3, "layers": "all", "seed": 1} | QUICK
    cell, run = run_classification_cell(3, 6.0, **options), attack_classifier(3, 6.0, **options)
    assert cell["width"] == run.network.p == 6 * 64 * 3 // 3
    assert cell["parameters"] == 3 * cell["width"]
    assert cell["independent"] == 2 and cell["numbers"] == 3 * 63 + 3 * 2
    assert cell["relative_loss"] == pytest.approx(cell["training_loss"] / math.log(3))
    norm = run.training.theta.norm() / run.network.theta_0.norm()
    assert cell["norm"] == pytest.approx(norm.item())
    truth = projection_loss(run.training.features, run.training.theta, run.data.X).item()
    assert cell["residual_at_truth"] == pytest.approx(truth, rel=1e-2)
    assert cell["largest_error"] == pytest.approx(run.errors.signed.max())
    assert 0 < cell["weakest_share"] <= 1


def test_longer_training_moves_the_features_further():
    drifts = [
        attack_classifier(4, 4.0, **QUICK | {"target": target, "max_steps": 1}).training
        for target in (0.3, 1e-2, 1e-4)
    ]
    residuals = [training.residual_at_truth for training in drifts]
    assert residuals == sorted(residuals) and residuals[-1] > 10 * residuals[0]
    assert drifts[0].drift < drifts[1].drift < drifts[2].drift


def test_cells_run_in_a_sweep_and_narrow_networks_are_not_attacked(tmp_path):
    grid = [{"n": 4, "p_over_dn": ratio, "loss": "logistic"} | QUICK for ratio in (0.005, 1.0)]
    table = sweep(
        run_classification_cell,
        grid,
        store=tmp_path,
        check=check_classification_cell,
        client=False,
        progress=False,
    )
    assert list(table.status) == ["ok", "ok"]
    assert list(table.signed_error.isna()) == [True, False]
    narrow = run_classification_cell(**grid[0])
    assert {narrow[name] for name in ATTACK_RESULTS} == {None}


@pytest.mark.parametrize(("loss", "outputs", "seed"), [("logistic", 1, 5), ("cross-entropy", 2, 0)])
def test_a_network_whose_neurons_are_all_off_has_learned_nothing(loss, outputs, seed):
    cell = run_classification_cell(4, 0.005, loss=loss, outputs=outputs, seed=seed, **QUICK)
    assert cell["width"] == 1 and cell["norm"] == 0 and cell["relative_loss"] == 1
    assert cell["independent"] == 0 and cell["numbers"] == 4 * 63
    assert {cell[name] for name in ATTACK_RESULTS} == {None}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n": 0}, "n must"),
        ({"p_over_dn": 0.0}, "p_over_dn"),
        ({"target": 0.0}, "target"),
        ({"momentum": 1.0}, "momentum"),
        ({"seed": -1}, "seed"),
        ({"loss": "hinge"}, "loss must be one of"),
        ({"layers": "first"}, "layers must be one of"),
        ({"dataset": "letters"}, "dataset must be one of"),
        ({"activation": "step"}, "activation must be one of"),
        ({"loss": "logistic", "outputs": 2}, "logistic loss here has one output"),
        ({"loss": "cross-entropy"}, "at least 2 outputs"),
        ({"loss": "squared", "outputs": 11}, "digits have 10 classes"),
        ({"device": "abacus"}, "device must be one that PyTorch knows"),
    ],
)
def test_a_cell_without_sense_is_refused_before_anything_runs(tmp_path, wrong, message):
    grid = [{"n": 3, "p_over_dn": 5.0, **wrong}]
    with pytest.raises(ValueError, match=message):
        sweep(
            run_classification_cell,
            grid,
            store=tmp_path,
            check=check_classification_cell,
            client=False,
        )
