"""Attackers who know less or more: projected features against dense oracles, and what cells say."""

import math
from dataclasses import replace

import pytest
import torch

from paperlib import (
    ModuleFeatures,
    RandomFeatures,
    SubspaceFeatures,
    compare,
    fit_min_norm,
    projection_loss,
    quantise,
    reconstruct,
    reconstruct_unknown,
    sphere,
    sweep,
)
from paperlib.experiments.knowledge import (
    check_informed_cell,
    check_knowledge_cell,
    check_unlearning_cell,
    run_informed_cell,
    run_knowledge_cell,
    run_unlearning_cell,
    weakened,
)
from paperlib.known_samples import WithoutKnown
from paperlib.law import numbers_per_unknown

DOUBLE = torch.float64
N, D, P, M = 3, 6, 40, 2


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.fixture(params=["random", "module"])
def model(request):
    if request.param == "random":
        return RandomFeatures(D, P, "relu+tanh", seed=1, dtype=DOUBLE)
    body = torch.nn.Sequential(torch.nn.Linear(D, P), torch.nn.GELU()).double()
    with torch.no_grad():
        body[0].weight.copy_(normal(P, D, seed=1))
        body[0].bias.copy_(normal(P, seed=2))
    return ModuleFeatures(body, D)


def test_projected_products_against_dense_ones(model):
    known = sphere(M, D, seed=4, dtype=DOUBLE).X
    rest = WithoutKnown(model, known)
    Phi = model.features(known)
    projector = torch.eye(P, dtype=DOUBLE) - torch.linalg.pinv(Phi) @ Phi
    X = sphere(N, D, seed=5, dtype=DOUBLE).X
    dX, W = normal(N, D, seed=6), normal(N, P, seed=7)
    torch.testing.assert_close(rest.features(X), model.features(X) @ projector)
    torch.testing.assert_close(rest.jvp(X, dX), model.jvp(X, dX) @ projector)
    torch.testing.assert_close(rest.vjp(X, W), model.vjp(X, W @ projector))
    torch.testing.assert_close(rest.features(known), torch.zeros(M, P, dtype=DOUBLE))


def test_the_loss_is_that_of_all_samples_together(model):
    """Projecting the known off leaves the residual of the known and the candidates together."""
    data = sphere(N + M, D, seed=5, dtype=DOUBLE)
    theta = fit_min_norm(model, data.X, data.y)
    known, candidates = data.X[N:], sphere(N, D, seed=8, dtype=DOUBLE).X
    rest = WithoutKnown(model, known)
    left = rest.off(theta)
    ours = projection_loss(rest, left, candidates) * left.square().sum()
    together = projection_loss(model, theta, torch.cat([candidates, known]))
    torch.testing.assert_close(ours, together * theta.square().sum())
    assert float(projection_loss(rest, left, data.X[:N])) < 1e-20


def test_lifting_projects_the_columns_of_v_off_as_well():
    model = RandomFeatures(D, P, "relu", seed=1, dtype=DOUBLE)
    known = sphere(M, D, seed=4, dtype=DOUBLE).X
    rest = WithoutKnown(model, known, lift=True)
    spanning = torch.cat([model.features(known), model.V.T])
    projector = torch.eye(P, dtype=DOUBLE) - torch.linalg.pinv(spanning) @ spanning
    X = sphere(N, D, seed=5, dtype=DOUBLE).X
    torch.testing.assert_close(rest.features(X), 0.5 * (X @ model.V.T).abs() @ projector)
    torch.testing.assert_close(rest.features(X), rest.features(-X))
    torch.testing.assert_close(rest.off(model.features(X)), rest.features(X))
    W = normal(N, P, seed=7)
    signs = 0.5 * (X @ model.V.T).sign()
    torch.testing.assert_close(rest.vjp(X, W), (signs * (W @ projector)) @ model.V)


def test_wrong_signs_are_mended_by_a_lifted_attempt():
    cell = run_informed_cell(6, 32, 2, 5.0, seed=0, restarts=2, max_steps=25)
    assert cell["recovered"] == 2 and cell["projection_loss"] < 1e-9


def test_the_record_tells_of_the_lifted_attempt(monkeypatch):
    data = sphere(6, 32, seed=0)
    model = RandomFeatures(32, 4 + 5 * 32 * 2, seed=0)
    theta = fit_min_norm(model, data.X, data.y)
    options = {"restarts": 1, "max_steps": 25, "progress": False}
    true = reconstruct_unknown(model, theta, 2, data.X[2:], **options)
    assert true.explained
    # An attempt that stops at once, then one that finds the samples up to sign.
    wrong = replace(true, samples=sphere(2, 32, 9).X, loss=0.5, explained=False, restart=0)
    turned = replace(true, samples=-true.samples, restart=3, elimination_losses=[0.25])
    records = iter([wrong, turned])
    monkeypatch.setattr("paperlib.known_samples.reconstruct", lambda *a, **o: next(records))
    found = reconstruct_unknown(model, theta, 2, data.X[2:], **options)
    assert found.explained and compare(data.X[:2], found.samples).recovered() == 2
    assert (found.restart, found.elimination_losses) == (3, [0.25])
    last = found.stages[-1]
    assert (last["stage"], last["restart"], last["loss"]) == ("finish", 3, found.loss)
    assert found.passes == 2 * true.passes + last["passes"]
    assert found.seconds == 2 * true.seconds + last["seconds"]


def test_the_lifted_attempt_follows_one_by_messages():
    """Which need all features, and refuse the lifted ones."""
    data = sphere(6, 32, seed=0)
    model = RandomFeatures(32, 4 + 5 * 32 * 2, seed=0)
    theta = fit_min_norm(model, data.X, data.y)
    options = {"restarts": 1, "max_steps": 1, "progress": False}
    record = reconstruct_unknown(model, theta, 2, data.X[2:], start="messages", **options)
    assert not record.explained and "finish" in [stage["stage"] for stage in record.stages]


def test_known_samples_that_are_being_optimised_are_taken_as_they_are(model):
    known = sphere(M, D, seed=4, dtype=DOUBLE).X
    rest = WithoutKnown(model, known.clone().requires_grad_())
    assert not rest.projected_off.requires_grad
    assert torch.equal(rest.projected_off, WithoutKnown(model, known).projected_off)


def test_known_samples_are_projected_off_in_low_precision_too():
    model = RandomFeatures(D, P, seed=1)
    rest = WithoutKnown(model, sphere(M, D, seed=4).X)
    X = sphere(N, D, seed=5).X
    low = torch.cat([b.linearize(X.bfloat16())[0] for b in rest.blocks(dtype=torch.bfloat16)], 1)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), rest.features(X), rtol=0, atol=0.05)


def test_a_subspace_keeps_what_is_known_of_the_model():
    model = WithoutKnown(RandomFeatures(D, P, seed=1, dtype=DOUBLE), normal(M, D, seed=2))
    inner = SubspaceFeatures(model, normal(D, 4, seed=3))
    theta = normal(1, P, seed=4)
    assert inner.projected_off is model.projected_off
    assert numbers_per_unknown(inner, theta, 2) == (P - M) / (2 * 4)
    model.group = object()
    assert SubspaceFeatures(model, normal(D, 4, seed=3)).group is model.group


def test_samples_known_twice_count_once():
    model = RandomFeatures(D, P, seed=1, dtype=DOUBLE)
    known = sphere(M, D, seed=4, dtype=DOUBLE).X
    assert len(WithoutKnown(model, torch.cat([known, known])).projected_off) == M


def test_what_is_known_need_not_be_found():
    n, d, k = 6, 20, 2
    data = sphere(n, d, seed=3)
    model = RandomFeatures(d, 100, "relu+tanh", seed=3)  # 100 < d n = 120, and 2.4 times d k
    theta = fit_min_norm(model, data.X, data.y)
    options = {"restarts": 8, "max_steps": 60, "progress": False}
    record = reconstruct_unknown(model, theta, k, data.X[k:], **options)
    assert record.samples.shape == (k, d) and record.identifiable and record.explained
    assert compare(data.X[:k], record.samples).recovered() == k
    alone = reconstruct(model, theta, n, restarts=1, max_steps=20, progress=False)
    assert compare(data.X, alone.samples).recovered() < n and not alone.identifiable


@pytest.mark.parametrize("seed", [0, 1])
def test_near_one_equation_a_number_the_unknown_are_found_by_messages(seed):
    """Not by descent alone."""
    n, d, k = 8, 60, 4
    data = sphere(n, d, seed=seed)
    model = RandomFeatures(d, n - k + round(1.3 * d * k), seed=seed)
    theta = fit_min_norm(model, data.X, data.y)
    found = {}
    for start in ("auto", "random"):
        options = {"start": start, "restarts": 5, "seed": seed, "progress": False}
        record = reconstruct_unknown(model, theta, k, data.X[k:], **options)
        found[start] = compare(data.X[:k], record.samples).recovered()
    assert found["auto"] == k > found["random"]


def test_features_that_are_zero_at_all_unknown_samples_do_not_tell():
    ratio = 1.8
    for k, name, share in ((1, "relu", 0.5), (2, "relu", 0.75), (1, "relu+tanh", 1.0)):
        cell = run_informed_cell(4, 100, k, ratio, name, restarts=1, max_steps=1)
        assert cell["telling"] == pytest.approx(share * ratio, rel=0.1)
        assert cell["identifiable"] == (share * ratio > 1)


def test_known_samples_use_equations_up():
    n, d = 6, 10
    data = sphere(n, d, seed=3)
    model = RandomFeatures(d, d + 3, seed=3)
    theta = fit_min_norm(model, data.X, data.y)
    record = reconstruct_unknown(
        model, theta, 1, data.X[1:], restarts=1, max_steps=3, progress=False
    )
    # p = 13 > d = 10, but 5 equations belong to the known samples.
    assert not record.identifiable and "expected to be the training data" not in record.status


def test_parameters_without_an_unknown_sample_are_refused():
    data = sphere(3, D, seed=3)
    model = RandomFeatures(D, P, seed=1)
    theta = fit_min_norm(model, data.X, data.y)
    with pytest.raises(ValueError, match="the known samples explain the parameters"):
        reconstruct_unknown(model, theta, 1, data.X)


@pytest.mark.parametrize(
    ("known", "error", "message"),
    [
        (torch.ones(2, D + 1), ValueError, r"known must have shape \(n, 6\), got \(2, 7\)"),
        (torch.ones(2, D, dtype=DOUBLE), TypeError, "known must have the model's dtype"),
        (torch.full((1, D), math.nan), ValueError, "known must be finite"),
        (torch.ones(P, D), ValueError, "40 known samples leave nothing of 40 features"),
        ([1.0], TypeError, "known must be a torch tensor, got list"),
    ],
)
def test_bad_known_samples_are_refused(known, error, message):
    model = RandomFeatures(D, P, seed=1)
    with pytest.raises(error, match=message):
        reconstruct_unknown(model, torch.ones(1, P), 1, known)


def lacking(lack, **options):
    data = sphere(4, 12, seed=2)
    model = RandomFeatures(12, 240, "relu", seed=2)
    options = {"amount": 0.0, "format": None, "seed": 2} | options
    return model, data, weakened(model, data.X, data.y, lack, **options)


def test_an_unknown_start_disturbs_by_its_relative_size():
    model, data, (attack, theta, disturbance) = lacking("theta_0", amount=0.1)
    assert attack is model and disturbance == pytest.approx(0.1, rel=0.2)
    loss = float(projection_loss(attack, theta, data.X))
    # Of a random start, p - n of p directions lie off the span of the features.
    assert math.sqrt(loss) == pytest.approx(0.1, rel=0.25)
    fitted = (model.features(data.X) @ theta.T)[:, 0]
    torch.testing.assert_close(fitted, data.y, rtol=1e-3, atol=1e-3)


def test_wrong_features_are_wrong_by_the_amount():
    model, _, (attack, _, disturbance) = lacking("V", amount=0.1)
    change = (attack.V - model.V).norm() / model.V.norm()
    assert float(change) == pytest.approx(0.1, rel=0.1)
    assert disturbance == pytest.approx(0.1, rel=0.2)


def test_withheld_parameters_leave_a_smaller_model():
    model, data, (attack, theta, _) = lacking("parameters", amount=0.75)
    assert attack.p == theta.shape[1] == 60
    assert float(projection_loss(attack, theta, data.X)) < 1e-10
    whole = fit_min_norm(model, data.X, data.y)[0].tolist()
    assert set(theta[0].tolist()) <= set(whole)


@pytest.mark.parametrize("lack", ["theta_0", "V", "parameters"])
def test_what_is_lacking_is_drawn_from_the_seed_alone(lack):
    def drawn(seed):
        torch.rand(3)  # wherever the global stream is
        _, data, (attack, theta, _) = lacking(lack, amount=0.5, seed=seed)
        return attack.V @ data.X[0], theta

    first, again, other = drawn(2), drawn(2), drawn(3)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(torch.cat([first[0], first[1][0]]), torch.cat([other[0], other[1][0]]))


def test_digits_are_those_of_quantise():
    model, data, (attack, theta, disturbance) = lacking("digits", format="int4")
    exact = fit_min_norm(model, data.X, data.y)
    assert attack is model and torch.equal(theta, quantise(exact, "int4"))
    assert disturbance == pytest.approx(float((theta - exact).norm() / exact.norm()))


def test_the_difference_of_two_models_lies_in_the_span_of_all_samples():
    cell = run_unlearning_cell(3, 10, 9.0, 3, seed=0, max_steps=30)
    assert cell["recovered"] == 3 and cell["deleted_error"] < 0.05
    assert cell["weight"] > 1 and cell["loss_at_deleted"] > 1e-3


def test_cells_of_ignorance_and_knowledge():
    assert run_knowledge_cell(3, 16, 5.0, seed=0)["recovered"] == 3
    lost = run_knowledge_cell(3, 16, 5.0, "digits", format="sign", seed=0)
    assert lost["recovered"] == 0 and lost["disturbance"] > 0.3
    informed = run_informed_cell(4, 16, 1, 4.0, seed=0)
    assert informed["p"] == 3 + 64 and informed["p_over_dn"] == pytest.approx(67 / 64)
    assert informed["share"] == 1


def test_a_sweep_of_cells(tmp_path):
    grid = [{"n": 3, "d": 8, "p_over_dn": 4.0, "lack": "digits", "format": "int8", "max_steps": 9}]
    options = {"store": tmp_path, "check": check_knowledge_cell, "client": False, "progress": False}
    table = sweep(run_knowledge_cell, grid, **options)
    assert list(table.status) == ["ok"] and float(table.disturbance.iloc[0]) < 0.05


KNOWLEDGE = {"n": 3, "d": 9, "p_over_dn": 2.0, "lack": "V", "amount": 0.1, "format": None}
INFORMED = {"n": 3, "d": 9, "unknown": 1, "p_over_dk": 2.0}
UNLEARNING = {"n": 3, "d": 9, "p_over_d": 2.0, "candidates": 1}
COMMON = {"activation": "relu", "seed": 0, "restarts": 1, "max_steps": 5}


@pytest.mark.parametrize(
    ("check", "cell", "change", "message"),
    [
        (check_knowledge_cell, KNOWLEDGE, {"lack": "luck"}, "lack must be one of nothing"),
        (check_knowledge_cell, KNOWLEDGE, {"lack": "digits", "amount": 0.0}, "format must be one"),
        (check_knowledge_cell, KNOWLEDGE, {"format": "int8"}, "format is for lack='digits'"),
        (check_knowledge_cell, KNOWLEDGE, {"lack": "nothing"}, "takes no amount, got 0.1"),
        (check_knowledge_cell, KNOWLEDGE, {"lack": "parameters", "amount": 1.0}, "amount must be"),
        (
            check_knowledge_cell,
            KNOWLEDGE,
            {"lack": "parameters", "amount": 0.97},
            "at least n = 3 parameters, got 2",
        ),
        (check_informed_cell, INFORMED, {"unknown": 4}, "unknown must be at most n = 3, got 4"),
        (check_informed_cell, INFORMED, {"p_over_dk": 0.01}, "p_over_dk is too small"),
        (check_informed_cell, INFORMED, {"activation": "x"}, "activation must be one of"),
        (check_unlearning_cell, UNLEARNING, {"n": 1}, "n must be at least 2"),
        (check_unlearning_cell, UNLEARNING, {"p_over_d": 0.1}, "p must be at least n = 3, got 1"),
    ],
)
def test_cells_are_checked(check, cell, change, message):
    check(**cell, **COMMON)
    with pytest.raises(ValueError, match=message):
        check(**(cell | COMMON | change))
