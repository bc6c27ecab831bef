"""What runs on the processor runs beside it, too, on a device played by `stand_in.py`."""

import math

import pytest
import stand_in
import torch
from torch import nn

import paperlib
from paperlib.block_height import default_block_rows
from paperlib.exchange import Exchanges
from paperlib.experiments.classification import run_classification_cell
from paperlib.experiments.law import run_law_cell
from paperlib.experiments.residual import run_drift_cell, run_residual_cell
from paperlib.experiments.two_layer import run_two_layer_cell
from paperlib.experiments.vision_transformer import run_transformer_cell
from paperlib.known_samples import WithoutKnown
from paperlib.lift import Lift
from paperlib.memory import KEPT
from paperlib.projection import Linearization

CPU = torch.device("cpu")
SINGLE, DOUBLE = torch.float32, torch.float64
N, D, P = 5, 20, 1500


@pytest.fixture
def there():
    return stand_in.device()


class Killed(Exception):
    pass


def data(device, *, n=N, d=D, dtype=SINGLE):
    return paperlib.sphere(n, d, seed=3, dtype=dtype).X.to(device)


def labels(device, *, n=N, outputs=1, dtype=SINGLE):
    draw = torch.randn(n, outputs, generator=torch.Generator().manual_seed(7), dtype=DOUBLE)
    return draw.to(device, dtype)


# Feature maps


def random_features(device, activation="relu", **options):
    return paperlib.RandomFeatures(D, P, activation, seed=1, device=device, **options)


def module():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(D, 600), nn.GELU()).double()


MAPS = {
    "random features": random_features,
    "random features, streamed": lambda device: random_features(device, placement="streamed"),
    "random features, float64": lambda device: random_features(device, "relu+tanh", dtype=DOUBLE),
    "odd random features": lambda device: random_features(device, "tanh"),
    "given features": lambda device: paperlib.GivenFeatures(random_features(CPU).V.to(device)),
    "a module": lambda device: paperlib.ModuleFeatures(module(), D, device=device, dtype=DOUBLE),
    "gradients of a module": lambda device: paperlib.GradientFeatures(
        paperlib.TwoLayer(D, 20, activation="gelu", seed=1, dtype=DOUBLE),
        D,
        device=device,
        dtype=DOUBLE,
    ),
    "features on a subspace": lambda device: paperlib.SubspaceFeatures(
        random_features(device), paperlib.principal_basis(data(device, n=30), 10)
    ),
}


def same(found, expected, **tolerances):
    """Tensors of the stand-in against those of the processor."""
    assert found.device.type == stand_in.NAME and expected.device == CPU
    torch.testing.assert_close(found.cpu(), expected, **tolerances)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("kind", MAPS)
def test_values_and_products_are_those_of_the_processor(there, kind, outputs):
    def values(device):
        model = MAPS[kind](device)
        assert model.device == device
        X = data(device, d=model.d, dtype=model.dtype)
        Phi = model.features(X)
        theta = labels(device, outputs=outputs, dtype=model.dtype).T @ Phi
        candidates = data(device, n=N + 2, d=model.d, dtype=model.dtype).requires_grad_()
        loss = paperlib.projection_loss(model, theta, candidates)
        loss.backward()
        jvp = model.jvp(X, X.roll(1, 0))
        return Phi, jvp, model.vjp(X, jvp), loss.detach(), candidates.grad

    for found, expected in zip(values(there), values(CPU), strict=True):
        same(found, expected, rtol=1e-4, atol=1e-5)


# Attacks


def attack(device, kind="random features", *, n=N, outputs=1, **options):
    model = MAPS[kind](device)
    X = data(device, n=n, d=model.d, dtype=model.dtype)
    theta = labels(device, n=n, outputs=outputs, dtype=model.dtype).T @ model.features(X)
    found = paperlib.reconstruct(model, theta, n, seed=2, progress=False, **options)
    assert found.samples.device == device
    return X, found


@pytest.mark.parametrize("kind", MAPS)
def test_every_feature_map_is_attacked(there, kind):
    X, found = attack(there, kind, n=2)
    assert found.explained
    assert paperlib.compare(X, found.samples).up_to_sign.max() < 1e-3


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("bulk", ["float32", "float16", "bfloat16", "int8"])
def test_attacks_in_every_precision(there, bulk, outputs):
    X, found = attack(there, outputs=outputs, bulk=bulk)
    assert found.explained and paperlib.compare(X, found.samples).recovered() == N


def test_what_multiplies_bfloat16_fast_begins_in_it(there, monkeypatch):
    fast = lambda device: device.type == stand_in.NAME  # noqa: E731
    for name in ("fast_bfloat16", "bfloat16_units"):
        monkeypatch.setattr(f"paperlib.precision.{name}", fast)
    monkeypatch.setattr("paperlib.precision.WORTHWHILE", 0)
    X, found = attack(there)
    assert found.explained and paperlib.compare(X, found.samples).recovered() == N
    bulk, finish = (
        [stage["dtype"] for stage in found.stages if stage["stage"] == name]
        for name in ("bulk", "finish")
    )
    assert set(bulk) == {"bfloat16"} and finish[-1] == "float32"


@pytest.mark.parametrize("keep", KEPT)
def test_attacks_that_keep_what_fits(there, keep):
    X, found = attack(there, keep=keep)
    assert found.explained and paperlib.compare(X, found.samples).recovered() == N


@pytest.mark.parametrize("start", ["random", "subspace", "messages"])
def test_attacks_from_every_start(there, start):
    X, found = attack(there, start=start)
    assert found.explained and paperlib.compare(X, found.samples).recovered() == N


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_steps_by_the_expected_normal_matrix(there, activation, monkeypatch):
    monkeypatch.setattr("paperlib.expected_normal_matrix.WORTHWHILE", 0)
    X, found = attack(there, "odd random features" if activation == "tanh" else "random features")
    errors = paperlib.compare(X, found.samples)
    assert found.explained and errors.up_to_sign.max() < 1e-3


@pytest.mark.parametrize("known", [0, 2])
def test_exchanges_of_candidates(there, known):
    def run(device):
        model, X = random_features(device), data(device, n=N + known)
        theta = paperlib.fit_min_norm(model, X, labels(device, n=N + known, outputs=2))
        if known:
            model = WithoutKnown(model, X[N:])
            theta = model.off(theta)
        settle = lambda candidates: Linearization(model, theta, candidates)  # noqa: E731
        point = settle(paperlib.sphere(N, D, seed=7).X.to(device))
        moves = Exchanges(point, settle=settle, generator=torch.Generator().manual_seed(0))
        return moves.next()

    # As far as moves are the same on every processor: which of them are made, and how far they go.
    found, expected = run(there), run(CPU)
    assert found.device == there
    same(found.norm(dim=1), expected.norm(dim=1))


def test_the_published_procedure(there):
    options = {"solver": "published", "max_steps": 40}
    found, expected = (attack(device, **options)[1] for device in (there, CPU))
    same(found.samples, expected.samples, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("start", ["random", "messages"])
def test_an_attack_goes_on_where_it_was_stopped(there, start, tmp_path, monkeypatch):
    monkeypatch.setattr("paperlib.saved_attack.INTERVAL", 0.0)
    steps = []

    def kill(stage, loss, candidates):
        steps.append(stage)
        if len(steps) == 12:
            raise Killed

    with pytest.raises(Killed):
        attack(there, start=start, resume=tmp_path, callback=kill)
    X, found = attack(there, start=start, resume=tmp_path)
    assert found.explained and paperlib.compare(X, found.samples).recovered() == N
    # Message passing, of the stages, begins anew.
    assert any(stage["ended"] == "interrupted" for stage in found.stages) or start == "messages"
    again = attack(there, start=start, resume=tmp_path)[1]
    assert torch.equal(again.samples.cpu(), found.samples.cpu())


def test_frames_are_kept_and_drawn(there, tmp_path):
    frames = paperlib.Frames()
    attack(there, callback=frames)
    assert {frame.samples.device for frame in frames.all()} == {CPU}
    frames.save(tmp_path / "frames.npz", about={})
    kept, _ = paperlib.Frames.load(tmp_path / "frames.npz")
    assert len(kept) == len(frames) > 4


def test_known_samples_and_their_number(there):
    model, X = random_features(there), data(there)
    theta = paperlib.fit_min_norm(model, X, labels(there))
    found = paperlib.reconstruct_unknown(model, theta, N, X[:2], seed=2, progress=False)
    assert paperlib.compare(X[2:], found.samples).recovered() == N - 2
    count = paperlib.estimate_sample_count(model, theta, most=N + 2, seed=2, progress=False)
    assert count.n == N and count.samples.device == there


def test_attacks_on_all_layers(there):
    def run(device):
        network = paperlib.TwoLayer(D, 30, seed=1, dtype=DOUBLE)
        features = paperlib.GradientFeatures(network, D, device=device, dtype=DOUBLE)
        X = data(device, n=2, dtype=DOUBLE)
        theta = paperlib.fit_min_norm(features, X, labels(device, n=2, dtype=DOUBLE))
        options = {"steps": 5, "restarts": 1, "seed": 4, "progress": False}
        tangent = paperlib.ntk_attack(features, theta, 2, **options)
        margin = paperlib.kkt_attack(features, theta, 2, **options)
        layer = paperlib.first_layer_attack(
            features, theta, 2, starts=6, steps=5, rounds=2, polish=2, seed=4, progress=False
        )
        return tangent.samples, margin.samples, layer.samples

    for found, expected in zip(run(there), run(CPU), strict=True):
        same(found, expected, rtol=1e-6, atol=1e-6)


# Training, audits and what protects


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_training(there, loss):
    classes = torch.tensor([0, 1, 0, 1, 1])
    outputs, y = (2, classes) if loss == "cross-entropy" else (1, labels(CPU)[:, 0])

    def run(device):
        network = paperlib.TwoLayer(D, 50, outputs, device=device)
        problem = data(device), y.to(device)
        options = {"loss": loss, "max_steps": 20, "progress": False}
        every = paperlib.train(network, *problem, **options)
        last = paperlib.train_last_layer(random_features(device), *problem, **options)
        return every.theta, last.theta

    for found, expected in zip(run(there), run(CPU), strict=True):
        same(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda device: paperlib.TwoLayer(192, 40, seed=1, device=device),
        lambda device: paperlib.ResNet((8, 8, 3), 8, blocks=1, seed=1, device=device),
        lambda device: paperlib.VisionTransformer((8, 8, 3), 8, depth=1, heads=2, device=device),
    ],
)
def test_networks(there, make):
    X = paperlib.sphere(3, 192, seed=3).X
    found, expected = make(there)(X.to(there)), make(CPU)(X)
    same(found.detach(), expected.detach(), rtol=1e-4, atol=1e-5)


def test_audit_and_protections(there):
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(6, 120), nn.GELU(), nn.Linear(120, 3)).double()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    X = paperlib.sphere(3, 6, seed=2, dtype=DOUBLE).X
    theta = labels(CPU, n=3, outputs=3, dtype=DOUBLE).T @ network[:2](X).detach()
    with torch.no_grad():
        network[2].weight += theta
        network[2].bias += labels(CPU, n=3, outputs=3, dtype=DOUBLE).sum(0)
    found = paperlib.audit(
        network,
        before,
        network.state_dict(),
        last_layer="2",
        input_shape=6,
        n=3,
        radius=math.sqrt(6),
        data=X,
        restarts=2,
        device=there,
        dtype=DOUBLE,
        progress=False,
    )
    assert found.comparison.recovered() == 3 and found.samples.device == there
    table = paperlib.protections(found, noise=[], formats=["int8"], restarts=1, progress=False)
    assert len(table) == 2


def test_releases_privacy_and_what_is_determined(there):
    def run(device):
        model = random_features(device, "relu+tanh", dtype=DOUBLE)
        X, y = data(device, dtype=DOUBLE), labels(device, dtype=DOUBLE)
        theta = paperlib.fit_min_norm(model, X, y, ridge=0.1)
        private = paperlib.private_ridge(
            model, X, y / y.abs().max(), ridge=1.0, bound=9.0, epsilon=1.0, seed=0
        ).theta
        alpha = torch.linalg.lstsq(model.features(X).T, theta.T).solution
        few = paperlib.RandomFeatures(6, 17, "gelu", device=device, dtype=DOUBLE)
        x = data(device, n=3, d=6, dtype=DOUBLE)
        explained = labels(device, n=3, dtype=DOUBLE).T @ few.features(x)
        walked = paperlib.walk_explanations(few, explained, x, steps=3)
        return (
            theta,
            private,
            paperlib.quantise(theta, "int4"),
            paperlib.combine_releases([theta, private]),
            paperlib.release_spectrum([theta, private]),
            paperlib.parameter_jacobian(model, X, alpha),
            walked.path[-1],
        )

    for found, expected in zip(run(there), run(CPU), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-8)


FEW = {"n": 2, "p_over_dn": 4.0, "max_train_steps": 20, "max_steps": 5, "restarts": 1}
CELLS = {
    "law": (run_law_cell, {"n": 3, "d": 12, "p_over_dn": 5.0, "max_steps": 20}),
    "law, published": (
        run_law_cell,
        {"n": 3, "d": 12, "p_over_dn": 5.0, "max_steps": 20, "solver": "published"},
    ),
    "two layers": (run_two_layer_cell, FEW),
    "residual network": (run_residual_cell, FEW | {"blocks": 1}),
    "drift": (run_drift_cell, {"n": 2, "p_over_dn": 4.0, "max_train_steps": 20, "blocks": 1}),
    "classification": (run_classification_cell, FEW),
    "transformer": (run_transformer_cell, FEW | {"outputs": 2}),
}


@pytest.mark.parametrize("kind", CELLS)
def test_experiments(there, kind):
    run, options = CELLS[kind]
    found, expected = (run(**options, device=str(device)) for device in (there, CPU))
    assert found.keys() == expected.keys()
    name = "training_loss" if "training_loss" in found else "drift"
    assert found[name] == pytest.approx(expected[name], rel=1e-2, abs=1e-6)


def test_subspaces(there):
    X = data(there, n=10, d=48)
    same(paperlib.cosine_basis(X, (4, 4, 3), 5), paperlib.cosine_basis(X.cpu(), (4, 4, 3), 5))
    found, expected = paperlib.principal_basis(X, 4), paperlib.principal_basis(X.cpu(), 4)
    same(found @ found.T, expected @ expected.T, rtol=1e-4, atol=1e-5)


# Blocks


def test_blocks_beside_the_processor_are_high():
    gpu = torch.device("cuda")
    assert default_block_rows(CPU, 10**6, 3072) == 8192
    assert default_block_rows(gpu, 10**6, 3072) == 65_536
    # Of no more than a gigabyte, nor lower than on a processor.
    assert default_block_rows(gpu, 10**6, 12_288) == 21_504 < 2**28 / 12_288
    assert default_block_rows(gpu, 10**6, 150_528) == 8192


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")])
@pytest.mark.parametrize("p", [9000, 100_000, 800_000, 1_234_567])
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_share_blocks_evenly(device, p, processes):
    rows = default_block_rows(device, p, 100, processes=processes)
    blocks = -(-p // rows)
    assert rows % 1024 == 0 and rows <= default_block_rows(device, p, 100)
    held = [blocks * (k + 1) // processes - blocks * k // processes for k in range(processes)]
    assert min(held) >= 1
    most = max(held) * rows
    assert most <= p / processes + 2 * rows


@pytest.mark.parametrize("keep", KEPT)
def test_a_block_takes_a_few_dozen_operations(there, keep):
    """Each is a call of the host, which a GPU waits for if there are many blocks."""
    X, step = data(there), (data(there), labels(there), torch.ones(1, D, device=there))

    def operations(rows):
        model = random_features(there, block_rows=rows)
        lift = Lift(model, labels(there).T @ model.features(X), dtype=SINGLE)
        options = {"dtype": torch.bfloat16, "keep": keep, "curvature": True}
        list(model.blocks(dtype=torch.bfloat16))  # V in that format
        with stand_in.Operations() as linearize:
            point = Linearization(model, lift.theta, X, lift=lift, **options)
        with stand_in.Operations() as product:
            point.product(*step)
        return linearize.count, product.count

    one_block, two_blocks = operations(2048), operations(1024)
    linearize, product = (two - one for one, two in zip(one_block, two_blocks, strict=True))
    assert 0 < product <= 32 and product < linearize <= 72
    assert one_block[0] - linearize < 50 and one_block[1] - product < 25


# The stand-in itself


def test_the_stand_in_does_not_mix_with_the_processor(there):
    here, away = torch.ones(3, 3), torch.ones(3, 3, device=there)
    assert away.device == there and (away + torch.tensor(1.0)).sum().item() == 18
    for mixed in (
        lambda: here + away,
        lambda: away @ here,
        lambda: torch.cat([here, away]),
        lambda: away.mul_(here),
        lambda: here * away.sum(),
        lambda: here[away.bool()],
    ):
        with pytest.raises(RuntimeError, match="same device|indices on"):
            mixed()
    with pytest.raises((TypeError, RuntimeError)):
        away.numpy()
    with pytest.raises(RuntimeError, match="not implemented on stand_in"):
        away.int() @ away.int()
    with pytest.raises(RuntimeError, match="no driver gelsd"):
        torch.linalg.lstsq(away, away, driver="gelsd")
    back = away.cpu()
    assert type(back) is torch.Tensor and back.device == CPU
    assert type(away.to(there)) is type(away) and here.to(there).device == there
    view = away[1]
    view += 1
    assert float(away.sum()) == 12 and view.untyped_storage() is not None
