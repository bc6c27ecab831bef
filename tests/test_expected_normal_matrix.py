"""The dual kernel against closed forms, and the preconditioner of random features against averages
over many features, its own dense inverse, and the spectrum it promises."""

import math

import pytest
import torch

from paperlib import GivenFeatures, RandomFeatures, fit_min_norm, reconstruct
from paperlib import expected_normal_matrix as module
from paperlib.activations import activation, activation_names
from paperlib.dual_kernel import ORDER, DualKernel
from paperlib.expected_normal_matrix import ExpectedNormalMatrix, expectation_pays
from paperlib.levenberg_marquardt import damped_step
from paperlib.lift import Lift
from paperlib.preconditioner import Preconditioner
from paperlib.projection import Linearization
from paperlib.sphere import to_sphere, to_tangent
from paperlib.subspace import SubspaceFeatures


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(500 + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def alike(n, d, *, share=0.5, seed=0):
    """Points on the sphere that have a common part, as pictures have."""
    return to_sphere((1 - share) ** 0.5 * randn(n, d, seed=seed) + share**0.5 * randn(d, seed=99))


def linearized(name="relu", *, lift=True, n=5, d=12, p=60_000, C=1, X=None, step=0.02):
    """The Gauss-Newton model near samples that are alike."""
    X = alike(n, d) if X is None else X
    (n, d) = X.shape
    model = RandomFeatures(d, p, name, dtype=torch.float64)
    theta = fit_min_norm(model, X, randn(n, C, seed=1))
    near = to_sphere(X + step * randn(n, d, seed=2))
    lifted = Lift(model, theta, dtype=torch.float64) if lift else None
    target = lifted.theta if lift else theta
    return Linearization(model, target, near, lift=lifted, curvature=True)


def columns(product, n, d, C):
    """The matrix of a product, candidates first, restricted to the tangent spaces."""
    found = []
    for v in torch.eye(n * d + n * C, dtype=torch.float64):
        HX, Ha = product(v[: n * d].view(n, d), v[n * d :].view(n, C))
        found.append(torch.cat([HX.reshape(-1), Ha.reshape(-1)]))
    return torch.stack(found, 1)


def tangent_basis(X, C):
    tangent = torch.block_diag(*(torch.linalg.svd(x[None])[2][1:].T for x in X))
    return torch.block_diag(tangent, torch.eye(len(X) * C, dtype=torch.float64))


def true_matrix(point, C):
    """The normal matrix of (X, alpha), without the linear part, on the tangent spaces."""
    n, d = point.X.shape
    dw = torch.zeros(C, d, dtype=torch.float64) if point.lift else None
    full = columns(lambda dX, da: point.product(dX, da, dw)[:2], n, d, C)
    B = tangent_basis(point.X, C)
    return B.T @ full @ B


def inverse_matrix(expected, point, C):
    """`apply` as a matrix on the tangent spaces."""
    n, d = point.X.shape
    dw = torch.zeros(C, d, dtype=torch.float64) if point.lift else None
    B = tangent_basis(point.X, C)
    full = columns(lambda rX, ra: expected.apply(to_tangent(point.X, rX), ra, dw)[:2], n, d, C)
    return B.T @ full @ B


# The dual kernel


def test_dual_kernel_of_relu_is_the_arc_cosine_kernel():
    """Cho and Saul 2009, degree one, for unit variances."""
    rho = torch.tensor([[1.0, 0.3], [0.3, 1.0]], dtype=torch.float64)
    for value in (-0.6, 0.0, 0.3, 0.7):
        rho[0, 1] = rho[1, 0] = value
        k, first, second = DualKernel(activation("relu"), lifted=False)(rho)
        angle = math.acos(value)
        exact = (math.sin(angle) + (math.pi - angle) * value) / (2 * math.pi)
        assert float(k[0, 1]) == pytest.approx(exact, abs=1e-5)
        assert float(first[0, 1]) == pytest.approx((math.pi - angle) / (2 * math.pi), abs=1e-4)
        assert float(second[0, 1]) == pytest.approx(0.5 / math.pi / math.sin(angle), abs=3e-3)
        torch.testing.assert_close(k.diagonal(), torch.full((2,), 0.5, dtype=rho.dtype))
        torch.testing.assert_close(first.diagonal(), torch.full((2,), 0.5, dtype=rho.dtype))


@pytest.mark.parametrize("name", activation_names())
def test_dual_kernel_has_the_hermite_coefficients_of_the_activation(name):
    act = activation(name)
    kernel = DualKernel(act, lifted=False)
    known = torch.tensor(act.hermite_coefficients(10), dtype=torch.float64)
    torch.testing.assert_close(kernel.coefficients[:11], known, rtol=0, atol=1e-9)
    assert len(kernel.coefficients) == ORDER + 1
    lifted = DualKernel(act, lifted=True)
    assert lifted.coefficients[1] == 0
    assert kernel.square - lifted.square == pytest.approx(float(known[1]) ** 2, abs=1e-12)
    again = DualKernel(act, lifted=False)  # the shared expansion was not changed
    assert again.coefficients[1] == kernel.coefficients[1]


@pytest.mark.parametrize("name", activation_names())
def test_derivatives_of_the_dual_kernel_against_differences(name):
    at = torch.full((3, 3), 0.4, dtype=torch.float64)
    kernel, step = DualKernel(activation(name), lifted=False), 1e-4
    above, below, (_, first, second) = kernel(at + step), kernel(at - step), kernel(at)
    slope = (above[0] - below[0]) / (2 * step)
    bend = (above[1] - below[1]) / (2 * step)
    assert float(first[0, 1]) == pytest.approx(float(slope[0, 1]), abs=1e-7)
    assert float(second[0, 1]) == pytest.approx(float(bend[0, 1]), abs=1e-7)


# The expected normal matrix


@pytest.mark.parametrize("C", [1, 2])
@pytest.mark.parametrize(
    ("name", "lift"), [("relu", True), ("relu", False), ("relu+tanh", True), ("gelu", False)]
)
def test_normal_matrix_of_many_features_is_the_expected_one(name, lift, C):
    point = linearized(name, lift=lift, C=C)
    expected = ExpectedNormalMatrix(point, 0.0)
    found = true_matrix(point, C)
    inverse = inverse_matrix(expected, point, C)
    # In units of the expectation, all eigenvalues are within (1 +- sqrt(d n / p))^2 of one.
    eigenvalues = torch.linalg.eigvals(inverse @ found).real
    width = math.sqrt(point.X.numel() / point.model.p)
    assert float(eigenvalues.min()) > (1 - width) ** 2 - 0.06
    assert float(eigenvalues.max()) < (1 + width) ** 2 + 0.06


def test_without_the_second_derivative_some_directions_are_badly_scaled():
    """What the expected matrix is for: M (x) I alone leaves eigenvalues far from one."""
    point = linearized("relu", n=8)
    B, (n, d) = tangent_basis(point.X, 0), point.X.shape
    plain = Preconditioner(point, 0.0)
    zeros = torch.zeros(n, 1, dtype=torch.float64), torch.zeros(1, d, dtype=torch.float64)
    units = torch.eye(n * d, dtype=torch.float64)
    inverse = torch.stack(
        [plain.apply(to_tangent(point.X, v.view(n, d)), *zeros)[0].reshape(-1) for v in units], 1
    )
    whole = true_matrix(point, 1)
    own, other = whole[: n * (d - 1), : n * (d - 1)], whole[: n * (d - 1), n * (d - 1) :]
    schur = own - other @ torch.linalg.solve(whole[n * (d - 1) :, n * (d - 1) :], other.T)
    eigenvalues = torch.linalg.eigvals(B.T @ inverse @ B @ schur).real
    assert float(eigenvalues.min()) < 0.3


@pytest.mark.parametrize("n", [5, 20])  # fewer and more candidates than dimensions
@pytest.mark.parametrize("mu", [1e-2, 10.0])
def test_apply_is_the_inverse_of_the_damped_matrix(monkeypatch, n, mu):
    monkeypatch.setattr(module, "INNER_TOLERANCE", 1e-12)
    monkeypatch.setattr(module, "MOST_INNER", 5000)
    point = linearized(n=n, C=2, p=3000)
    (n, d), C = point.X.shape, 2
    expected = ExpectedNormalMatrix(point, mu)
    rho = point.X @ point.X.T / d
    k, first, second = DualKernel(point.model.activation, lifted=True)(rho)
    p, X, pairs = point.model.p, point.X, point.alpha @ point.alpha.T
    damped = pairs * first + mu * torch.diag(
        first.diagonal() * (pairs.diagonal() + 1e-5 * (pairs.diagonal()).mean())
    )
    eye = torch.eye(d, dtype=torch.float64)
    A = torch.einsum("ij,ab->iajb", damped, eye)
    A = A + torch.einsum("ij,ja,ib->iajb", pairs * second / d, X, X)
    cross = torch.einsum("ic,ij,ja->iajc", point.alpha, first, X).reshape(n * d, n * C)
    gram = torch.kron(d * k, torch.eye(C, dtype=torch.float64))
    A = torch.cat([torch.cat([A.reshape(n * d, n * d), cross], 1), torch.cat([cross.T, gram], 1)])
    B = tangent_basis(X, C)
    dense = B.T @ A @ B * (p / d)
    inverse = inverse_matrix(expected, point, C)
    product = inverse @ dense
    torch.testing.assert_close(product, torch.eye(len(dense), dtype=A.dtype), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        expected.damping[:, 0], (damped - pairs * first).diagonal() * p / d, rtol=1e-9, atol=0
    )


def test_samples_that_are_alike_take_few_products(monkeypatch):
    """As many as random points need, where M (x) I needs several times as many."""
    X = alike(24, 40, share=0.8)
    point = linearized(X=X, p=10 * X.numel(), step=0.01)
    taken = {}
    for worth in (0, math.inf):
        monkeypatch.setattr(module, "WORTHWHILE", worth)
        solution, _ = damped_step(point, 1e-6, forcing=1e-3, max_inner=300)
        assert solution.relative_residual <= 1e-3
        taken[worth] = solution.iterations
    assert taken[0] * 2 < taken[math.inf]


def test_a_step_is_the_same_with_either_preconditioner(monkeypatch):
    point = linearized(p=3000)
    steps = []
    for worth in (0, math.inf):
        monkeypatch.setattr(module, "WORTHWHILE", worth)
        monkeypatch.setattr(module, "DAMPING_FLOOR", 1e-3)  # as the other's
        monkeypatch.setattr(module, "INNER_TOLERANCE", 1e-8)
        steps.append(damped_step(point, 1e-8, forcing=1e-10, max_inner=800)[1])
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5 * float(steps[0].norm()))


def test_equal_candidates_do_not_stop_it():
    X = alike(6, 12)
    X[3] = X[2]
    point = linearized(X=X, p=3000, step=0.0)
    zX, za, zw = ExpectedNormalMatrix(point, 1e-2).apply(
        to_tangent(X, randn(6, 12)), randn(6, 1), randn(1, 12)
    )
    assert all(bool(z.isfinite().all()) for z in (zX, za, zw))


def test_it_is_used_only_where_weights_are_random_and_the_work_is_large():
    large = RandomFeatures(1000, 100_000)
    assert expectation_pays(large, 10)
    assert not expectation_pays(RandomFeatures(100, 1000), 10)
    basis = torch.linalg.qr(torch.randn(1000, 300))[0]
    assert SubspaceFeatures(large, basis).gaussian_weights
    assert not GivenFeatures(torch.randn(50, 10)).gaussian_weights


def test_reconstruction_with_it(monkeypatch):
    monkeypatch.setattr(module, "WORTHWHILE", 0)
    X = alike(6, 30, share=0.4)
    model = RandomFeatures(30, 1800, "relu", dtype=torch.float64)
    theta = fit_min_norm(model, X, randn(6, 1, seed=3).sign())
    record = reconstruct(model, theta, 6, restarts=3, progress=False)
    distances = torch.cdist(X, record.samples).amin(1) / math.sqrt(30)
    assert record.loss < 1e-10
    assert float(distances.max()) < 1e-3
