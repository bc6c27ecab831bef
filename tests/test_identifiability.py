"""The Jacobian against finite differences, its rank against the count, walks against the loss."""

import math

import pytest
import torch

from paperlib import RandomFeatures, digits, fit_min_norm, projection_loss, sphere
from paperlib.experiments.identifiability import (
    check_identifiability_cell,
    least_identifying_p,
    run_identifiability_cell,
)
from paperlib.identifiability import (
    coefficients,
    jacobian_spectrum,
    parameter_jacobian,
    tangent_bases,
)
from paperlib.law import determines, least_parameters, parameters_told, unknowns
from paperlib.sphere import to_sphere
from paperlib.walk import walk_explanations

DOUBLE = torch.float64


def problem(n, d, p, activation="relu+tanh", outputs=1, seed=0):
    data = sphere(n, d, seed=seed, dtype=DOUBLE)
    model = RandomFeatures(d, p, activation, seed=seed, dtype=DOUBLE)
    y = torch.randn(n, outputs, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed))
    theta = fit_min_norm(model, data.X, y)
    return model, data.X, theta, coefficients(model, theta, data.X)


def test_tangent_bases_are_orthonormal_and_orthogonal_to_the_points():
    X = torch.cat([sphere(4, 7, dtype=DOUBLE).X, math.sqrt(7) * torch.eye(7, dtype=DOUBLE)[:2]])
    X = torch.cat([X, -X])
    bases = tangent_bases(X)
    eye = torch.eye(6, dtype=DOUBLE).expand(len(X), 6, 6)
    torch.testing.assert_close(bases @ bases.transpose(1, 2), eye)
    torch.testing.assert_close(bases @ X[:, :, None], torch.zeros(len(X), 6, 1, dtype=DOUBLE))


@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_the_jacobian_is_that_of_finite_differences(activation):
    model, X, _, alpha = problem(3, 5, 11, activation, outputs=2)
    bases = tangent_bases(X)
    J = parameter_jacobian(model, X, alpha)
    assert J.shape == (2 * 11, 3 * 4 + 3 * 2)
    z = torch.randn(18, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))

    def theta(scale):
        dX = (z[:12].view(3, 1, 4) @ bases).squeeze(1)
        moved, shifted = to_sphere(X + scale * dX), alpha + scale * z[12:].view(3, 2)
        return (shifted.T @ model.features(moved)).reshape(-1)

    step = 1e-5
    torch.testing.assert_close(
        J @ z, (theta(step) - theta(-step)) / (2 * step), rtol=1e-7, atol=1e-8
    )


def test_coefficients_are_those_of_training():
    model, X, theta, alpha = problem(4, 6, 40, outputs=3)
    torch.testing.assert_close(alpha.T @ model.features(X), theta)


@pytest.mark.parametrize("activation", ["relu+tanh", "tanh", "gelu", "erf", "softplus"])
@pytest.mark.parametrize("size", [(5, 12), (12, 5)])
def test_full_rank_exactly_from_dn_on(activation, size):
    n, d = size
    for p in (n * d // 2, n * d - 1, n * d, n * d + 1, 2 * n * d):
        cell = run_identifiability_cell(n, d, p, activation)
        assert cell["unknowns"] == n * d == unknowns(n, d)
        assert cell["rank"] == min(p, n * d)
        assert cell["identified"] == (p >= n * d)
        assert (cell["smallest"] > 0) == (p >= n * d)


def test_dead_features_of_the_relu_do_not_count():
    cells = [run_identifiability_cell(3, 8, p, "relu", seed=1) for p in (20, 24, 30, 48)]
    assert cells[1]["dead"] > 0
    for cell in cells:
        assert cell["rank"] == min(cell["equations"] - cell["dead"], 24)


@pytest.mark.parametrize("n", [1, 3])
def test_relus_that_are_off_at_all_samples_are_no_equations(n):
    model, X, theta, alpha = problem(n, 8, 200, "relu")
    spectrum = jacobian_spectrum(model, X, alpha)
    assert parameters_told(theta) == spectrum.rows - spectrum.dead_rows < 200
    assert parameters_told(problem(n, 8, 200, "gelu")[2]) == 200


def test_what_is_determined_follows_the_features_that_are_on():
    model, X, theta, _ = problem(1, 20, 36, "relu")
    assert 15 < parameters_told(theta) <= 20 < 36 and not determines(model, theta, 1)
    model, X, theta, _ = problem(1, 20, 60, "relu")
    assert 20 < parameters_told(theta) < 60 and determines(model, theta, 1)


def test_unit_columns_make_one_output_blind_to_the_size_of_the_coefficients():
    model, X, _, alpha = problem(3, 6, 30)
    scaled = alpha * torch.tensor([[1e-3], [1.0], [-50.0]], dtype=DOUBLE)
    first, second = jacobian_spectrum(model, X, alpha), jacobian_spectrum(model, X, scaled)
    torch.testing.assert_close(first.singular_values, second.singular_values)


@pytest.mark.parametrize("outputs", [1, 2, 3, 4, 7])
def test_several_outputs_count_up_to_n(outputs):
    n, d = 4, 7
    found = least_identifying_p(n, d, "gelu", outputs)
    assert found["p"] == found["predicted"] == least_parameters(n, d, outputs)
    T = min(outputs, n)
    assert T * found["p"] >= unknowns(n, d, T) > T * (found["p"] - 1)


def test_nothing_within_reach_is_said_so():
    assert least_identifying_p(3, 6, "relu", 3, reach=1)["p"] is None


def test_a_walk_changes_the_data_and_not_the_parameters():
    model, X, theta, _ = problem(3, 8, 20, "relu+tanh")
    walk = walk_explanations(model, theta, X, steps=15, step_length=0.05)
    assert walk.status == "done" and len(walk.path) == 16
    assert set(walk.dimensions) == {4}
    for x, alpha, loss in zip(walk.path, walk.coefficients, walk.losses, strict=True):
        assert float(projection_loss(model, theta, x)) == loss < 1e-20
        torch.testing.assert_close(alpha.T @ model.features(x), theta, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(x.norm(dim=1), torch.full((3,), math.sqrt(8), dtype=DOUBLE))
    assert walk.distances[0].max() == 0
    assert walk.distances[-1].mean() > 0.2
    # Not the same points in another order either.
    assert torch.cdist(walk.path[-1], X).min(dim=1).values.max() > 0.2 * math.sqrt(8)


def test_one_parameter_short_leaves_a_curve_and_none_leaves_no_way():
    model, X, theta, _ = problem(3, 6, 17, "gelu")
    walk = walk_explanations(model, theta, X, steps=5, step_length=0.02)
    assert set(walk.dimensions) == {1} and walk.distances[-1].max() > 0.01
    assert max(walk.losses) < 1e-20
    model, X, theta, _ = problem(3, 6, 18, "gelu")
    with pytest.raises(ValueError, match="null space is empty"):
        walk_explanations(model, theta, X)


def test_a_steered_walk_comes_closer_to_its_target():
    data = digits(6, dtype=DOUBLE)
    X, target = data.X[:3], data.X[3:]
    model = RandomFeatures(64, 60, "relu+tanh", dtype=DOUBLE)
    theta = fit_min_norm(model, X, data.y[:3])
    walk = walk_explanations(model, theta, X, steps=30, step_length=0.1, target=target)
    before, after = (walk.path[0] - target).norm(), (walk.path[-1] - target).norm()
    assert after < 0.5 * before
    assert max(walk.losses) < 1e-15


def test_what_cannot_be_walked_is_refused():
    model, X, theta, alpha = problem(3, 8, 20)
    with pytest.raises(ValueError, match="must explain theta"):
        walk_explanations(model, theta, to_sphere(X + 0.1))
    with pytest.raises(ValueError, match="step_length"):
        walk_explanations(model, theta, X, step_length=0.0)
    with pytest.raises(ValueError, match="target must have shape"):
        walk_explanations(model, theta, X, target=X[:2])
    with pytest.raises(ValueError, match="alpha must have shape"):
        parameter_jacobian(model, X, alpha[:2])
    with pytest.raises(ValueError, match="sphere"):
        parameter_jacobian(model, 2 * X, alpha)
    with pytest.raises(TypeError, match="alpha must be a torch tensor, got list"):
        parameter_jacobian(model, X, alpha.tolist())
    line = RandomFeatures(1, 20, dtype=torch.float64)
    with pytest.raises(ValueError, match="d = 2 numbers at least, got 1"):
        parameter_jacobian(line, torch.ones(2, 1).double(), torch.ones(2, 1).double())
    single = RandomFeatures(8, 20)
    with pytest.raises(TypeError, match="float64"):
        parameter_jacobian(single, X.float(), alpha.float())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"p": 0}, "p must"), ({"d": 1}, "d must"), ({"activation": "step"}, "activation must")],
)
def test_a_cell_without_sense_is_refused(wrong, message):
    cell = {"n": 3, "d": 5, "p": 9, "activation": "relu", "outputs": 1, "seed": 0} | wrong
    with pytest.raises(ValueError, match=message):
        check_identifiability_cell(**cell)
