import math

import pytest
import torch

from paperlib.data import digits
from paperlib.given_features import GivenFeatures
from paperlib.min_norm import fit_min_norm
from paperlib.module_features import ModuleFeatures
from paperlib.networks import ResNet, TwoLayer, VisionTransformer
from paperlib.reconstruct import reconstruct
from paperlib.sphere import random_on_sphere

NETWORKS = {
    "two layers": lambda **o: TwoLayer(64, 40, 3, **o),
    "residual": lambda **o: ResNet((8, 8), 5, 3, **o),
    "residual, colour": lambda **o: ResNet((8, 8, 3), 4, 3, blocks=2, **o),
    "transformer": lambda **o: VisionTransformer((8, 8), 12, 3, **o),
    "transformer, class token": lambda **o: VisionTransformer(
        (8, 8, 3), 8, 3, readout="class", **o
    ),
}


def rows(n, d, seed=0, dtype=torch.float64):
    return random_on_sphere(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_head_on_the_feature_map(name):
    network = NETWORKS[name](dtype=torch.float64)
    model = network.feature_map()
    X = rows(4, network.d)
    assert (model.d, model.p) == (network.d, network.p)
    torch.testing.assert_close(model.features(X) @ network.head.weight.T, network(X))
    assert network(X).shape == (4, 3)
    assert network.last_layer_parameters == 3 * network.p == network.head.weight.numel()
    assert isinstance(model, GivenFeatures if name == "two layers" else ModuleFeatures)
    dX, W = rows(4, network.d, 1), rows(4, network.p, 2)
    h = 1e-6
    difference = (model.features(X + h * dX) - model.features(X - h * dX)) / (2 * h)
    torch.testing.assert_close(model.jvp(X, dX), difference, rtol=1e-3, atol=1e-4)
    inner = (model.jvp(X, dX) * W).sum()
    torch.testing.assert_close((dX * model.vjp(X, W)).sum(), inner)


@pytest.mark.parametrize("name", NETWORKS)
def test_theta_is_what_training_added_to_the_head(name):
    network = NETWORKS[name]()
    assert not bool(network.theta.any())
    model, X = network.feature_map(), rows(2, network.d, dtype=torch.float32)
    before = model.features(X)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.25
    torch.testing.assert_close(network.theta, torch.full((3, network.p), 0.25))
    assert torch.equal(model.features(X), before)
    assert not torch.equal(network.feature_map().features(X), before)


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_depend_on_the_seed_alone(name):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = NETWORKS[name](seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    b, c = NETWORKS[name](seed=5, dtype=torch.float64), NETWORKS[name](seed=6)
    for (which, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x.double(), y)
        assert x.ndim < 2 or not torch.equal(x, z), which


@pytest.mark.parametrize("name", NETWORKS)
def test_weights_have_variance_one_over_fan_in(name):
    wide = {
        "two layers": lambda: TwoLayer(64, 900),
        "residual": lambda: ResNet((8, 8), 40),
        "residual, colour": lambda: ResNet((8, 8, 3), 40),
        "transformer": lambda: VisionTransformer((8, 8), 80),
        "transformer, class token": lambda: VisionTransformer((8, 8), 80, readout="class"),
    }[name]()
    for which, weight in wide.state_dict().items():
        if "embedding" in which or "token" in which:
            assert float(weight.std()) == pytest.approx(0.02, rel=0.3), which
        elif weight.ndim > 1:
            expected = weight[0].numel() ** -0.5
            spread = 4 / math.sqrt(2 * weight.numel())
            assert float(weight.std()) == pytest.approx(expected, rel=spread), which
            assert abs(float(weight.mean())) < 4 * expected / math.sqrt(weight.numel()), which
        else:
            assert bool((weight == (0.0 if which.endswith("bias") else 1.0)).all()), which


def test_the_residual_network_is_the_paper_s():
    network = ResNet((32, 32, 3), 2)
    stem = network.body[1]
    assert stem.weight.shape == (2, 3, 28, 28) and stem.padding == (1, 1)
    assert network.p == 49 * 2 and network.d == 3072
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 1 + 2 * 4
    assert all(m.bias is None for m in convolutions) and network.head.bias is None
    assert ResNet((8, 8), 2).p == ResNet((64, 64, 3), 2).p == 98
    assert ResNet((8, 8), 2, stem=3).p == 2 * 64


def test_residual_block_by_hand():
    network = ResNet((8, 8), 3, blocks=1, dtype=torch.float64)
    X = rows(2, 64)
    stem, block = network.body[1], network.body[3]
    h = torch.relu(torch.conv2d(X.view(2, 1, 8, 8), stem.weight, padding=1))
    inner = torch.relu(torch.conv2d(h, block.first.weight, padding=1))
    h = torch.relu(h + torch.conv2d(inner, block.second.weight, padding=1))
    torch.testing.assert_close(network.body(X), h.reshape(2, -1))


def test_colour_pictures_are_read_with_channels_last():
    network = ResNet((8, 8, 3), 4, dtype=torch.float64)
    picture = torch.zeros(1, 8, 8, 3, dtype=torch.float64)
    picture[..., 1] = 1.0
    other = ResNet((8, 8, 3), 4, dtype=torch.float64)
    with torch.no_grad():
        other.body[1].weight[:, [0, 2]] = 0.0
    torch.testing.assert_close(network(picture.view(1, -1)), other(picture.view(1, -1)))


def test_samples_come_back_from_a_residual_network_with_fitted_head():
    data = digits(2, seed=0, dtype=torch.float64)
    model = ResNet((8, 8), 14, blocks=1, dtype=torch.float64).feature_map()
    theta = fit_min_norm(model, data.X, data.y)
    found = reconstruct(model, theta, 2, tolerance=1e-12, progress=False)
    distances = torch.cdist(data.X, found.samples) / 8
    assert found.explained and float(distances.min(1).values.max()) < 1e-4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoLayer(0, 3), "d must be at least 1"),
        (lambda: TwoLayer(3, 0), "width must be at least 1"),
        (lambda: TwoLayer(3, 3, 0), "outputs must be at least 1"),
        (lambda: TwoLayer(3, 3, activation="rel"), "unknown activation 'rel'"),
        (lambda: ResNet((8,), 3), r"image_shape must be \(H, W\)"),
        (lambda: ResNet(None, 3), r"image_shape must be .* got None"),
        (lambda: ResNet((8, 8), 3, stem=11), "stem must be at most 10"),
        (lambda: ResNet((8, 8), 3, blocks=0), "blocks must be at least 1"),
        (lambda: VisionTransformer((8, 8), 12, patch=3), "patch must divide 8 and 8, got 3"),
        (lambda: VisionTransformer((8, 8), 10, heads=4), "multiple of heads = 4, got 10"),
        (lambda: VisionTransformer((8, 8), 8, readout="mean"), "readout must be one of"),
    ],
)
def test_wrong_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_seed_that_is_no_whole_number_is_refused():
    with pytest.raises(TypeError, match=r"seed must be a whole number, got 1\.7"):
        TwoLayer(3, 3, seed=1.7)
