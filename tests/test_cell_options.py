"""What a cell is asked for is what its attack is given."""

from types import SimpleNamespace

import pytest
import torch

from paperlib import (
    RandomFeatures,
    combine_releases,
    compare,
    fit_min_norm,
    projection_loss,
    reconstruct,
    sphere,
)
from paperlib.experiments import (
    defences,
    gap,
    knowledge,
    law,
    releases,
    sample_count,
    sign_ambiguity,
    theorems,
)
from paperlib.known_samples import reconstruct_unknown
from paperlib.message_passing import MessagePassing
from paperlib.releases import release_spectrum
from paperlib.streams import stream

SIZE = {"n": 4, "d": 30, "p_over_dn": 2.0}


@pytest.fixture
def attacks(monkeypatch):
    """The attacks of all cells that are run: model, theta and record of each."""
    made = []

    def watched(model, theta, n, **options):
        record = reconstruct(model, theta, n, **options)
        made.append(SimpleNamespace(model=model, theta=theta, record=record))
        return record

    for experiment in (
        defences,
        gap,
        knowledge,
        law,
        releases,
        sample_count,
        sign_ambiguity,
        theorems,
    ):
        monkeypatch.setattr(experiment, "reconstruct", watched)
    return made


def given(attacks, **expected):
    """What the only attack was given, of the options that are named."""
    (attack,) = attacks
    return {name: attack.record.options[name] for name in expected} == expected


def posed(attacks, activation="relu", *, seed):
    """Whether the only attack was made on the sizes above, with data and features of that seed."""
    (attack,) = attacks
    data, model = sphere(4, 30, seed=seed), RandomFeatures(30, 240, activation, seed=seed)
    same = torch.equal(attack.model.V, model.V) and attack.model.activation == model.activation
    return same and torch.allclose(attack.theta, fit_min_norm(model, data.X, data.y))


GAP = SIZE | {"restarts": 3, "max_steps": 2, "published_steps": 5}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("published", {"solver": "published", "max_steps": 5}),
        ("random starts", {"start": "random", "restarts": 3, "max_steps": 2}),
        ("subspace search", {"start": "subspace", "restarts": 1, "max_steps": 2}),
        ("default", {"start": "auto", "restarts": 3, "max_steps": 2}),
    ],
)
def test_every_way_of_closing_the_gap_starts_as_it_says(attacks, method, expected):
    cell = gap.run_gap_cell(method=method, seed=1, **GAP)
    assert given(attacks, **{"solver": "levenberg-marquardt", "n": 4, "seed": 1} | expected)
    assert posed(attacks, seed=1)
    record = attacks[0].record
    assert cell["projection_loss"] == record.loss and cell["passes"] == record.passes
    # Two steps find nothing: the starts are used up.
    assert cell["restarts_used"] == expected.get("restarts", 1)


def test_two_ways_of_closing_the_gap_are_no_attack_of_reconstruct(attacks):
    data = sphere(4, 30, seed=1)
    model = RandomFeatures(30, 240, seed=1)
    theta = fit_min_norm(model, data.X, data.y).reshape(1, -1)
    cell = gap.run_gap_cell(method="spectral start", seed=1, **GAP)
    descent = gap.from_spectral_start(model, theta, 4, max_steps=2)
    assert cell["projection_loss"] == descent["loss"] and cell["passes"] == descent["passes"]
    cell = gap.run_gap_cell(method="one round of messages", seed=1, **GAP)
    beliefs = MessagePassing(model, theta, 4, generator=stream("candidates", 1)).run(300)
    assert cell["projection_loss"] == beliefs.unexplained
    assert cell["passes"] == 2 * beliefs.iterations
    assert attacks == []


@pytest.mark.parametrize("solver", ["levenberg-marquardt", "published"])
def test_the_law_is_measured_with_the_solver_that_is_named(attacks, solver):
    options = {"solver": solver, "restarts": 2, "max_steps": 3, "seed": 5}
    cell = law.run_law_cell(activation="gelu", **SIZE, **options)
    assert given(attacks, **options) and posed(attacks, "gelu", seed=5)
    model, theta, record = vars(attacks[0]).values()
    assert record.options.get("start", "random") == "random"
    data = sphere(4, 30, seed=5)
    errors = compare(data.X, record.samples)
    assert cell == {
        "p": 240,
        "training_loss": law.training_loss(model, theta, data.X, data.y),
        "signed_error": errors.signed_error,
        "up_to_sign_error": errors.up_to_sign_error,
        "published_error": errors.published_error,
        "recovered": errors.recovered(),
        "projection_loss": record.loss,
        "explained": record.explained,
        "passes": record.passes,
        "attack_seconds": record.seconds,
    }


RELEASE = {"n": 3, "d": 8, "p_over_dn": 4.0, "releases": 5, "restarts": 2, "max_steps": 2}


@pytest.mark.parametrize("combination", releases.COMBINATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_releases_are_attacked_in_the_combination_and_format_asked_for(attacks, combination, dtype):
    cell = releases.run_release_cell(combination=combination, dtype=dtype, seed=1, **RELEASE)
    (attack,) = attacks
    precision = getattr(torch, dtype)
    assert attack.model.dtype == attack.theta.dtype == precision
    model = RandomFeatures(8, 96, "relu+tanh", seed=1, dtype=precision)
    assert torch.equal(attack.model.V, model.V)
    X = sphere(3, 8, seed=1, dtype=precision).X
    thetas = releases.train_releases(model, X, 5, "labels", seed=1)
    raw = combination == "as released"
    torch.testing.assert_close(attack.theta, torch.cat(thetas) if raw else combine_releases(thetas))
    errors = compare(X, attack.record.samples)
    assert cell == {
        "p": 96,
        "numbers": 3 * 96,
        "unknowns": 3 * 7 + 3 * 3,
        "rank": 3,
        "weakest": float(release_spectrum(thetas)[-1]),
        "recovered": errors.recovered(),
        "signed_error": errors.signed_error,
        "projection_loss": attack.record.loss,
        "lifted": True,
        "passes": attack.record.passes,
        "attack_seconds": attack.record.seconds,
    }
    assert given(attacks, seed=1)


@pytest.mark.parametrize("lift", [True, False, None])
@pytest.mark.parametrize("start", ["auto", "random"])
def test_releases_are_attacked_with_the_lift_and_start_asked_for(attacks, lift, start):
    cell = releases.run_release_cell(lift=lift, start=start, **RELEASE)
    assert given(attacks, lift=lift, start=start, restarts=2, max_steps=2, seed=0)
    assert cell["lifted"] == (lift is not False)  # by default where p leaves room, as here


def test_the_theorems_are_measured_with_the_candidates_asked_for(attacks):
    options = {"oversampling": 1.9, "restarts": 2, "max_steps": 3, "seed": 2}
    cell = theorems.run_theorem_cell(activation="gelu", **SIZE, **options)
    assert given(attacks, start="random", **options) and posed(attacks, "gelu", seed=2)
    model, _, record = vars(attacks[0]).values()
    X = sphere(4, 30, seed=2).X
    off = theorems.off_span(model.features(X), model.features(record.samples))
    assert cell == {
        "p": 240,
        "off_span": float(off.mean()),
        "off_span_most": float(off.max()),
        "distance": pytest.approx(torch.cdist(record.samples, X).amin(1).mean().item() / 30**0.5),
        "signed_error": compare(X, record.samples).signed_error,
        **theorems.count_merged(X, record.samples),
        "projection_loss": record.loss,
        "explained": record.explained,
    }


def test_a_guess_is_attacked_with_that_many_candidates_from_random_starts(attacks):
    sample_count.run_guess_cell(guess=5, seed=2, max_steps=3, **SIZE)
    assert given(attacks, n=5, start="random", seed=2, max_steps=3)
    assert posed(attacks, "relu+tanh", seed=2)


def test_signs_are_counted_after_random_starts_of_the_default_solver(attacks):
    cell = sign_ambiguity.run_sign_cell("gelu", seed=2, max_steps=3, **SIZE)
    assert given(attacks, solver="levenberg-marquardt", start="random", seed=2, max_steps=3)
    assert posed(attacks, "gelu", seed=2)
    X, record = sphere(4, 30, seed=2).X, attacks[0].record
    errors = compare(X, record.samples)
    assert cell == {
        **sign_ambiguity.count_signs(X, record.samples),
        "projection_loss": record.loss,
        "signed_error": errors.signed_error,
        "up_to_sign_error": errors.up_to_sign_error,
        "published_error": errors.published_error,
    }


@pytest.mark.parametrize("unknown", [4, 1])
def test_who_knows_nothing_is_the_attacker_of_the_paper(attacks, unknown):
    cell = knowledge.run_informed_cell(4, 12, unknown, 3.0, seed=2, restarts=2, max_steps=3)
    p = 4 - unknown + 3 * 12 * unknown
    assert (cell["p"], cell["p_over_dn"]) == (p, p / 48)
    data, model = sphere(4, 12, seed=2), RandomFeatures(12, p, seed=2)
    spoke = int((model.features(data.X[:unknown]) != 0).any(0).sum())
    assert cell["telling"] == (spoke - 4 + unknown) / (12 * unknown)
    assert len(attacks) == (unknown == 4)
    if attacks:
        assert given(attacks, n=4, seed=2, restarts=2, max_steps=3)
        assert torch.equal(attacks[0].model.V, model.V)
        record = attacks[0].record
    else:
        theta = fit_min_norm(model, data.X, data.y)
        options = {"seed": 2, "restarts": 2, "max_steps": 3}
        record = reconstruct_unknown(model, theta, unknown, data.X[unknown:], **options)
    assert cell["projection_loss"] == record.loss
    assert cell["signed_error"] == compare(data.X[:unknown], record.samples).signed_error
    assert cell["identifiable"] == record.identifiable


def test_who_lacks_nothing_has_the_parameters_and_features(attacks):
    cell = knowledge.run_knowledge_cell(seed=2, restarts=1, max_steps=3, **SIZE)
    assert posed(attacks, seed=2)
    model, theta, record = vars(attacks[0]).values()
    X = sphere(4, 30, seed=2).X
    errors = compare(X, record.samples)
    assert cell == {
        "p": 240,
        "equations": 240,
        "disturbance": 0,
        "recovered": errors.recovered(),
        "roughly": errors.recovered(0.2),
        "signed_error": errors.signed_error,
        "projection_loss": record.loss,
        "loss_at_truth": float(projection_loss(model, theta, X)),
    }


def test_what_is_lacking_does_not_change_how_the_attack_is_made(attacks):
    knowledge.run_knowledge_cell(lack="V", amount=0.1, seed=2, restarts=2, max_steps=3, **SIZE)
    assert given(attacks, n=4, seed=2, restarts=2, max_steps=3)


def test_a_deletion_is_looked_for_with_the_candidates_asked_for(attacks):
    options = {"seed": 2, "restarts": 2, "max_steps": 3}
    cell = knowledge.run_unlearning_cell(4, 12, 6.0, 2, **options)
    assert given(attacks, n=2, **options)
    model, theta, record = vars(attacks[0]).values()
    data = sphere(4, 12, seed=2)
    X, y = data.X, data.y
    torch.testing.assert_close(theta, fit_min_norm(model, X, y) - fit_min_norm(model, X[1:], y[1:]))
    # In the span of all four features, where the deleted one has the largest weight.
    weights = torch.linalg.lstsq(model.features(X).T, theta.T).solution[:, 0].abs()
    assert cell.pop("weight") == pytest.approx(float(weights[0] / weights[1:].max()), rel=1e-3)
    assert cell == {
        "p": 72,
        "p_over_dn": 72 / 48,
        "deleted_error": pytest.approx(float(torch.cdist(record.samples, X[:1]).min()) / 12**0.5),
        "recovered": compare(X, record.samples).recovered(),
        "projection_loss": record.loss,
        "loss_at_deleted": float(projection_loss(model, theta, X[:1])),
    }


def test_a_defended_model_is_attacked_from_random_starts(attacks):
    options = {"seed": 2, "restarts": 2, "max_steps": 3, "tolerance": 1e-4}
    defences.run_defence_cell("none", n=4, p_over_dn=5.0, test=5, **options)
    assert given(attacks, n=4, start="random", **options)
