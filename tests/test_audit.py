"""The audit against its definitions, on networks small enough to train in a moment."""

import dataclasses
import functools
import math

import pytest
import torch
from torch import nn

from paperlib import confirmed_attack, least_parameters, projection_loss, to_sphere
from paperlib.audit import audit, stretch
from paperlib.checkpoints import check_states_fit, load_state_dict
from paperlib.confirmed_attack import close_rows, repeated, witnessed
from paperlib.experiments.audit import (
    CASES,
    NETWORKS,
    audit_case,
    standardised_digits,
    summary_of,
    train_and_save,
)
from paperlib.last_layer import (
    InputsOfAnyNorm,
    LastLayerInput,
    check_last_layer,
    is_homogeneous,
)
from paperlib.law import most_readable
from paperlib.module_features import Tangents
from paperlib.protections import protections
from paperlib.reconstruct import SOLVERS
from paperlib.stored_rounding import EVERY_STEP, MOST, ONCE, rounding_of

D, WIDTH, C, N = 6, 120, 3, 3
QUICK = {"restarts": 1, "max_steps": 60, "tolerance": 1e-12, "progress": False}


def network(bias=True, dtype=torch.float64):
    torch.manual_seed(1)
    layers = nn.Linear(D, WIDTH, bias=bias), nn.GELU(), nn.Linear(WIDTH, C)
    return nn.Sequential(*layers).to(dtype)


def inputs(n=N):
    X = to_sphere(torch.randn(n, D, generator=torch.Generator().manual_seed(2)).double())
    return X * torch.linspace(0.7, 1.4, n, dtype=X.dtype)[:, None]


def clone(module):
    return {key: value.clone() for key, value in module.state_dict().items()}


def train(module, X, parameters, steps=300, learning_rate=0.1):
    """States before and after plain gradient descent on the cross-entropy."""
    before = clone(module)
    optimiser = torch.optim.SGD(parameters, lr=learning_rate)
    for _ in range(steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(X), torch.arange(len(X)) % C).backward()
        optimiser.step()
    return before, clone(module)


@pytest.fixture(scope="module")
def exact():
    """The last layer alone was trained: theta is a sum of features."""
    torch.manual_seed(0)
    module, X = network(), inputs()
    before, after = train(module, X, module[2].parameters())
    found = audit(
        module,
        before,
        after,
        last_layer="2",
        input_shape=D,
        n=N,
        data=X,
        dtype=torch.float64,
        **QUICK,
    )
    return module, X, before, after, found


def test_inputs_of_any_norm_are_read_back_exactly(exact):
    _, X, _, _, found = exact
    assert found.verdict == "read back" and found.record.explained
    assert found.samples.shape == (N, D) and bool(found.confirmed.all())
    assert float(torch.cdist(X, found.samples).min(1).values.max()) < 1e-6
    assert found.comparison.recovered() == N
    assert found.body_moved == 0 and found.residual_at_truth < 1e-20
    assert found.moved == pytest.approx(
        float((exact[3]["2.weight"] - exact[2]["2.weight"]).norm() / exact[2]["2.weight"].norm())
    )


def test_the_count_is_that_of_the_law(exact):
    found = exact[-1]
    # Rows of a softmax layer move by sums that cancel.
    assert found.independent == C - 1 and found.d_searched == D + 1
    assert found.readable == (C - 1) * WIDTH // (D + C - 1)
    assert found.parameters == C * WIDTH


@pytest.mark.parametrize(("p", "d", "outputs"), [(50, 9, 1), (50, 9, 4), (12, 9, 7), (8, 9, 3)])
def test_readable_is_the_law_solved_for_n(p, d, outputs):
    fits = [n for n in range(1, 200) if least_parameters(n, d, outputs) <= p]
    assert most_readable(p, d, outputs) == max(fits, default=0)


def test_the_answer_is_in_words(exact):
    text = str(exact[-1])
    for part in ("'2': 3 x 120 = 360 parameters", "2 of its 3 rows", "n = 3 (given)", "read back"):
        assert part in text
    assert f"fewer than {least_parameters(N, D + 1, C - 1)} features" in text
    assert repr(exact[-1]) == "Audit('2', n = 3: read back)"


def test_the_number_of_samples_is_estimated(exact):
    module, _, before, after, _ = exact
    found = audit(
        module,
        before,
        after,
        last_layer="2",
        input_shape=D,
        most=4,
        dtype=torch.float64,
        **QUICK,
    )
    assert found.n == N and found.count.jump > 1e3 and "estimated" in str(found)
    assert found.verdict == "read back"


def test_neither_data_nor_weights_of_the_given_module_are_used(exact):
    _, _, before, after, found = exact
    other = network()
    nn.init.zeros_(other[0].weight)
    other.train()
    again = audit(
        other, before, after, last_layer="2", input_shape=D, n=N, dtype=torch.float64, **QUICK
    )
    assert torch.equal(again.samples, found.samples)
    assert again.comparison is None and again.residual_at_truth is None
    assert other.training and not bool(other[0].weight.any())
    assert not other[2]._forward_pre_hooks and not other[2]._forward_hooks


def test_when_all_layers_move_two_attacks_agree_on_what_is_near_the_data():
    module, X = network(), inputs()
    before, after = train(module, X, module.parameters(), steps=100, learning_rate=0.05)
    found = audit(
        module, before, after, last_layer="2", input_shape=D, n=N, data=X, dtype=torch.float64,
        **QUICK,
    )  # fmt: skip
    assert found.body_moved > 0 and found.residual_at_truth > 1e-6
    assert not found.record.explained and found.verdict == "agreed on"
    assert found.record.loss < found.residual_at_truth
    assert found.comparison.recovered(0.2) == N
    unknown = audit(module, before, after, last_layer="2", input_shape=D, dtype=torch.float64)
    assert unknown.verdict == "not attacked" and unknown.record is None and "give n" in str(unknown)


def test_more_samples_than_are_determined_are_not_attacked(exact):
    module, X, before, after, found = exact
    beyond = audit(
        module, before, after, last_layer="2", input_shape=D, n=found.readable + 1, data=X,
        dtype=torch.float64,
    )  # fmt: skip
    assert beyond.verdict == "not determined" and beyond.samples is None
    assert "other data explain" in str(beyond) and beyond.residual_at_truth < 1e-20
    with pytest.raises(ValueError, match="nothing was read back"):
        beyond.pictures((2, 3))
    with pytest.raises(ValueError, match="nothing to protect"):
        protections(beyond)


def test_norms_that_leave_no_trace_are_not_searched_for():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(D, 200, bias=False), nn.ReLU(), nn.Linear(200, C)).double()
    X = inputs()
    before, after = train(module, X, module[2].parameters())
    found = audit(
        module, before, after, last_layer="2", input_shape=D, n=N, data=X, dtype=torch.float64,
        **QUICK,
    )  # fmt: skip
    assert found.d_searched == D and found.comparison.recovered() == N
    norms = torch.linalg.vector_norm(found.samples, dim=1)
    torch.testing.assert_close(norms, torch.full_like(norms, math.sqrt(D)))


def refuse(*_, **__):
    raise AssertionError("an attack was run")


def test_norms_are_named_as_they_were_given(exact):
    module, _, before, after, found = exact
    given = {"last_layer": "2", "input_shape": D, "n": found.readable + 60}
    known = audit(module, before, after, radius=2.0, **given)
    assert "6 numbers, of known norm" in str(known) and known.options["radius"] == 2
    unknown = audit(module, before, after, **given)
    assert "6 numbers, of unknown norm" in str(unknown) and unknown.options["radius"] is None
    relu = nn.Sequential(nn.Linear(D, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, C))
    moved = {k: v + 0.01 * torch.randn(v.shape) for k, v in relu.state_dict().items()}
    silent = audit(relu, relu.state_dict(), moved, **given)
    assert "6 numbers, whose norm leaves no trace" in str(silent)
    assert silent.options["radius"] is None and silent.d_searched == D


def test_all_samples_are_confirmed_where_the_second_attack_explains(exact, monkeypatch):
    module, _, before, after, _ = exact
    attack = confirmed_attack.reconstruct

    def first_stops_early(*given, seed, max_steps, **options):
        return attack(*given, seed=seed, max_steps=max_steps if seed else 1, **options)

    monkeypatch.setattr(confirmed_attack, "reconstruct", first_stops_early)
    found = audit(
        module, before, after, last_layer="2", input_shape=D, n=N, dtype=torch.float64, **QUICK
    )
    assert found.record.options["seed"] == 1 and found.verdict == "read back"
    assert bool(found.confirmed.all())


def test_candidates_that_are_not_needed_are_not_confirmed(exact, monkeypatch):
    module, _, before, after, found = exact
    rows = found.record.samples

    def beside_others(features, theta, n, *, seed, **_):
        others = torch.randn(n - N, D + 1, generator=torch.Generator().manual_seed(seed))
        samples = torch.cat([rows[:1], to_sphere(others.to(rows)), rows[1:]])
        return dataclasses.replace(found.record, samples=samples)

    monkeypatch.setattr(confirmed_attack, "reconstruct", beside_others)
    again = audit(
        module, before, after, last_layer="2", input_shape=D, n=N + 2, dtype=torch.float64, **QUICK
    )
    assert again.confirmed.tolist() == [True, False, False, True, True]
    assert (
        float(again.shares[1:3].max())
        < confirmed_attack.NEEDED
        < float(again.shares[[0, 3, 4]].min())
    )
    assert again.verdict == "partly read back"
    assert "the 3 that two attacks found" in str(again) and "explained; 3 of 5" in str(again)


def test_samples_explained_to_rounding_are_moved_to_where_the_loss_is_least(exact, monkeypatch):
    found = exact[-1]
    features, theta, rows = found.features, found.theta, found.record.samples
    near = to_sphere(rows + 1e-3 * torch.randn(rows.shape, generator=torch.Generator()).to(rows))
    loss = float(projection_loss(features, theta, near))
    options = found.record.options | {"tolerance": 2 * loss}
    record = dataclasses.replace(found.record, samples=near, loss=loss, options=options)
    monkeypatch.setattr(confirmed_attack, "reconstruct", lambda *_, **__: record)
    attack = lambda target: confirmed_attack.attack_twice(  # noqa: E731
        features, theta, N, found.readable, target, {"seed": 0}
    )["record"]
    assert attack(2 * loss) is record  # as far as was asked for
    moved = attack(1e-20)
    assert moved.loss < 1e-6 * loss and moved.passes > record.passes
    assert float((moved.samples - rows).norm()) < 0.01 * float((near - rows).norm())


def test_too_few_samples_are_told_from_samples_that_are_blurred(exact):
    module, X, before, after, _ = exact
    given = {"last_layer": "2", "input_shape": D, "dtype": torch.float64, **QUICK}
    text = str(audit(module, before, after, n=1, data=X, **given))
    assert "there are more samples than that, as 2 independent rows show" in text
    assert "need not be near the data" in text and "near the data as far as" not in text


def test_a_number_of_samples_that_does_not_stand_out_is_not_attacked(exact):
    module, _, before, after, _ = exact
    noise = torch.randn(C, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    after = after | {"2.weight": before["2.weight"] + 0.01 * noise}
    found = audit(
        module, before, after, last_layer="2", input_shape=D, most=3, dtype=torch.float64, **QUICK
    )
    assert found.n is None and found.record is None and found.verdict == "not attacked"
    assert "no number of samples up to 3 stands out" in str(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_rounding_of_stored_weights_is_known(dtype):
    made = torch.Generator().manual_seed(0)
    start, step = torch.randn(2, 30, 500, generator=made, dtype=torch.float64)
    exact = 0.1 * step
    stored = [start.to(dtype), (start + exact).to(dtype)]
    lost = (stored[1].double() - stored[0].double() - exact).square().sum() / exact.square().sum()
    room = ONCE if dtype != torch.float32 else EVERY_STEP
    assert rounding_of(stored) == pytest.approx(room * float(lost), rel=0.2)
    assert rounding_of([stored[0], stored[0]]) == 0
    assert rounding_of([stored[0], stored[0] * (1 + 1e-3)]) <= MOST


def test_what_is_explained_to_the_rounding_of_the_checkpoint_is_read_back(exact):
    module, X, before, after, _ = exact
    states = [{k: v.half() for k, v in state.items()} for state in (before, after)]
    found = audit(
        module, *states, last_layer="2", input_shape=D, n=N, data=X, restarts=1, progress=False
    )
    assert found.verdict == "read back" and "to the rounding of the stored weights" in str(found)
    assert 1e-10 < found.record.loss <= found.rounding < 1e-3
    # Nor does the search end where rounding might begin.
    assert found.record.loss < 1.01 * found.residual_at_truth < found.rounding
    # Rows that should depend on one another do so only up to that.
    assert found.independent == C - 1 and found.comparison.recovered(0.05) == N
    strict = audit(module, *states, last_layer="2", input_shape=D, n=1000, tolerance=1e-9)
    assert strict.options["tolerance"] == 1e-9


def test_an_audit_goes_on_where_it_was_stopped(exact, monkeypatch, tmp_path):
    module, _, before, after, found = exact
    given = {"last_layer": "2", "input_shape": D, "n": N, "dtype": torch.float64, **QUICK}
    first = audit(module, before, after, resume=tmp_path, **given)
    assert torch.equal(first.samples, found.samples)
    solver = "levenberg-marquardt"
    never = functools.wraps(SOLVERS[solver])(lambda *_, **__: refuse())  # with the same options
    monkeypatch.setitem(SOLVERS, solver, never)
    again = audit(module, before, after, resume=tmp_path, **given)
    assert torch.equal(again.samples, first.samples)
    with pytest.raises(AssertionError, match="an attack was run"):  # of inputs of another norm
        audit(module, before, after, resume=tmp_path, radius=2.0, **given)


def test_running_statistics_count_as_layers_below():
    module = nn.Sequential(nn.Linear(D, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, C))
    before, after = clone(module), clone(module)
    after["2.weight"] += 0.01 * torch.randn(C, WIDTH)
    given = {"last_layer": "2", "input_shape": D, "n": 1000}
    assert audit(module, before, after, **given).body_moved == 0
    after["1.running_mean"] += 1
    after["1.num_batches_tracked"] += 1
    assert audit(module, before, after, **given).body_moved > 0


def test_checkpoints_are_subtracted_before_they_are_rounded(exact):
    module, _, before, _, _ = exact
    moves = 1e-9 * torch.randn(C, WIDTH, dtype=torch.float64)
    after = before | {"2.weight": before["2.weight"] + moves}
    found = audit(module, before, after, last_layer="2", input_shape=D, n=1000)
    assert found.theta.dtype == torch.float32
    torch.testing.assert_close(found.theta.double(), moves, rtol=1e-5, atol=1e-14)


def test_the_last_layer_reads_the_same_as_the_layers_below_give():
    module, X = network(), inputs()
    reader = LastLayerInput(module, "2")
    assert torch.equal(reader(X), module[:2](X))
    W = torch.randn(N, WIDTH, dtype=X.dtype)
    ours, theirs = (Tangents(f, X) for f in (reader, module[:2]))
    torch.testing.assert_close(ours.vjp(W), theirs.vjp(W))
    torch.testing.assert_close(ours.jvp(X), theirs.jvp(X))
    J = torch.func.vmap(torch.func.jacrev(lambda x: reader(x[None])[0]))(X)
    torch.testing.assert_close(torch.einsum("ikd,id->ik", J, X), ours.jvp(X))


def test_rows_on_the_sphere_stand_for_inputs_of_any_norm():
    free = InputsOfAnyNorm(nn.Identity(), (2, 3), radius=None)
    Z = torch.tensor([[1.0, 2, 0, 0, 0, 2, 0], [1, 2, 0, 0, 0, 2, 1.5]], dtype=torch.float64)
    x = free.inputs(Z).flatten(1)
    assert free.inputs(Z).shape == (2, 2, 3)
    torch.testing.assert_close(x[0] / x[0].norm(), Z[0, :6] / 3)
    assert float(x[0].norm()) == pytest.approx(math.sqrt(6))
    s = math.sqrt(6) * 1.5 / 3
    assert float(x[1].norm()) == pytest.approx(math.sqrt(6) * math.exp(0.3 * s))
    # Rows on the sphere themselves, towards a pole: every norm can be reached.
    high = free.inputs(to_sphere(torch.tensor([[1.0, 0, 0, 0, 0, 0, 30]]).double()))
    assert float(high.norm()) > 1e6
    fixed = InputsOfAnyNorm(nn.Identity(), (6,), radius=5.0)
    assert fixed.d == 6 and float(fixed.inputs(Z[:1, :6]).norm()) == pytest.approx(5)


def test_homogeneous_features_are_told():
    assert is_homogeneous(nn.Sequential(nn.Linear(4, 9, bias=False), nn.ReLU()), torch.randn(3, 4))
    assert not is_homogeneous(nn.Sequential(nn.Linear(4, 9), nn.ReLU()), torch.randn(3, 4))


def test_noise_hides_and_rounding_does_not(exact):
    table = protections(exact[-1], noise=[3.0], formats=["float16"], restarts=1, progress=False)
    rows = table.set_index("protection")
    assert rows.loc["none", "found"] == N and rows.loc["none", "spoilt"] < 1e-15
    assert rows.loc["float16", "found"] == N and rows.loc["float16", "spoilt"] < 0.01
    assert rows.loc["noise of 3", "found"] < N
    assert rows.loc["noise of 3", "spoilt"] == pytest.approx(3, rel=0.2)
    theta = exact[-1].theta + (exact[-1].start + exact[-1].theta).half().double()
    theta = theta - exact[-1].start - exact[-1].theta
    spoilt = float((theta - exact[-1].theta).norm() / exact[-1].theta.norm())
    assert rows.loc["float16", "spoilt"] == pytest.approx(spoilt)
    truth = projection_loss(exact[-1].features, theta, exact[-1].record.samples)
    assert rows.loc["float16", "loss"] <= float(truth) * (1 + 1e-6)
    for wrong in ({"noise": [0.0]}, {"formats": ["int3"]}):
        with pytest.raises(ValueError, match="noise must|formats must"):
            protections(exact[-1], **wrong)


def test_a_candidate_there_is_a_witness_for_one_here():
    A = torch.tensor([[3.0, 4.0], [3.0, 4.1], [-3.0, 4.0], [0.0, 5.0]])
    assert witnessed(A, A[:1]).tolist().count(True) == 1 and witnessed(A, A[:1])[:2].any()
    assert witnessed(A, A[[1, 3, 0]]).tolist() == [True, True, False, True]
    assert witnessed(A, A.flip(0)).all() and not witnessed(A, -A).any()
    assert repeated(A).tolist() == [False, True, False, False]


def test_two_candidates_on_one_sample_are_not_two_samples(exact, monkeypatch):
    """As a guess of n that is too large leads to."""
    module, X, before, after, found = exact
    rows = found.record.samples
    beside = to_sphere(
        rows[:1] + 0.05 * rows.norm(dim=1).mean() * torch.eye(1, rows.shape[1]).to(rows)
    )
    far = -rows[:1]
    options = {"last_layer": "2", "input_shape": D, "dtype": torch.float64, **QUICK}

    def audited(*attacks):
        records = iter([dataclasses.replace(found.record, samples=torch.cat(a)) for a in attacks])
        monkeypatch.setattr(confirmed_attack, "reconstruct", lambda *_, **__: next(records))
        again = audit(module, before, after, n=N + 1, **options)
        assert again.verdict == "partly read back"
        return again

    # Twice in both attacks: neither of the two is needed, and one of them is a sample.
    again = audited((rows, rows[:1]), (rows, rows[:1]))
    assert again.shares[[0, N]].abs().max() < 1e-9 < again.shares[1:N].min()
    assert again.confirmed.tolist() == [True] * N + [False]
    # A superfluous one near a sample, which has but one witness: the nearer of them is confirmed.
    again = audited((beside, rows), (rows, far))
    assert again.confirmed.tolist() == [False] + [True] * N


@pytest.mark.parametrize("radius", [None, 3.0])
def test_an_input_of_zeros_among_the_data_is_no_direction(exact, radius):
    module, X, before, after, _ = exact
    options = {"last_layer": "2", "input_shape": D, "dtype": torch.float64}
    options |= {"n": 2, "radius": radius, "restarts": 1, "max_steps": 2}
    for data in (torch.cat([X[:-1], 0 * X[:1]]), 0 * X):
        found = audit(module, before, after, data=data, **options)
        assert math.isfinite(found.comparison.signed.max())


def test_rows_that_recur():
    A = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    B = torch.tensor([[3.0, 4.9], [1.0, 0.0]])
    assert close_rows(A, B).tolist() == [True, False]


def test_pictures(exact):
    pictures = exact[-1].pictures((2, 3))
    assert pictures.shape == (N, 2, 3) and pictures.min() == 0 and pictures.max() == 1
    assert stretch(torch.randn(2, 12), (1, 3, 4)).shape == (2, 3, 4)
    assert stretch(torch.randn(2, 12), (3, 2, 2)).shape == (2, 2, 2, 3)
    with pytest.raises(ValueError, match="6 pixels in all"):
        exact[-1].pictures((2, 2))
    with pytest.raises(ValueError, match=r"image_shape must be \(H, W\), .* got \(5, 3, 2\)"):
        stretch(torch.randn(2, 30), (5, 3, 2))


# The experiment


@pytest.mark.parametrize("case", CASES)
def test_networks_are_trained_and_saved(tmp_path, case):
    network, layers = CASES[case]
    make, last, _ = NETWORKS[network]
    data, X = standardised_digits(4)
    assert float(X.norm(dim=1).std()) > 0.05
    torch.testing.assert_close(X * (8 / X.norm(dim=1, keepdim=True)), data.X)
    before, after, loss = train_and_save(
        network, X, data.class_index, tmp_path, layers=layers, target=0.5
    )
    assert before.suffix == ".pt" and after.suffix == ".safetensors" and loss <= 0.5
    start, end = load_state_dict(before), load_state_dict(after)
    check_states_fit(make(), {"start": start, "end": end})
    moved = {key for key in start if not torch.equal(start[key], end[key])}
    assert moved == (set(start) if layers == "all" else {f"{last}.weight", f"{last}.bias"})


@pytest.fixture(scope="module")
def last_layer_case():
    return audit_case("perceptron, last layer", 2, seed=3, restarts=1, max_steps=40)


def test_a_case_is_audited_with_its_own_network_and_data(last_layer_case):
    found = last_layer_case
    assert (found.last_layer, found.p, found.outputs, found.n) == ("2", 640, 10, 2)
    assert found.body_moved == 0 and found.moved > 0  # only the last layer was trained
    assert found.residual_at_truth < 1e-8  # judged by the data it was trained on
    assert found.options["seed"] == 3 and found.options["max_steps"] == 40


def test_a_summary_is_what_the_audit_found(last_layer_case):
    found = last_layer_case
    assert summary_of(found) == {
        "parameters": 6400,
        "readable": found.readable,
        "below moved": 0.0,
        "verdict": found.verdict,
        "agreed on": int(found.confirmed.sum()),
        "residual": found.residual_at_truth,
        "error": found.comparison.signed_error,
    }


def test_a_summary_where_nothing_was_attacked(exact):
    module, X, before, after, found = exact
    many = found.readable + 1
    found = audit(module, before, after, last_layer="2", input_shape=D, n=many, data=X)
    summary = summary_of(found)
    assert summary["verdict"] == "not determined" and summary["agreed on"] == 0
    assert summary["error"] is None and summary["residual"] == found.residual_at_truth


def test_cases_without_sense_are_refused(tmp_path):
    with pytest.raises(ValueError, match="case must be one of perceptron, all layers"):
        audit_case("perceptron", 3)
    for wrong in ({"network": "x"}, {"layers": "first"}, {"target": 0.0}):
        options = {
            "network": "perceptron",
            "inputs": torch.zeros(1),
            "classes": torch.zeros(1),
        } | wrong
        with pytest.raises(ValueError, match="must be"):
            train_and_save(folder=tmp_path, **options)


# What a user does wrong


class Twice(nn.Module):
    """A network whose last layer is used in a way of its own."""

    def __init__(self, way):
        super().__init__()
        self.body, self.head, self.way = nn.Linear(D, D), nn.Linear(D, D), way
        if way == "tied":
            self.head.weight = self.body.weight

    def forward(self, x):
        h = torch.tanh(self.body(x))
        if self.way == "twice":
            return self.head(torch.tanh(self.head(h)))
        return self.head(torch.stack([h, -h], dim=1)) if self.way == "tokens" else self.head(h)


class Rooted(nn.Module):
    """A network with a parameter of its own beside its layers, as a transformer's class token."""

    def __init__(self):
        super().__init__()
        self.token, self.top = nn.Parameter(torch.ones(D)), nn.Module()
        self.top.scale, self.top.head = nn.Parameter(torch.ones(D)), nn.Linear(D, C)
        self.top.forward = lambda x: self.top.head(self.top.scale * x)

    def forward(self, x):
        return self.top(torch.tanh(x + self.token))


def test_what_holds_the_last_layer_may_have_parameters():
    module = Rooted()
    layer = check_last_layer(module, "top.head", torch.randn(2, D))
    assert layer is module.top.head and not layer._forward_pre_hooks


@pytest.mark.parametrize(
    ("make", "layer", "message"),
    [
        (network, "9", "last_layer '9' is not there: linear layers are '0', '2'"),
        (network, "1", "must be a torch.nn.Linear, got GELU"),
        (network, "0", "not the end of the module: '2' with parameters"),
        (lambda: Twice("twice"), "head", "called once for each input, got 2"),
        (lambda: Twice("tied"), "head", "used in two places"),
        (lambda: Twice("tokens"), "head", r"one row of 6 features .* got \(3, 2, 6\)"),
    ],
)
def test_layers_that_are_no_last_layer_are_refused(make, layer, message):
    before, after = clone(make()), clone(make())
    after[next(iter(after))] += 1
    for key in after:
        after[key] = after[key] + 0.01
    with pytest.raises(ValueError, match=message):
        audit(make(), before, after, last_layer=layer, input_shape=D, n=2)


class Trunk(nn.Module):
    """A network whose lower part is kept from training in a way of its own."""

    def __init__(self, way):
        super().__init__()
        self.trunk, self.head, self.way = nn.Linear(D, WIDTH), nn.Linear(WIDTH, C), way

    def forward(self, x):
        if self.way == "no_grad":
            with torch.no_grad():
                return self.head(torch.tanh(self.trunk(x)))
        if self.way == "detach":
            return self.head(torch.tanh(self.trunk(x)).detach())
        if self.way == "assert":
            assert x.ndim == 3, "expected sequences"
        return self.head(nn.functional.dropout(torch.tanh(self.trunk(x)), 0.5))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("no_grad", "Trunk has no derivative in its inputs: .* torch.no_grad"),
        ("detach", "Trunk has no derivative in its inputs: .* detached"),
        ("dropout", r"Trunk returns something else when called again .*F.dropout without training"),
        ("assert", r"does not take real inputs of shape \(6\): AssertionError: expected sequences"),
    ],
)
def test_modules_that_cannot_be_attacked_as_they_are(way, message):
    module = Trunk(way)
    before = clone(module)
    after = {key: value + 0.01 for key, value in before.items()}
    with pytest.raises(ValueError, match=message):
        audit(module, before, after, last_layer="head", input_shape=D, n=2)


def test_equal_states_are_refused(exact):
    module, _, before, _, _ = exact
    with pytest.raises(ValueError, match="the same before and after"):
        audit(module, before, before, last_layer="2", input_shape=D, n=2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be at least 1"),
        ({"radius": -1.0}, ValueError, "radius must be above 0"),
        ({"input_shape": 0}, ValueError, "input_shape must be at least 1"),
        ({"input_shape": 5}, ValueError, r"real inputs of shape \(5\): RuntimeError: mat1"),
        ({"data": torch.ones(2, 5)}, ValueError, r"shape \(n, 6\), got \(2, 5\)"),
        ({"data": [1.0]}, TypeError, "data must be a tensor"),
        ({"data": torch.full((2, D), math.nan)}, ValueError, "data must be finite, got 12"),
        ({"before": "nowhere.pt"}, FileNotFoundError, "no checkpoint at nowhere.pt"),
        ({"module": "net"}, TypeError, "torch.nn.Module, got str"),
        ({"most": -1}, ValueError, "most must be at least 1, got -1"),
        ({"restarts": 0}, ValueError, "restarts must be at least 1, got 0"),
        ({"max_steps": 1.5}, TypeError, "max_steps must be a whole number, got 1.5"),
        ({"tolerance": 1.0}, ValueError, "tolerance must be above 0 and below 1"),
        ({"seed": 2**63 - 1}, ValueError, r"seed must be at least 0 and below 2\^63"),
    ],
)
def test_other_bad_input_is_refused_before_any_attack(exact, monkeypatch, options, error, message):
    monkeypatch.setattr(confirmed_attack, "reconstruct", refuse)
    module, _, before, after, _ = exact
    given = {"module": module, "before": before, "after": after, "last_layer": "2"}
    given |= {"input_shape": D, "n": N} | options
    with pytest.raises(error, match=message):
        audit(**given)
