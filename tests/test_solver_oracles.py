"""The loss, its gradient and every piece of the solvers against dense float64 oracles."""

import itertools
import math
import weakref

import numpy as np
import pytest
import scipy.optimize
import torch

from paperlib import GivenFeatures, RandomFeatures, fit_min_norm, projection_loss, sphere
from paperlib.elimination import eliminate, shares
from paperlib.levenberg_marquardt import damped_step, levenberg_marquardt
from paperlib.lift import Lift
from paperlib.preconditioner import Preconditioner
from paperlib.projection import Linearization, pseudo_inverse
from paperlib.remainder import left_by
from paperlib.reseed import spectral_direction
from paperlib.signs import settle_signs, within_box
from paperlib.sphere import random_on_sphere, to_sphere, to_tangent

NAMES = ("relu", "relu+tanh", "tanh", "gelu")


def problem(name="tanh", *, n=3, d=5, p=60, C=1, seed=0, candidates=None, block_rows=8192):
    """A model, parameters learned on n samples, those samples, and unrelated candidates."""
    model = RandomFeatures(d, p, name, seed=seed, dtype=torch.float64, block_rows=block_rows)
    generator = torch.Generator().manual_seed(100 + seed)
    X = random_on_sphere(n, d, generator=generator)
    y = torch.randn(n, C, generator=generator, dtype=torch.float64)
    theta = fit_min_norm(model, X, y)
    return model, theta, X, random_on_sphere(candidates or n, d, generator=generator)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(300 + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def dense_span(model, X, lift):
    """Rows spanning what is projected off, (n, p) or (n + d, p)."""
    U = X @ model.V.T
    if not lift:
        return model.activation.value(U)
    return torch.cat([model.activation.value(U) - model.linear_coefficient * U, model.V.T])


def off(theta, rows):
    """Theta P_perp, P_perp projecting off the rows."""
    Q = torch.linalg.qr(rows.T).Q
    return theta - (theta @ Q) @ Q.T


def dense_loss(model, theta, X):
    """The formula of the paper with the p x p projector, for autograd."""
    Phi = model.activation.value(X @ model.V.T)
    projector = torch.eye(model.p, dtype=X.dtype) - Phi.T @ torch.linalg.solve(Phi @ Phi.T, Phi)
    return (theta @ projector).square().sum() / theta.square().sum()


def linearized(name, *, lift, C=2, p=2500, **options):
    """A Gauss-Newton model away from the solution, with several blocks and outputs."""
    model, theta, _, X = problem(name, p=p, C=C, block_rows=1024, **options)
    lifted = Lift(model, theta, dtype=torch.float64) if lift else None
    target = theta if lifted is None else lifted.theta
    return Linearization(model, target, X, lift=lifted, curvature=True)


# The loss and its gradient


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_against_the_dense_formula(name, C):
    model, theta, _, X = problem(name, C=C)
    ours, dense = X.clone().requires_grad_(), X.clone().requires_grad_()
    loss, expected = projection_loss(model, theta, ours), dense_loss(model, theta, dense)
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert 0.01 < float(expected.detach()) < 1
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, dense.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["tanh", "gelu", "erf", "softplus"])
def test_gradient_against_finite_differences(name):
    model, theta, _, X = problem(name, C=2)
    X.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda Z: projection_loss(model, theta, Z), X, eps=1e-6, atol=1e-8, rtol=1e-6
    )


def test_loss_is_zero_at_the_data_and_for_any_order_of_it():
    model, theta, X, other = problem("relu+tanh", n=4, p=80)
    assert float(projection_loss(model, theta, X)) < 1e-25
    losses = [
        float(projection_loss(model, theta, other[list(order)]))
        for order in itertools.permutations(range(4))
    ]
    assert losses[0] > 0.01
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-11)


def test_loss_does_not_depend_on_the_scale_of_theta_and_takes_one_output_as_a_vector():
    model, theta, _, X = problem("relu")
    loss = float(projection_loss(model, theta, X))
    assert float(projection_loss(model, 1e-3 * theta, X)) == pytest.approx(loss, rel=1e-12)
    assert float(projection_loss(model, theta[0], X)) == loss


def test_two_candidates_at_one_point_count_as_one():
    model, theta, _, X = problem("relu")
    twice = torch.cat([X, X[:1]])
    expected = float(projection_loss(model, theta, X))
    assert float(projection_loss(model, theta, twice)) == pytest.approx(expected, rel=1e-9)


def test_float32_agrees_with_float64():
    model, theta, _, X = problem("relu", n=5, d=8, p=400)
    single = RandomFeatures(8, 400, "relu", seed=0)
    loss = float(projection_loss(single, theta.float(), X.float()))
    assert loss == pytest.approx(float(projection_loss(model, theta, X)), rel=1e-5)


@pytest.mark.parametrize("lift", [False, True])
def test_loss_residual_and_coefficients_with_and_without_lift(lift):
    point = linearized("relu+tanh", lift=lift)
    rows = dense_span(point.model, point.X, lift)
    residual = off(point.theta, rows)
    torch.testing.assert_close(point.residual, residual, rtol=1e-9, atol=1e-12)
    loss = float(residual.square().sum() / point.theta.square().sum())
    assert point.loss == pytest.approx(loss, rel=1e-10)
    coefficients = point.theta @ torch.linalg.pinv(rows)  # (C, n) or (C, n + d)
    torch.testing.assert_close(point.alpha, coefficients[:, :3].T, rtol=1e-8, atol=1e-11)
    if lift:
        torch.testing.assert_close(point.linear, coefficients[:, 3:].T, rtol=1e-8, atol=1e-11)
    # The upper left block of the inverse of the whole Gram matrix.
    inverse = torch.linalg.inv(rows @ rows.T)[:3, :3]
    torch.testing.assert_close(point.gram_inverse, inverse, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("C", [1, 2])
def test_what_some_candidates_leave(lift, C):
    point = linearized("relu+tanh", lift=lift, C=C)
    rows = torch.arange(3) != 1
    span = dense_span(point.model, point.X[rows], lift)
    coefficients = point.theta @ torch.linalg.pinv(span)
    for some in (rows, rows.nonzero()[:, 0]):
        left = left_by(point, some)
        torch.testing.assert_close(left.residual, off(point.theta, span), rtol=1e-9, atol=1e-12)
        if lift:
            linear = coefficients[:, 2:].T
            torch.testing.assert_close(left.linear, linear, rtol=1e-8, atol=1e-11)
        else:
            assert left.linear is None


@pytest.mark.parametrize("name", ["relu", "gelu"])
@pytest.mark.parametrize("lift", [False, True])
def test_gradient_with_lift_is_the_derivative_of_the_lifted_loss(name, lift):
    point = linearized(name, lift=lift, p=200)

    def loss(X):
        rows = dense_span(point.model, X, lift)
        projector = torch.eye(200, dtype=X.dtype) - rows.T @ torch.linalg.solve(rows @ rows.T, rows)
        return (point.theta @ projector).square().sum() / point.theta.square().sum()

    X = point.X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(X), X)
    torch.testing.assert_close(point.loss_gradient, expected, rtol=1e-7, atol=1e-10)


def test_lift_takes_the_columns_of_v_out_of_theta():
    model, theta, _, _ = problem("relu", C=2, p=2500, block_rows=1024)
    lift = Lift(model, theta, dtype=torch.float64)
    torch.testing.assert_close(lift.gram, model.V.T @ model.V, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lift.theta, off(theta, model.V.T), rtol=1e-10, atol=1e-14)
    single = RandomFeatures(5, 2500, "relu", block_rows=1024)
    for dtype in (torch.float32, torch.bfloat16):
        low = Lift(single, theta.float(), dtype=dtype)
        V = torch.cat([V for _, V in single.weight_blocks(dtype=dtype)]).double()
        expected = off(theta, V.T)
        # V itself is rounded to that dtype, and so is each product with it.
        error = (low.theta.double() - expected).norm() / expected.norm()
        assert float(error) < torch.finfo(dtype).eps
        left = (low.theta.double() @ torch.linalg.qr(V).Q).norm() / expected.norm()
        assert float(left) < torch.finfo(dtype).eps


def test_pseudo_inverse_leaves_small_directions_out():
    Q = torch.linalg.qr(randn(4, 4)).Q
    values = torch.tensor([2.0, 1.0, 0.5, 1e-13], dtype=torch.float64)
    inverse = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64)
    found = pseudo_inverse((Q * values) @ Q.T)
    torch.testing.assert_close(found, (Q * inverse) @ Q.T, rtol=1e-7, atol=1e-8)


# The Gauss-Newton operator, its preconditioner and the step


def dense_jacobian(point):
    """The Jacobian of T with respect to (X, alpha, w), columns as `damped_step` orders them.

    T(X, alpha, w) = alpha^T act(X V^T) + w V^T, (C, p), with the rest of act and w if lifted.
    """
    model, lift = point.model, point.lift
    (n, d), C = point.X.shape, len(point.theta)
    sizes = [n * d, n * C] + ([C * d] if lift else [])

    def flat(v):
        parts = v.split(sizes)
        X, alpha = parts[0].view(n, d), parts[1].view(n, C)
        T = alpha.T @ dense_span(model, X, lift)[:n]
        if lift:
            T = T + parts[2].view(C, d) @ model.V.T
        return T.reshape(-1)

    at = torch.cat([point.X.reshape(-1), point.alpha.reshape(-1)])
    if lift:
        at = torch.cat([at, point.linear.T.reshape(-1)])
    return torch.func.jacfwd(flat)(at), sizes


CASES = [
    (name, lift, C)
    for name in NAMES
    for lift in (False, True)
    for C in (1, 2)
    if not (lift and name == "gelu")
]


@pytest.mark.parametrize(("name", "lift", "C"), CASES)
def test_product_against_a_dense_jacobian(name, lift, C):
    point = linearized(name, lift=lift, C=C)
    A, sizes = dense_jacobian(point)
    v = randn(sum(sizes), seed=5)
    parts = v.split(sizes)
    (n, d) = point.X.shape
    found = point.product(
        parts[0].view(n, d), parts[1].view(n, C), parts[2].view(C, d) if lift else None
    )
    expected = A.T @ (A @ v)
    ours = torch.cat([part.reshape(-1) for part in found if part is not None])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9 * float(expected.norm()))
    # The gradient is the same Jacobian applied to the residual.
    gradient = (A.T @ point.residual.reshape(-1)).split(sizes)
    torch.testing.assert_close(point.gradient.reshape(-1), gradient[0], rtol=1e-8, atol=1e-11)
    # At the best coefficients nothing is left to gain from them.
    scale = float(point.theta.norm() * A.norm())
    assert all(float(part.abs().max()) < 1e-10 * scale for part in gradient[1:])


@pytest.mark.parametrize("lift", [False, True])
def test_product_does_not_depend_on_the_block_height(lift):
    dX, da, dw = randn(3, 5, seed=1), randn(3, 2, seed=2), randn(2, 5, seed=3)
    results = []
    for block_rows in (1024, 2048, 8192):
        model, theta, _, X = problem("relu+tanh", C=2, p=2500, block_rows=block_rows)
        lifted = Lift(model, theta, dtype=torch.float64) if lift else None
        target = lifted.theta if lift else theta
        point = Linearization(model, target, X, lift=lifted, curvature=True)
        HX, Ha, _ = point.product(dX, da, dw if lift else None)
        results.append((point.gradient, HX, Ha, torch.tensor(point.loss), point.slope_gram))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("mu", [1e-2, 10.0])
def test_preconditioner_against_the_dense_inverse_of_its_blocks(lift, mu):
    point = linearized("relu+tanh", lift=lift)
    (n, d), C = point.X.shape, 2
    A, sizes = dense_jacobian(point)
    preconditioner = Preconditioner(point, mu)
    rX = to_tangent(point.X, randn(n, d, seed=6))
    ra, rw = randn(n, C, seed=7), randn(C, d, seed=8) if lift else None
    zX, za, zw = preconditioner.apply(rX, ra, rw)

    slopes = point.model.activation.slope(point.X @ point.model.V.T)
    slopes = slopes - (point.model.linear_coefficient if lift else 0)
    M = (point.alpha @ point.alpha.T) * (slopes @ slopes.T / d)
    D = M.diagonal() + 1e-3 * M.diagonal().mean()
    expected = to_tangent(point.X, torch.linalg.solve(M + mu * torch.diag(D), rX))
    torch.testing.assert_close(zX, expected, rtol=1e-9, atol=1e-12 * float(expected.norm()))
    torch.testing.assert_close(preconditioner.damping[:, 0], mu * D, rtol=1e-10, atol=0)

    B = A[:, sizes[0] :]  # what belongs to the coefficients, exactly
    residual = torch.cat([r.reshape(-1) for r in (ra, rw) if r is not None])
    expected = torch.linalg.solve(B.T @ B, residual)
    found = torch.cat([z.reshape(-1) for z in (za, zw) if z is not None])
    # The linear part goes through a float32 inverse.
    tolerance = 1e-5 if lift else 1e-9
    torch.testing.assert_close(
        found, expected, rtol=0, atol=tolerance * float(expected.abs().max())
    )


def test_preconditioner_is_close_to_the_gauss_newton_matrix_of_the_candidates():
    """M (x) I_d is what makes conjugate gradients take few products, at any spread of alpha."""
    model, theta, X, _ = problem("relu", n=6, d=40, p=4800)
    lift = Lift(model, theta, dtype=torch.float64)
    start = to_sphere(X + 0.3 * randn(6, 40))
    point = Linearization(model, lift.theta, start, lift=lift, curvature=True)
    solution, _ = damped_step(point, 1e-2, forcing=1e-6, max_inner=200)
    assert solution.relative_residual <= 1e-6
    assert solution.iterations < 40  # of 240 unknowns


@pytest.mark.parametrize("lift", [False, True])
def test_damped_step_against_a_dense_solve(lift):
    point = linearized("relu+tanh", lift=lift)
    n, d = point.X.shape
    mu = 0.5
    solution, dX = damped_step(point, mu, forcing=1e-12, max_inner=500)
    A, sizes = dense_jacobian(point)
    # An orthonormal basis of the tangent space of the spheres, and of all coefficients.
    tangent = torch.block_diag(*(torch.linalg.svd(x[None])[2][1:].T for x in point.X))
    basis = torch.block_diag(tangent, torch.eye(sum(sizes[1:]), dtype=torch.float64))
    damping = torch.zeros(sum(sizes), dtype=torch.float64)
    damping[: n * d] = Preconditioner(point, mu).damping.expand(n, d).reshape(-1)
    b = torch.zeros(sum(sizes), dtype=torch.float64)
    b[: n * d] = point.gradient.reshape(-1)
    H = basis.T @ (A.T @ A + torch.diag(damping)) @ basis
    expected = basis @ torch.linalg.solve(H, basis.T @ b)
    torch.testing.assert_close(
        dX.reshape(-1), expected[: n * d], rtol=0, atol=1e-6 * float(expected[: n * d].norm())
    )
    assert solution.relative_residual <= 1e-12


# Optima


def least_squares_optimum(model, theta, X):
    """scipy's minimiser of ||theta - sum_i alpha_i phi(x_i)|| over (X on the sphere, alpha)."""
    (n, d), C = X.shape, len(theta)

    def residual(v):
        Z = to_sphere(torch.from_numpy(v[: n * d]).view(n, d))
        alpha = torch.from_numpy(v[n * d :]).view(n, C)
        return (theta - alpha.T @ model.features(Z)).reshape(-1).numpy()

    Phi = model.features(X)
    alpha = torch.linalg.lstsq(Phi.T, theta.T).solution
    start = np.concatenate([X.reshape(-1).numpy(), alpha.reshape(-1).numpy()])
    found = scipy.optimize.least_squares(
        residual, start, xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=2000
    )
    Z = to_sphere(torch.from_numpy(found.x[: n * d]).view(n, d))
    return Z, 2 * found.cost / float(theta.square().sum())


@pytest.mark.parametrize("name", ["tanh", "gelu", "relu+tanh"])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_scipy_finds_the_same_optimum_from_the_same_start(name, noise):
    """With noise on theta the optimum is not the data, and its loss is not zero."""
    model, theta, X, _ = problem(name, n=3, d=5, p=60, seed=1)
    theta = theta + noise * float(theta.norm()) / math.sqrt(60) * randn(1, 60, seed=9)
    start = to_sphere(X + 0.1 * randn(3, 5, seed=10))

    def evaluate(Z):
        return Linearization(model, theta, Z, curvature=True)

    ours = levenberg_marquardt(evaluate, start, target=1e-26, max_steps=300, forcing=1e-3)
    Z, loss = least_squares_optimum(model, theta, start)
    assert float(projection_loss(model, theta, Z)) == pytest.approx(loss, rel=1e-6, abs=1e-20)
    torch.testing.assert_close(ours.point.X, Z, rtol=0, atol=1e-4 if noise else 1e-8)
    if noise:
        assert loss > 1e-4
        assert ours.point.loss == pytest.approx(loss, rel=1e-7)
        assert float((ours.point.X - X).norm()) > 1e-3
    else:
        assert ours.status == "converged"
        torch.testing.assert_close(ours.point.X, X, rtol=0, atol=1e-8)


def test_levenberg_marquardt_says_why_it_stopped():
    model, theta, X, _ = problem("tanh")

    def evaluate(Z):
        return Linearization(model, theta, Z, curvature=True)

    start = to_sphere(X + 0.1 * randn(3, 5, seed=10))
    at_data = levenberg_marquardt(evaluate, X, target=1e-20, max_steps=5)
    assert (at_data.status, at_data.history) == ("converged", [])
    one = levenberg_marquardt(evaluate, start, target=1e-20, max_steps=1)
    assert one.status == "step limit" and len(one.history) == 1
    assert one.history[0]["loss"] == one.point.loss
    done = levenberg_marquardt(evaluate, start, target=1e-20, max_steps=100)
    assert done.status == "converged" and done.point.loss <= 1e-20
    losses = [record["loss"] for record in done.history]
    assert losses == sorted(losses, reverse=True)
    never = levenberg_marquardt(evaluate, start, target=-1.0, max_steps=1000)
    assert never.status == "stalled" and len(never.history) < 200


# Elimination, signs and spectral starts


@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize("C", [1, 2])
def test_elimination_against_brute_force(lift, C):
    """Each removal is the one that a dense projection finds cheapest, and costs what it says."""
    point = linearized("relu", lift=lift, C=C, candidates=6, p=300)
    elimination = eliminate(point, 3)
    total = float(point.theta.square().sum())

    def loss(kept):
        rows = dense_span(point.model, point.X[kept], lift) if kept else point.model.V.T
        if not kept and not lift:
            return 1.0
        return float(off(point.theta, rows).square().sum()) / total

    kept = list(range(6))
    assert elimination.losses[6] == pytest.approx(loss(kept), rel=1e-9)
    while kept:
        trials = [[k for k in kept if k != j] for j in kept]
        kept = min(trials, key=loss)
        assert elimination.losses[len(kept)] == pytest.approx(loss(kept), rel=1e-8)
        if len(kept) == 3:
            assert elimination.kept.tolist() == kept


def test_elimination_keeps_the_data_and_drops_the_rest():
    model, theta, X, other = problem("relu+tanh", n=4, d=6, p=200, candidates=3)
    mixed = torch.cat([other[:2], X, other[2:], X[:1]])
    point = Linearization(model, theta, mixed)
    elimination = eliminate(point, 4)
    assert float(projection_loss(model, theta, mixed[elimination.kept])) < 1e-20
    assert max(elimination.losses[4:]) < 1e-18 < 1e-4 < elimination.losses[3]


@pytest.mark.parametrize("copies", [(0,), (0, 0, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("apart", [0.0, 1e-7])
def test_merged_candidates_go_before_samples_with_small_coefficients(copies, apart):
    """Removing one of two equal candidates is free, however large their coefficient is."""
    model = RandomFeatures(6, 200, "relu+tanh", seed=0, dtype=torch.float64)
    X = random_on_sphere(4, 6, generator=torch.Generator().manual_seed(1))
    alpha = torch.tensor([[10.0, 1.0, 1.0, 1e-3]], dtype=torch.float64)
    theta = alpha @ model.features(X)
    copied = to_sphere(X[list(copies)] + apart * randn(len(copies), 6))
    point = Linearization(model, theta, torch.cat([X, copied]))
    elimination = eliminate(point, 4)
    kept = point.X[elimination.kept]
    assert sorted((kept @ X.T).argmax(1).tolist()) == [0, 1, 2, 3]
    assert float(projection_loss(model, theta, kept)) < 1e-12
    assert max(elimination.losses[4:]) < 1e-12
    assert elimination.losses[3] > 1e-10


@pytest.mark.parametrize("name", ["relu", "relu+tanh", "gelu"])
@pytest.mark.parametrize("C", [1, 2])
def test_signs_are_settled(name, C):
    model, theta, X, _ = problem(name, n=12, d=10, p=2400, C=C, seed=3, block_rows=1024)
    flips = torch.where(torch.arange(12) % 3 == 0, -1.0, 1.0).double()
    # Directions need not be exact yet.
    candidates = to_sphere(flips[:, None] * (X + 1e-3 * randn(12, 10)))
    settled = settle_signs(model, theta, candidates)
    torch.testing.assert_close(settled, flips[:, None] * candidates)


@pytest.mark.parametrize(("n", "d", "C"), [(30, 20, 1), (60, 40, 1), (15, 5, 2)])
def test_more_signs_are_settled_than_the_linear_part_has_equations(n, d, C):
    # A ReLU tells signs in its linear part alone, C d numbers; without bounds many come out wrong.
    data = sphere(n, d, seed=1)
    model = RandomFeatures(d, 5 * n * d, "relu", seed=2)
    theta = fit_min_norm(model, data.X, torch.randn(n, C, generator=torch.manual_seed(3)))
    flips = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
    candidates = to_sphere(flips[:, None] * data.X + 1e-5 * randn(n, d).float())
    settled = settle_signs(model, theta, candidates)
    torch.testing.assert_close(settled, flips[:, None] * candidates)


def test_signs_follow_from_those_that_are_clear():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(12, 18, generator=generator, dtype=torch.float64).numpy()
    signs = torch.where(torch.rand(18, generator=generator) < 0.5, -1.0, 1.0).double().numpy()
    soft = within_box(A, A @ signs)
    assert (soft * signs > 0).all() and (abs(soft) <= 1).all()
    # The least-squares solution of the same equations has wrong signs among its entries.
    assert (np.linalg.lstsq(A, A @ signs, rcond=None)[0] * signs < 0).any()
    # Nothing to go by: some sign nevertheless.
    assert (within_box(np.zeros((1, 3)), np.zeros(1)) != 0).all()


def test_signs_of_odd_activations_cannot_be_settled():
    model, theta, X, _ = problem("tanh")
    assert torch.equal(settle_signs(model, theta, -X), -X)


@pytest.mark.parametrize("alpha", [1e-3, -2.0])
def test_spectral_start_finds_the_direction_of_a_single_hidden_sample(alpha):
    d = 20
    model = RandomFeatures(d, 200 * d, "relu", seed=4, dtype=torch.float64, block_rows=1024)
    x = random_on_sphere(1, d, generator=torch.Generator().manual_seed(5))
    residual = off(alpha * (x @ model.V.T).abs() / 2, model.V.T)
    generator = torch.Generator().manual_seed(6)
    found = spectral_direction(model, residual, generator=generator)
    assert found.shape == (1, d)
    assert float(found.norm()) == pytest.approx(math.sqrt(d))
    assert abs(float(found @ x.T)) / d > 0.95

    # It is the leading eigenvector of the centred second moment.
    moment = (model.V.T * (residual[0] - residual.mean())) @ model.V
    values, vectors = torch.linalg.eigh(moment)
    leading = vectors[:, values.abs().argmax()]
    assert abs(float(found[0] @ leading)) / math.sqrt(d) > 0.999


def test_candidates_at_which_no_feature_is_active_end_the_descent():
    """All is zero there: features, coefficients and the matrix of the preconditioner."""
    X = to_sphere(torch.eye(2, 4, dtype=torch.float64))
    model = GivenFeatures(-torch.ones(5, 4, dtype=torch.float64), "relu")
    theta = torch.ones(1, 5, dtype=torch.float64)
    run = levenberg_marquardt(
        lambda Z: Linearization(model, theta, Z, curvature=True), X, target=1e-10, max_steps=50
    )
    assert run.status == "stalled" and run.point.loss == 1.0
    assert torch.equal(run.point.X, X)


def test_a_descent_keeps_one_point_beside_the_trial():
    """What each keeps for its products is as large as the features."""
    model, theta, _, start = problem(n=4, d=6, p=200)
    points = []

    def evaluate(X):
        alive = [point for point in points if point() is not None]
        assert len(alive) <= 1
        point = Linearization(model, theta, X, curvature=True)
        points.append(weakref.ref(point))
        return point

    run = levenberg_marquardt(evaluate, start, target=1e-20, max_steps=6)
    assert len(run.history) == 6 and run.point.loss == run.history[-1]["loss"]


def test_a_step_to_features_that_are_not_finite_is_rejected():
    model, theta, X, _ = problem("tanh")
    start = to_sphere(X + 0.1 * randn(3, 5, seed=10))
    passes = []

    def evaluate(Z):
        passes.append(Z)
        if len(passes) == 2:  # as `eigh` says of features that overflowed
            raise torch.linalg.LinAlgError("did not converge")
        return Linearization(model, theta, Z, curvature=True)

    run = levenberg_marquardt(evaluate, start, target=1e-20, max_steps=100)
    first, second = run.history[:2]
    assert not first["accepted"] and first["loss"] == pytest.approx(
        float(projection_loss(model, theta, start))
    )
    assert second["damping"] > first["damping"] and second["passes"] > first["passes"] > 0
    assert run.status == "converged"


def test_a_candidate_that_others_can_stand_in_for_has_no_share():
    model, theta, X, _ = problem("tanh", n=3)
    exact = [
        float(projection_loss(model, theta, X[[k for k in range(3) if k != j]])) for j in (0, 1, 2)
    ]
    alone = shares(Linearization(model, theta, X))
    torch.testing.assert_close(alone, torch.tensor(exact).double(), rtol=1e-6, atol=0)
    twice = shares(Linearization(model, theta, torch.cat([X, X[:1]])))
    assert twice[[0, 3]].tolist() == [0, 0]
    torch.testing.assert_close(twice[1:3], alone[1:3])
    relu = GivenFeatures(model.V, "relu")  # and one at which no feature is on
    off = -to_sphere(model.V.sum(0, keepdim=True))
    assert relu.features(X).any()
    dead = GivenFeatures(relu.V[(relu.V @ off.T)[:, 0] < 0], "relu")
    theta = torch.ones(1, 3, dtype=torch.float64) @ dead.features(X)
    each = shares(Linearization(dead, theta, torch.cat([X, off])))
    assert each[3] == 0 and each[:3].min() > 0
