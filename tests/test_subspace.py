"""Features seen from a subspace against dense Jacobians, and against features of dimension k."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from paperlib import (
    GivenFeatures,
    ModuleFeatures,
    RandomFeatures,
    SubspaceFeatures,
    compare,
    cosine_basis,
    fit_min_norm,
    principal_basis,
    projection_loss,
    reconstruct,
    sphere,
)
from paperlib.data.cifar10 import CLASSES
from paperlib.experiments import effective_dimension
from paperlib.experiments.effective_dimension import (
    attack_pictures,
    boxed_error,
    check_picture_cell,
    check_subspace_cell,
    other_pictures,
    run_picture_cell,
    run_subspace_cell,
    subspace_data,
)

DOUBLE = torch.float64
N, D, K, P = 3, 9, 4, 30


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def module():
    body = torch.nn.Sequential(torch.nn.Linear(D, P), torch.nn.GELU()).double()
    with torch.no_grad():
        for index, parameter in enumerate(body.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=index + 1) / 3)
    return ModuleFeatures(body, D)


def random_features():
    return RandomFeatures(D, P, "relu+tanh", seed=3, dtype=DOUBLE)


KINDS = {"weights": random_features, "module": module}


@pytest.fixture(params=KINDS)
def model(request):
    return KINDS[request.param]()


def dense_jacobian(features, z):
    """(p, k) by autograd through the inner map, which is checked elsewhere."""
    inner, S = features.inner, math.sqrt(D / K) * features.basis
    rows = inner.jvp((z @ S.T)[None].expand(D, -1), torch.eye(D, dtype=DOUBLE))
    return rows.T @ S


def test_values_and_products_against_the_dense_jacobian(model):
    features = SubspaceFeatures(model, normal(D, K))
    Z, dZ, W = sphere(N, K, seed=1, dtype=DOUBLE).X, normal(N, K, seed=5), normal(N, P, seed=6)
    torch.testing.assert_close(features.features(Z), model.features(features.inputs(Z)))
    for i, J in enumerate(dense_jacobian(features, z) for z in Z):
        assert J.shape == (P, K)
        torch.testing.assert_close(features.jvp(Z, dZ)[i], J @ dZ[i])
        torch.testing.assert_close(features.vjp(Z, W)[i], J.T @ W[i])


def test_the_preconditioner_estimates_the_trace_over_the_subspace(model):
    features = SubspaceFeatures(model, normal(D, K))
    Z = sphere(N, K, seed=1, dtype=DOUBLE).X
    Js = [dense_jacobian(features, z) for z in Z]
    exact = torch.tensor([[float((A * B).sum()) / K for B in Js] for A in Js], dtype=DOUBLE)
    for block in features.blocks():
        estimate = block.slope_gram(block.linearize(Z)[1])
    assert float((estimate - exact).norm() / exact.norm()) < 0.3


def test_it_is_the_model_of_dimension_k_with_projected_weights():
    model = random_features()
    features = SubspaceFeatures(model, normal(D, K))
    same = GivenFeatures(math.sqrt(D / K) * model.V @ features.basis, "relu+tanh")
    Z = sphere(N, K, seed=1, dtype=DOUBLE).X
    torch.testing.assert_close(features.features(Z), same.features(Z))
    theta = normal(1, P, seed=4)
    candidates = sphere(N, K, seed=8, dtype=DOUBLE).X
    torch.testing.assert_close(
        projection_loss(features, theta, candidates), projection_loss(same, theta, candidates)
    )
    assert features.linear_coefficient == same.linear_coefficient != 0
    for ours, theirs in zip(features.blocks(), same.blocks(), strict=True):
        torch.testing.assert_close(ours.weights, theirs.weights)
    low = next(iter(features.blocks(dtype=torch.bfloat16))).weights
    assert low.dtype == torch.bfloat16
    features.release(torch.bfloat16)
    features.release(DOUBLE)
    torch.testing.assert_close(features.features(Z), same.features(Z))


def test_weights_of_random_features_keep_their_law():
    basis = torch.linalg.qr(normal(200, 20))[0].float()
    features = SubspaceFeatures(RandomFeatures(200, 4000, seed=1), basis)
    W = torch.cat([W for _, W in features.weight_blocks()])
    assert W.shape == (4000, 20)
    assert float(W.mean()) == pytest.approx(0, abs=0.005)
    assert float(W.var()) == pytest.approx(1 / 20, rel=0.03)


def test_coordinates_and_inputs_undo_each_other():
    features = SubspaceFeatures(random_features(), normal(D, K))
    Z = sphere(N, K, seed=1, dtype=DOUBLE).X
    X = features.inputs(Z)
    torch.testing.assert_close(X.norm(dim=1), torch.full((N,), math.sqrt(D), dtype=DOUBLE))
    torch.testing.assert_close(features.coordinates(X), Z)
    torch.testing.assert_close(features.left_out(X), torch.zeros(N, dtype=DOUBLE))


def test_left_out_is_the_floor_that_it_says():
    features = SubspaceFeatures(random_features(), normal(D, K))
    X = sphere(N, D, seed=2, dtype=DOUBLE).X
    share = features.left_out(X)
    nearest = features.inputs(features.coordinates(X))
    distance = (X - nearest).norm(dim=1) / math.sqrt(D)
    torch.testing.assert_close(distance, (2 - 2 * (1 - share).sqrt()).sqrt())
    for seed in range(20):
        other = features.inputs(sphere(N, K, seed=seed, dtype=DOUBLE).X)
        assert bool(((X - other).norm(dim=1) / math.sqrt(D) >= distance).all())


def test_the_mean_joins_the_basis():
    mean, columns = normal(D), normal(D, K - 1, seed=2)
    features = SubspaceFeatures(random_features(), columns, mean=mean)
    assert features.d == K
    torch.testing.assert_close(features.basis[:, 0], mean / mean.norm())
    samples = normal(N, 1, seed=5).abs() * (mean + normal(N, K - 1, seed=6) @ columns.T)
    share = features.left_out(samples)
    torch.testing.assert_close(share, torch.zeros(N, dtype=DOUBLE))
    alone = SubspaceFeatures(random_features(), columns)
    assert bool((alone.left_out(samples) > 1e-3).all())


def test_an_orthonormal_basis_is_kept():
    basis = torch.linalg.qr(normal(D, K))[0]
    torch.testing.assert_close(SubspaceFeatures(random_features(), basis).basis, basis)
    scaled = SubspaceFeatures(random_features(), 1e-3 * basis)
    torch.testing.assert_close(scaled.basis, basis)


def test_a_basis_that_is_being_optimised_is_taken_as_it_is():
    basis, mean = normal(D, K, seed=6), normal(D, seed=7)
    for leaves in ((basis.clone().requires_grad_(), mean), (basis, mean.clone().requires_grad_())):
        attack = SubspaceFeatures(random_features(), leaves[0], mean=leaves[1])
        assert not attack.basis.requires_grad
        attack.describe()
        expected = SubspaceFeatures(random_features(), basis, mean=mean)
        assert torch.equal(attack.basis, expected.basis)


def test_description_tells_two_bases_apart():
    model = random_features()
    first, again, other = (SubspaceFeatures(model, normal(D, K, seed=s)) for s in (0, 0, 1))
    assert first.describe() == again.describe() != other.describe()
    assert first.describe()["inner"] == model.describe()


@pytest.mark.parametrize("kind", KINDS)
def test_attacks_below_d_n(kind):
    n, d, k = 3, 24, 5
    X, y, basis = subspace_data(n, d, k, seed=1)
    p = 60  # less than d n = 72, four times k n
    if kind == "weights":
        model = RandomFeatures(d, p, seed=1)
    else:
        body = torch.nn.Sequential(torch.nn.Linear(d, p), torch.nn.Softplus())
        with torch.no_grad():
            body[0].weight.copy_(normal(p, d, seed=1) * (3 / math.sqrt(d)))
            body[0].bias.zero_()
        model = ModuleFeatures(body, d)
    theta = fit_min_norm(model, X, y)
    features = SubspaceFeatures(model, basis)
    record = reconstruct(features, theta, n, seed=0, progress=False, tolerance=1e-8)
    assert record.identifiable
    assert compare(X, features.inputs(record.samples)).recovered() == n


def test_data_off_the_subspace_are_as_far_off_as_asked():
    X, _, basis = subspace_data(5, 12, 4, left_out=0.03, seed=2)
    features = SubspaceFeatures(RandomFeatures(12, 5), basis)
    torch.testing.assert_close(features.left_out(X), torch.full((5,), 0.03), rtol=1e-4, atol=0)
    torch.testing.assert_close(X.norm(dim=1), torch.full((5,), math.sqrt(12)))


def test_a_cell_on_the_subspace_and_one_that_knows_nothing():
    known = run_subspace_cell(3, 24, 4, 4.0, seed=0)
    assert known["recovered"] == 3 and known["p"] == 48 and known["p_over_dn"] < 0.7
    assert known["floor"] < 1e-3
    off = run_subspace_cell(3, 24, 4, 8.0, left_out=0.01, seed=0)
    assert off["floor"] == pytest.approx(math.sqrt(2 - 2 * math.sqrt(0.99)), rel=1e-3)
    assert off["signed_error"] > off["floor"]


# The bases


def test_principal_directions_of_known_data():
    Q = torch.linalg.qr(normal(D, D))[0]
    strengths = torch.tensor([5.0, 3.0, 2.0] + [0.1] * (D - 3), dtype=DOUBLE)
    X = strengths[:, None] * Q.T
    basis = principal_basis(X, 3)
    torch.testing.assert_close((basis.T @ Q[:, :3]).abs(), torch.eye(3, dtype=DOUBLE))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)])
def test_cosine_waves_against_scipy(shape):
    d = math.prod(shape)
    X = normal(20, d) * torch.linspace(2, 0.1, d, dtype=DOUBLE)
    whole = cosine_basis(X, shape, d)
    torch.testing.assert_close(whole.T @ whole, torch.eye(d, dtype=DOUBLE))
    energy = (X @ whole).square().sum(0)
    assert bool((energy[:-1] >= energy[1:] - 1e-9).all())
    pictures = X.numpy().reshape(20, *shape[:2], -1)
    waves = dctn(pictures, axes=(1, 2), norm="ortho")
    colours = np.linalg.eigh(np.einsum("nhwc,nhwe->ce", pictures, pictures))[1]
    expected = np.sort(np.square(waves @ colours).sum(0).ravel())[::-1]
    np.testing.assert_allclose(energy.numpy(), expected, rtol=1e-9)
    torch.testing.assert_close(cosine_basis(X, shape, 5), whole[:, :5])


def test_smooth_pictures_need_few_waves():
    rows = torch.linspace(0, 1, 8, dtype=DOUBLE)
    X = torch.stack([(1 + a * rows[:, None] + b * rows).flatten() for a, b in normal(30, 2)])
    few = cosine_basis(X, (8, 8), 6)
    assert float((X - X @ few @ few.T).norm() / X.norm()) < 0.05


# The pictures


def test_the_attacker_never_sees_the_photographs_under_attack():
    data, others = other_pictures("photographs", 4, size=8, seed=0)
    assert {name.split(":")[0] for name in data.names} == {"flower", "rocket"}
    cosines = data.X @ others.T / data.d
    assert len(others) > 300 and float(cosines.max()) < 0.999


def test_nor_the_classes_of_cifar10_under_attack(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    stored = {}
    for name in CLASSES:
        folder = tmp_path / "train" / name
        folder.mkdir(parents=True)
        for i in range(3):
            picture = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(picture).save(folder / f"{i}.png")
            stored[name, i] = picture
    monkeypatch.setenv("PAPERLIB_CIFAR10", str(tmp_path))
    monkeypatch.setattr(effective_dimension, "KNOWN_CIFAR10", 8 * 3)
    other_pictures.cache_clear()
    data, others = other_pictures("cifar10", 4, size=8, seed=0)
    other_pictures.cache_clear()
    assert {name.split(":")[0] for name in data.names} == {"frog", "truck"}
    # All that the attacker has, and nothing else: every picture of the eight other classes.
    rows = [p / 255.0 for (name, _), p in stored.items() if name not in ("frog", "truck")]
    expected = torch.tensor(np.stack(rows).reshape(24, -1), dtype=others.dtype)
    expected = expected - expected.mean(1, keepdim=True)
    found = torch.nn.functional.normalize(others) @ torch.nn.functional.normalize(expected).T
    assert others.shape == (24, 192) and bool((found.amax(1) > 0.95).all())
    assert len(set(found.argmax(1).tolist())) == 24


def test_pictures_within_a_subspace():
    run = attack_pictures(2, 12, 0.5, size=8, restarts=1, max_steps=5)
    assert run.record.samples.shape == (2, 12)
    floor = compare(run.data.X, run.nearest).signed
    assert bool((run.errors.nearest >= floor - 1e-5).all())
    assert boxed_error(run.data, run.data.X) < 1e-5
    assert boxed_error(run.data, run.errors.matched) <= run.errors.signed_error + 1e-6
    blind = attack_pictures(2, 192, 0.5, size=8, restarts=1, max_steps=5)
    assert blind.record.samples.shape == (2, 192) and blind.left_out == 0


@pytest.mark.parametrize("basis", ["cosine", "principal"])
def test_the_cell_of_pictures_reports_what_the_attack_did(basis):
    options = {"basis": basis, "size": 8, "seed": 1, "data_seed": 2, "restarts": 1, "max_steps": 4}
    cell = run_picture_cell(2, 12, 0.5, activation="gelu", **options)
    run = attack_pictures(2, 12, 0.5, activation="gelu", **options)
    assert (cell["d"], cell["p"]) == (192, 192) and cell["p_over_kn"] == 192 / 24
    assert cell["signed_error"] == pytest.approx(run.errors.signed.mean())
    assert cell["largest_error"] == pytest.approx(run.errors.signed.max())
    assert cell["floor"] == pytest.approx(compare(run.data.X, run.nearest).signed_error)
    assert cell["projection_loss"] == run.record.loss
    data, others = other_pictures("photographs", 2, size=8, seed=2)
    axes = {"cosine": lambda: cosine_basis(others, data.image_shape, 12)}
    axes["principal"] = lambda: principal_basis(others, 12)
    off = data.X - data.X @ axes[basis]() @ axes[basis]().T
    assert cell["left_out"] == pytest.approx(float(off.square().sum(1).mean()) / 192, rel=1e-3)
    assert 0 < cell["boxed_error"] <= cell["signed_error"] + 1e-6


# Bad input


@pytest.mark.parametrize(
    ("basis", "mean", "error", "message"),
    [
        ([[1.0]], None, TypeError, "basis must be a tensor of floating-point numbers"),
        (torch.ones(D, 2).int(), None, TypeError, "basis must be a tensor of floating-point"),
        (torch.ones(D), None, ValueError, r"basis must have shape \(9, k\), got \(9,\)"),
        (torch.ones(K, D), None, ValueError, r"basis must have shape \(9, k\), got \(4, 9\)"),
        (torch.ones(D, 0), None, ValueError, r"basis must have shape \(9, k\), got \(9, 0\)"),
        (normal(D, D + 1), None, ValueError, "at most that many directions, got 10"),
        (torch.ones(D, 2), None, ValueError, "columns must be independent, 1 depend"),
        (torch.zeros(D, 1), None, ValueError, "columns must be independent, 1 depend"),
        (torch.full((D, 1), math.nan), None, ValueError, "basis must be finite"),
        (normal(D, 2), torch.ones(2), ValueError, r"mean must have shape \(9,\), got \(2,\)"),
        (normal(D, 2), normal(D, 2)[:, 0] * 3, ValueError, "columns must be independent, 1 depend"),
        (normal(D, 2), 0.0, TypeError, "mean must be a tensor"),
    ],
)
def test_bad_subspaces_are_refused(basis, mean, error, message):
    with pytest.raises(error, match=message):
        SubspaceFeatures(random_features(), basis, mean=mean)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: principal_basis(torch.ones(3, 5), 2), ValueError, "3 samples span 1 directions"),
        (lambda: principal_basis(torch.zeros(3, 5), 1), ValueError, "samples span 0 directions"),
        (lambda: principal_basis(torch.ones(5), 1), ValueError, r"X must have shape \(m, d\)"),
        (lambda: principal_basis([1.0], 1), TypeError, "X must be a tensor"),
        (lambda: principal_basis(torch.ones(2, 2), 0), ValueError, "k must be at least 1"),
        (lambda: cosine_basis(torch.ones(2, 6), (2, 2), 1), ValueError, "image_shape must be"),
        (lambda: cosine_basis(torch.ones(2, 6), (6,), 1), ValueError, "image_shape must be"),
        (lambda: cosine_basis(torch.ones(2, 6), (2, 3), 7), ValueError, "there are d = 6 waves"),
        (lambda: other_pictures("digits", 2, size=8, seed=0), ValueError, "photographs or cifar10"),
    ],
)
def test_other_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


SUBSPACE = {"n": 3, "d": 9, "k": 4, "p_over_kn": 2.0, "left_out": 0.0, "activation": "relu"}
SUBSPACE |= {"seed": 0, "restarts": 1, "max_steps": 5}
PICTURE = {"n": 3, "k": 4, "p_over_dn": 0.5, "dataset": "photographs", "basis": "cosine"}
PICTURE |= {"size": 8, "activation": "relu", "seed": 0, "data_seed": 0, "restarts": 1}
PICTURE |= {"max_steps": 5}


@pytest.mark.parametrize(
    ("check", "cell", "change", "message"),
    [
        (check_subspace_cell, SUBSPACE, {"k": 10}, "k must be at most d = 9"),
        (check_subspace_cell, SUBSPACE, {"k": 9, "left_out": 0.1}, "below it if something is left"),
        (check_subspace_cell, SUBSPACE, {"left_out": 1.0}, "left_out must be"),
        (check_subspace_cell, SUBSPACE, {"p_over_kn": 0.1}, "p must be at least n = 3, got 1"),
        (check_subspace_cell, SUBSPACE, {"activation": "x"}, "activation must be one of"),
        (check_picture_cell, PICTURE, {"basis": "wavelet"}, "basis must be one of cosine"),
        (check_picture_cell, PICTURE, {"dataset": "digits"}, "dataset must be one of photographs"),
        (check_picture_cell, PICTURE, {"p_over_dn": 0}, "p_over_dn must be above 0"),
        (check_picture_cell, PICTURE, {"k": 3 * 8**2 + 1}, "k must be at most d = 192, got 193"),
        (check_picture_cell, PICTURE, {"size": 2}, "size must be at least 4"),
    ],
)
def test_cells_are_checked(check, cell, change, message):
    check(**cell)
    with pytest.raises(ValueError, match=message):
        check(**cell | change)
