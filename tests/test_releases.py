"""Combined releases against what must not change, and an attack that one release withstands."""

import math

import pytest
import torch

from paperlib import RandomFeatures, fit_min_norm, projection_loss, sphere, sweep
from paperlib.experiments.releases import (
    KINDS,
    check_release_cell,
    run_release_cell,
    train_releases,
)
from paperlib.releases import (
    combine_releases,
    differences,
    gradient_descent_checkpoints,
    release_spectrum,
)

DOUBLE = torch.float64


def heads(releases=3, *, n=4, d=8, p=40, dtype=DOUBLE, kind="labels"):
    data = sphere(n, d, seed=2, dtype=dtype)
    model = RandomFeatures(d, p, "relu+tanh", seed=2, dtype=dtype)
    return model, data.X, train_releases(model, data.X, releases, kind, seed=2)


def distance_to_span(thetas, model, X):
    Q = torch.linalg.qr(model.features(X).T)[0]
    stack = torch.cat([theta.reshape(-1, model.p) for theta in thetas])
    return (stack - stack @ Q @ Q.T).norm() / stack.norm()


def test_rows_are_orthonormal_and_span_the_releases():
    _, _, thetas = heads()
    Theta = combine_releases(thetas)
    torch.testing.assert_close(Theta @ Theta.T, torch.eye(3, dtype=DOUBLE))
    stack = torch.cat(thetas)
    torch.testing.assert_close(stack @ Theta.T @ Theta, stack)


def test_the_loss_does_not_depend_on_how_the_releases_are_mixed():
    model, _, thetas = heads()
    candidates = sphere(4, 8, seed=9, dtype=DOUBLE).X
    mixture = torch.randn(3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    mixed = [mixture @ torch.cat(thetas)]
    losses = [
        float(projection_loss(model, combine_releases(t), candidates))
        for t in (thetas, mixed, [1e-6 * thetas[0], thetas[1], 300 * thetas[2]])
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[2] == pytest.approx(losses[0], rel=1e-9)
    raw = [float(projection_loss(model, torch.cat(t), candidates)) for t in (thetas, mixed)]
    assert raw[1] != pytest.approx(raw[0], rel=1e-3)


def test_dependent_releases_are_left_out():
    _, _, thetas = heads(2)
    assert len(combine_releases([*thetas, thetas[0] + thetas[1]])) == 2
    assert len(combine_releases([thetas[0], -2 * thetas[0]])) == 1
    _, _, many = heads(9)
    assert len(combine_releases(many)) == 4  # the span of n = 4 features
    nearly = [thetas[0], thetas[0] + 1e-3 * thetas[1]]
    assert len(combine_releases(nearly)) == 2
    assert len(combine_releases(nearly, least=0.1)) == 1


def test_the_default_cut_is_the_square_root_of_the_rounding_unit():
    rows = torch.eye(2, 5, dtype=DOUBLE)
    nearly = [rows[0], rows[0] + 1e-5 * rows[1]]
    assert len(combine_releases(nearly)) == 2
    assert len(combine_releases([row.float() for row in nearly])) == 1
    assert len(combine_releases([nearly[0], nearly[1].float()])) == 1  # the coarser one counts


def test_shapes_and_dtype():
    _, _, thetas = heads(3, dtype=torch.float32)
    Theta = combine_releases([thetas[0][0], torch.cat(thetas[1:])])
    assert Theta.shape == (3, 40) and Theta.dtype == torch.float32


def test_spectrum_of_two_releases_is_their_angle():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([5.0, 5.0])
    cosine = math.cos(math.pi / 4)
    expected = math.sqrt((1 - cosine) / (1 + cosine))
    torch.testing.assert_close(
        release_spectrum([a, b]), torch.tensor([1, expected], dtype=DOUBLE), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_releases_of_every_kind_lie_in_the_span_of_the_features(kind):
    model, X, thetas = heads(4, kind=kind)
    assert len(thetas) == (3 if kind == "unknown start" else 4)
    assert distance_to_span(thetas, model, X) < 1e-10
    assert len(combine_releases(thetas)) == len(thetas)


def test_without_the_start_a_release_is_not_in_the_span_and_differences_are():
    model, X, thetas = heads(3)
    start = torch.randn(1, 40, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    released = [start + theta for theta in thetas]
    assert distance_to_span(released, model, X) > 0.1
    assert distance_to_span(differences(released), model, X) < 1e-10


def test_checkpoints_are_those_of_gradient_descent():
    model, X, _ = heads()
    y = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=DOUBLE)
    Phi = model.features(X)
    step = 1.3 / torch.linalg.matrix_norm(Phi, 2) ** 2
    theta, expected = torch.zeros(1, 40, dtype=DOUBLE), []
    for k in range(1, 8):
        theta = theta - step * (Phi @ theta.T - y[:, None]).T @ Phi
        if k in (1, 3, 7):
            expected.append(theta)
    saved = gradient_descent_checkpoints(Phi, y, [1, 3, 7], step_scale=1.3)
    for ours, theirs in zip(saved, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    late = gradient_descent_checkpoints(Phi, y, [10**9])[0]
    torch.testing.assert_close(late, fit_min_norm(model, X, y))


def test_heads_together_give_away_what_one_head_hides():
    together = run_release_cell(5, 20, 0.6, 5)
    alone = run_release_cell(5, 20, 0.6, 1)
    assert together["recovered"] == 5 and together["projection_loss"] < 1e-9
    assert together["numbers"] == 5 * 60 and together["unknowns"] == 5 * 24
    assert alone["recovered"] == 0


def test_more_releases_than_samples_count_as_n():
    cell = run_release_cell(3, 10, 1.5, 7)
    assert cell["rank"] == 3 and cell["unknowns"] == 3 * 12 and cell["recovered"] == 3


def test_a_sweep_of_release_cells(tmp_path):
    grid = [{"n": 3, "d": 8, "p_over_dn": 2.0, "releases": T, "max_steps": 20} for T in (2, 3)]
    options = {"store": tmp_path, "check": check_release_cell, "client": False, "progress": False}
    table = sweep(run_release_cell, grid, **options)
    assert list(table.status) == ["ok", "ok"] and (table.recovered == 3).all()


@pytest.mark.parametrize(
    ("thetas", "error", "message"),
    [
        ([], ValueError, "at least one release"),
        (torch.ones(2, 4), TypeError, "a list of releases"),
        ([torch.ones(4), torch.ones(5)], ValueError, "release 1 must have shape"),
        ([torch.ones(4), torch.zeros(4)], ValueError, "vector 1 of the releases is zero"),
        ([torch.ones(4), torch.tensor([1.0, math.nan, 0, 0])], ValueError, "release 1 must be fin"),
        ([torch.ones(4, dtype=torch.int64)], TypeError, "floating-point"),
    ],
)
def test_bad_releases_are_refused(thetas, error, message):
    with pytest.raises(error, match=message):
        combine_releases(thetas)


def test_other_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        differences([torch.ones(3)])
    with pytest.raises(ValueError, match="one shape"):
        differences([torch.ones(3), torch.ones(1, 3)])
    with pytest.raises(ValueError, match="least must"):
        combine_releases([torch.ones(3)], least=1.0)
    with pytest.raises(ValueError, match="steps must"):
        gradient_descent_checkpoints(torch.ones(2, 3), torch.ones(2), [])
    with pytest.raises(ValueError, match="step_scale"):
        gradient_descent_checkpoints(torch.ones(2, 3), torch.ones(2), [1], step_scale=2.0)
    cell = {
        "n": 3,
        "d": 8,
        "p_over_dn": 2.0,
        "releases": 2,
        "activation": "relu",
        "kind": "labels",
        "combination": "orthonormal",
        "lift": None,
        "start": "auto",
        "seed": 0,
        "restarts": 1,
        "max_steps": 9,
        "dtype": "float32",
    }
    check_release_cell(**cell)
    wrong = [
        ({"releases": 0}, "releases"),
        ({"p_over_dn": 0.01}, "at least n"),
        ({"kind": "x"}, "kind"),
        ({"kind": "unknown start", "releases": 1}, "at least 2"),
        ({"start": "spectral"}, "start"),
        ({"dtype": "float16"}, "dtype"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            check_release_cell(**cell | change)
