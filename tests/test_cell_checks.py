"""What a cell would fail on is refused before any cell runs, and what it can compute is not."""

import inspect
import math

import pytest

from paperlib.experiments.classification import check_classification_cell, run_classification_cell
from paperlib.experiments.defences import check_defence_cell, run_defence_cell
from paperlib.experiments.effective_dimension import (
    check_picture_cell,
    check_subspace_cell,
    run_picture_cell,
    run_subspace_cell,
)
from paperlib.experiments.gap import check_gap_cell, run_gap_cell
from paperlib.experiments.knowledge import (
    check_informed_cell,
    check_knowledge_cell,
    check_unlearning_cell,
    run_informed_cell,
    run_knowledge_cell,
    run_unlearning_cell,
)
from paperlib.experiments.law import check_law_cell, run_law_cell
from paperlib.experiments.prior_attacks import check_prior_attack_cell, run_prior_attack_cell
from paperlib.experiments.releases import check_release_cell, run_release_cell
from paperlib.experiments.residual import (
    check_drift_cell,
    check_residual_cell,
    run_drift_cell,
    run_residual_cell,
)
from paperlib.experiments.sample_count import (
    check_estimate_cell,
    check_guess_cell,
    run_estimate_cell,
    run_guess_cell,
)
from paperlib.experiments.sign_ambiguity import check_sign_cell, run_sign_cell
from paperlib.experiments.theorems import (
    check_floor_cell,
    check_theorem_cell,
    run_floor_cell,
    run_theorem_cell,
)
from paperlib.experiments.two_layer import check_two_layer_cell, run_two_layer_cell
from paperlib.experiments.vision_transformer import check_transformer_cell, run_transformer_cell
from paperlib.grid import check_grid

LAW = (run_law_cell, check_law_cell, {"n": 3, "d": 8, "p_over_dn": 5.0})
KNOWLEDGE = (run_knowledge_cell, check_knowledge_cell, {"n": 3, "d": 8, "p_over_dn": 5.0})
INFORMED = (
    run_informed_cell,
    check_informed_cell,
    {"n": 3, "d": 8, "unknown": 1, "p_over_dk": 3.0},
)
UNLEARNING = (
    run_unlearning_cell,
    check_unlearning_cell,
    {"n": 3, "d": 8, "p_over_d": 2.0, "candidates": 16},
)
SUBSPACE = (run_subspace_cell, check_subspace_cell, {"n": 3, "d": 8, "k": 2, "p_over_kn": 5.0})
PICTURE = (
    run_picture_cell,
    check_picture_cell,
    {"n": 2, "k": 580, "p_over_dn": 0.1, "basis": "principal", "size": 16},
)
GAP = (
    run_gap_cell,
    check_gap_cell,
    {"n": 2, "d": 16, "p_over_dn": 1.2, "data": "photographs", "method": "subspace search"},
)
ROUND = (*GAP[:2], GAP[2] | {"method": "one round of messages", "data": "sphere"})
PRIOR = (
    run_prior_attack_cell,
    check_prior_attack_cell,
    {"arena": "linearised", "attack": "first layer", "n": 3, "p_over_dn": 1.5, "budget": 2},
)
LAST = (*PRIOR[:2], PRIOR[2] | {"attack": "last layer", "p_over_dn": 1.0})
ALL = (*PRIOR[:2], PRIOR[2] | {"attack": "all layers", "n": 65, "p_over_dn": 0.001})
ESTIMATE = (run_estimate_cell, check_estimate_cell, {"n": 3, "most": 5, "d": 8, "p_over_dn": 1.0})
FLOOR = (run_floor_cell, check_floor_cell, {"n": 2, "d": 8, "p_over_dn": 1.0})
THEOREM = (run_theorem_cell, check_theorem_cell, {"n": 3, "d": 8, "p_over_dn": 5.0})
RELEASE = (
    run_release_cell,
    check_release_cell,
    {"n": 3, "d": 9, "p_over_dn": 15 / 27, "releases": 2, "lift": True},
)
DEFENCE = (run_defence_cell, check_defence_cell, {"n": 4, "p_over_dn": 1.0, "test": 5})
STOPPED = (*DEFENCE[:2], DEFENCE[2] | {"defence": "early stopping", "strength": 2.0})
PRUNED = (*DEFENCE[:2], DEFENCE[2] | {"defence": "pruning", "strength": 0.8})
NETWORK = {"n": 2, "p_over_dn": 1.0}
RESIDUAL = (run_residual_cell, check_residual_cell, NETWORK | {"blocks": 1})
TRANSFORMER = (run_transformer_cell, check_transformer_cell, NETWORK)


@pytest.mark.parametrize(
    ("experiment", "change", "message"),
    [
        (LAW, {"d": 1}, "d must be at least 2, got 1"),
        (KNOWLEDGE, {"d": 1}, "d must be at least 2, got 1"),
        (INFORMED, {"d": 1}, "d must be at least 2, got 1"),
        (UNLEARNING, {"d": 1}, "d must be at least 2, got 1"),
        (UNLEARNING, {"candidates": 17}, "p must be at least candidates = 17, got 16"),
        (SUBSPACE, {"k": 1}, "k must be at least 2, got 1"),
        (PICTURE, {"k": 581}, "k must be at most 580, the pictures that are known, or d, got 581"),
        (PICTURE, {"size": 48}, "too few photographs of size = 48: n = 400 pictures asked for"),
        (PICTURE, {"p_over_dn": 5e-4}, "p must be at least n = 2, got 1"),
        (GAP, {"d": 20}, "the square of a side of at least 4 pixels, got 20"),
        (GAP, {"d": 9}, "the square of a side of at least 4 pixels, got 9"),
        (GAP, {"p_over_dn": 1.1}, "subspace search needs p of at least 38, got 35"),
        (GAP, {"activation": "tanh"}, "needs a second moment, which tanh has not"),
        (ROUND, {"n": 17}, "one round of messages needs n of at most d = 16, got 17"),
        (PRIOR, {"n": 4, "p_over_dn": 1.0}, r"n must be below min\(width, d\) = 4, got 4"),
        (PRIOR, {"n": 64}, r"n must be below min\(width, d\) = 64, got 64"),
        (LAST, {"p_over_dn": 0.5}, "p must be at least n = 3, got 1"),
        (ALL, {"n": 66}, "p must be at least n = 66, got 65"),
        (ESTIMATE, {"most": 25}, "p must be at least n = 3 and the candidates, 25"),
        (ESTIMATE, {"most": 0}, "most must be at least 1, got 0"),
        (ESTIMATE, {"d": 1}, "d must be at least 2, got 1"),
        (ESTIMATE, {"activation": "step"}, "activation must be one of"),
        (FLOOR, {"n": 1}, "n must be at least 2, got 1"),
        (FLOOR, {"d": 1}, "d must be at least 2, got 1"),
        (FLOOR, {"seed": -1}, "seed must be at least 0, got -1"),
        (FLOOR, {"p_over_dn": 0.01}, "p must be at least 1, got 0"),
        (FLOOR, {"p_over_dn": math.inf}, "p_over_dn must be above 0, got inf"),
        (FLOOR, {"activation": "step"}, "activation must be one of"),
        (THEOREM, {"oversampling": math.nan}, "oversampling must be at least 1 and finite"),
        (RELEASE, {"p_over_dn": 14 / 27}, "needs p above d and the candidates, 14, got 14"),
        (DEFENCE, {"test": 1800}, "1804 .* asked for"),
        (STOPPED, {"strength": math.inf}, "strength of early stopping must be at least 1"),
        (STOPPED, {"strength": math.nan}, "strength of early stopping must be at least 1"),
        (PRUNED, {"strength": 0.9}, "pruning must leave n = 4 features, got 0.9 of 26 removed"),
        (RESIDUAL, {"head_scale": math.inf}, "head_scale must be at least 0 and finite, got inf"),
        (RESIDUAL, {"momentum": math.nan}, "momentum must be at least 0 and below 1, got nan"),
        (TRANSFORMER, {"head_scale": math.nan}, "head_scale must be at least 0 and finite"),
    ],
)
def test_what_a_cell_would_fail_on_is_refused_before_it_runs(experiment, change, message):
    function, check, cell = experiment
    check_grid(function, [cell], check=check)
    with pytest.raises(ValueError, match=message):
        check_grid(function, [cell | change], check=check)
    with pytest.raises((ArithmeticError, RuntimeError, TypeError, ValueError)):
        function(**cell | change)


# What no experiment can compute with, whatever its other parameters are.
SENSELESS = {
    **dict.fromkeys(("n", "candidates", "unknown", "releases", "guess", "most", "test"), 0),
    **dict.fromkeys(("outputs", "blocks", "patch", "depth", "heads", "budget", "size", "k"), 0),
    **dict.fromkeys(("restarts", "max_steps", "max_train_steps", "published_steps"), 0),
    **dict.fromkeys(("seed", "data_seed"), -1),
    **dict.fromkeys(("p_over_dn", "p_over_dk", "p_over_d", "p_over_kn"), math.nan),
    **dict.fromkeys(("tolerance", "target", "step_scale", "start_scale", "momentum"), math.nan),
    **dict.fromkeys(("amount", "left_out", "known", "head_scale", "oversampling"), math.nan),
    **dict.fromkeys(("activation", "solver", "method", "data", "dataset", "labels"), "?"),
    **dict.fromkeys(("layers", "loss", "defence", "lack", "kind", "combination", "start"), "?"),
    **dict.fromkeys(("dtype", "basis", "arena", "attack", "counted"), "?"),
    "d": 1,
    "device": "abacus",
}
EXPERIMENTS = [LAW, KNOWLEDGE, INFORMED, UNLEARNING, SUBSPACE, PICTURE, GAP, PRIOR, ESTIMATE]
EXPERIMENTS += [FLOOR, THEOREM, RELEASE, DEFENCE, RESIDUAL, TRANSFORMER]
EXPERIMENTS += [
    (run_guess_cell, check_guess_cell, {"n": 3, "guess": 5, "d": 8, "p_over_dn": 1.0}),
    (run_sign_cell, check_sign_cell, {"activation": "relu", "n": 3, "d": 8}),
    (run_two_layer_cell, check_two_layer_cell, NETWORK),
    (run_drift_cell, check_drift_cell, NETWORK),
    (run_classification_cell, check_classification_cell, NETWORK),
]


@pytest.mark.parametrize(
    ("function", "check", "cell"), EXPERIMENTS, ids=[e[0].__name__ for e in EXPERIMENTS]
)
def test_no_parameter_is_taken_without_sense(function, check, cell):
    known = inspect.signature(function).parameters
    assert (
        not known.keys() - SENSELESS.keys() - {"strength", "format", "lift", "learning_rate", "box"}
    )
    check_grid(function, [cell], check=check)
    for name in known.keys() & SENSELESS.keys():
        wrong = [SENSELESS[name]] if known[name].annotation.startswith("tuple") else SENSELESS[name]
        with pytest.raises(ValueError, match=rf"^grid\[0\]: {name} "):
            check_grid(function, [cell | {name: wrong}], check=check)


@pytest.mark.parametrize(
    ("function", "check", "cell"),
    [
        LAW,
        RESIDUAL,
        TRANSFORMER,
        (run_two_layer_cell, check_two_layer_cell, NETWORK),
        (run_classification_cell, check_classification_cell, NETWORK),
    ],
)
def test_a_device_is_known_by_its_name_alone(function, check, cell):
    """Where the sweep is driven there may be none of the workers' GPUs."""
    check_grid(function, [cell | {"device": "cuda:63"}], check=check)
    with pytest.raises(ValueError, match="device must be one that PyTorch knows, got 'abacus'"):
        check_grid(function, [cell | {"device": "abacus"}], check=check)


def test_every_experiment_names_the_data_sets_that_it_has():
    for name in ("letters", "faces"):
        with pytest.raises(ValueError, match="must be one of digits, photographs, cifar10, got"):
            check_grid(
                run_transformer_cell, [NETWORK | {"dataset": name}], check=check_transformer_cell
            )
    with pytest.raises(ValueError, match="must be one of digits, faces, photographs, cifar10, got"):
        check_grid(run_residual_cell, [NETWORK | {"dataset": "letters"}], check=check_residual_cell)


@pytest.mark.parametrize(
    "experiment",
    [
        LAW,
        KNOWLEDGE,
        INFORMED,
        UNLEARNING,
        SUBSPACE,
        GAP,
        ROUND,
        ESTIMATE,
        THEOREM,
        RELEASE,
        PRUNED,
    ],
)
def test_what_is_not_refused_runs(experiment):
    function, _, cell = experiment
    known = inspect.signature(function).parameters
    few = {k: v for k, v in {"restarts": 1, "max_steps": 2}.items() if k in known}
    assert function(**cell | few)


def test_a_sample_at_which_no_feature_is_active_is_in_every_span():
    floors = [run_floor_cell(2, 4, 1 / 8, "relu", seed)["floor"] for seed in range(6)]
    assert 0.0 in floors and all(0 <= floor <= 1 for floor in floors)
