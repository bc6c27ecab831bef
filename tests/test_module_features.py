import numpy as np
import pytest
import torch
from torch import nn

from paperlib import matrix_units
from paperlib.checks import check_rows
from paperlib.given_features import GivenFeatures
from paperlib.min_norm import fit_min_norm
from paperlib.module_features import ModuleFeatures, Tangents
from paperlib.networks.network import ImageRows
from paperlib.projection import Linearization, projection_loss
from paperlib.random_features import RandomFeatures
from paperlib.reconstruct import reconstruct
from paperlib.sphere import random_on_sphere, to_sphere


def points(n, d, seed=0, dtype=torch.float64):
    return random_on_sphere(n, d, generator=torch.Generator().manual_seed(seed)).to(dtype)


def seeded(make, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().to(dtype).eval()


MODULES = {
    "perceptron": ((6,), lambda: nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 7))),
    "convolution": (
        (1, 4, 4),
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 2, 2)),
    ),
    "batch normalisation": (
        (1, 4, 4),
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Softplus()),
    ),
    "attention": (
        (5, 4),
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True),
    ),
    "relu in place": ((6,), lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(inplace=True))),
}


def model_of(name, **options):
    shape, make = MODULES[name]
    return ModuleFeatures(seeded(make), shape, **options)


def dense_jacobians(model, X):
    """(n, p, d) by running reverse mode on one row at a time, one feature at a time."""
    out = []
    for x in X:
        x = x.clone().requires_grad_()
        phi = model.module(x.reshape(1, *model.input_shape)).flatten()
        out.append(
            torch.stack([torch.autograd.grad(f, x, retain_graph=True)[0].flatten() for f in phi])
        )
    return torch.stack(out)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, None])
@pytest.mark.parametrize("name", MODULES)
def test_products_agree_with_dense_jacobians(name, chunk, dense):
    model = model_of(name, chunk=chunk, dense=dense)
    X = points(5, model.d)
    J = dense_jacobians(model, X)
    phi = torch.cat([model.module(x.reshape(1, *model.input_shape)).flatten(1) for x in X])
    torch.testing.assert_close(model.features(X), phi)
    dX, W = torch.randn(5, model.d, dtype=X.dtype), torch.randn(5, model.p, dtype=X.dtype)
    torch.testing.assert_close(model.jvp(X, dX), torch.einsum("npd,nd->np", J, dX))
    torch.testing.assert_close(model.vjp(X, W), torch.einsum("npd,np->nd", J, W))
    # The same linearisation serves many products.
    (block,) = model.blocks()
    value, state = block.linearize(X)
    torch.testing.assert_close(value, phi)
    for _ in range(3):
        torch.testing.assert_close(block.jvp(state, dX), torch.einsum("npd,nd->np", J, dX))
        torch.testing.assert_close(block.vjp(state, W), torch.einsum("npd,np->nd", J, W))
    formed = [tangents._jacobians is not None for tangents in state]
    assert set(formed) == {dense}


def test_jacobians_are_formed_where_they_fit_the_memory_and_only_when_needed():
    model = model_of("convolution", dense=True)
    X = points(5, model.d)
    block = next(model.blocks())
    _, state = block.linearize(X)
    assert [tangents._jacobians for tangents in state] == [None]
    torch.testing.assert_close(next(iter(state)).jacobians(), dense_jacobians(model, X))
    assert model.dense_samples == int(2 * 2**30 / (8 * model.p * model.d))
    assert model_of("convolution").dense_samples == 0
    model.dense_samples = 4
    _, state = block.linearize(X)
    block.jvp(state, X)
    assert [tangents._jacobians for tangents in state] == [None]


def test_samples_beyond_the_memory_are_traced_again_and_give_the_same():
    model = model_of("convolution")
    X = points(6, model.d)
    dX, W = torch.randn_like(X), torch.randn(6, model.p, dtype=X.dtype)
    tight = model_of("convolution", memory=1e-9)
    assert tight.kept_samples == tight.chunk == 1 and model.kept_samples > 1000
    (block,) = tight.blocks()
    _, state = block.linearize(X)
    assert sum(kept is not None for kept in state._kept) == 0
    torch.testing.assert_close(block.jvp(state, dX), model.jvp(X, dX))
    torch.testing.assert_close(block.vjp(state, W), model.vjp(X, W))
    part = model_of("convolution", memory=1e-9, chunk=1)
    part.kept_samples = 3
    _, state = next(part.blocks()).linearize(X)
    assert [kept is not None for kept in state._kept] == [True] * 2 + [False] * 4
    torch.testing.assert_close(next(part.blocks()).jvp(state, dX), model.jvp(X, dX))


@pytest.mark.parametrize("chunk", [2, None])
def test_slope_gram_is_positive_and_tends_to_the_traces(chunk):
    X = points(4, 6)
    many = model_of("perceptron", probes=4000, chunk=chunk)
    J = dense_jacobians(many, X)
    exact = torch.einsum("ipd,jpd->ij", J, J) / many.d
    (block,) = many.blocks()
    estimate = block.slope_gram(block.linearize(X)[1])
    assert float((estimate - exact).abs().max()) < 0.05 * float(exact.max())
    few = next(model_of("perceptron", probes=1).blocks())
    gram = few.slope_gram(few.linearize(X)[1])
    assert torch.equal(gram, gram.T)
    assert float(torch.linalg.eigvalsh(gram)[0]) > -1e-12
    # Off the diagonal nothing would be left if every sample had its own probes.
    assert float(exact[~torch.eye(4, dtype=bool)].abs().min()) > 0.05 * float(exact.max())


def test_probes_depend_on_the_seed_alone():
    X = points(3, 6)
    grams = []
    for seed in (0, 0, 1):
        block = next(model_of("perceptron", seed=seed).blocks())
        grams.append(block.slope_gram(block.linearize(X)[1]))
    assert torch.equal(grams[0], grams[1]) and not torch.equal(grams[0], grams[2])


def test_random_features_as_a_module_have_the_same_loss_and_gauss_newton_model():
    rf = RandomFeatures(6, 40, "gelu", seed=3, dtype=torch.float64)
    linear = nn.Linear(6, 40, bias=False)
    linear.weight.data = rf.V.clone()
    module = ModuleFeatures(nn.Sequential(linear.double(), nn.GELU()), 6, probes=8)
    X, S = points(3, 6), points(3, 6, seed=1)
    theta = fit_min_norm(rf, X, torch.randn(3, 2, dtype=X.dtype))
    torch.testing.assert_close(
        fit_min_norm(module, X, torch.ones(3)), fit_min_norm(rf, X, torch.ones(3))
    )
    a, b = (Linearization(model, theta, S, curvature=True) for model in (rf, module))
    assert a.loss == pytest.approx(b.loss, rel=1e-12)
    torch.testing.assert_close(a.gradient, b.gradient)
    step = torch.randn_like(S), torch.randn(3, 2, dtype=S.dtype), None
    for left, right in zip(a.product(*step)[:2], b.product(*step)[:2], strict=True):
        torch.testing.assert_close(left, right)
    S.requires_grad_()
    loss = projection_loss(module, theta, S)
    (gradient,) = torch.autograd.grad(loss, S)
    torch.testing.assert_close(gradient, a.loss_gradient)


def test_samples_come_back_from_a_module():
    module = seeded(lambda: nn.Sequential(nn.Linear(6, 90), nn.Tanh(), nn.Linear(90, 120)))
    model = ModuleFeatures(module, 6)
    X = points(2, 6)
    theta = fit_min_norm(model, X, torch.tensor([1.0, -0.5]))
    found = reconstruct(model, theta, 2, tolerance=1e-16, progress=False)
    assert found.explained
    distances = torch.cdist(X, found.samples)
    assert float(distances.min(1).values.max()) < 1e-5
    assert found.options["model"]["module"] == "Sequential"


def test_features_are_a_snapshot():
    module = seeded(MODULES["perceptron"][1])
    model = ModuleFeatures(module, 6)
    X = points(2, 6)
    before = model.features(X)
    nn.init.zeros_(module[0].weight)
    assert torch.equal(model.features(X), before)
    assert all(t.requires_grad for t in module.parameters())
    assert not any(t.requires_grad for t in model.module.parameters())


def test_describe_tells_modules_apart():
    a, b = model_of("perceptron").describe(), model_of("perceptron").describe()
    assert a == b and a["p"] == 7 and a["d"] == 6
    module = seeded(MODULES["perceptron"][1])
    module[0].weight.data[0, 0] += 1e-6
    assert ModuleFeatures(module, 6).describe()["sha256"] != a["sha256"]
    one = nn.Linear(6, 3)
    relu, tanh = (ModuleFeatures(nn.Sequential(one, act), 6) for act in (nn.ReLU(), nn.Tanh()))
    assert relu.describe()["sha256"] != tanh.describe()["sha256"]
    wide, high = (ImageRows(shape) for shape in ((2, 3), (3, 2)))
    assert ModuleFeatures(wide, 6).describe() != ModuleFeatures(high, 6).describe()


class Printed(nn.Linear):
    """A layer that prints as an object without a name does."""

    def extra_repr(self):
        return f"<function at {hex(id(self))}>"


def test_describe_does_not_depend_on_where_a_module_lies_in_memory():
    module = Printed(6, 3)
    one, other = ModuleFeatures(module, 6), ModuleFeatures(module, 6)
    assert str(one.module) != str(other.module) and one.describe() == other.describe()


def test_rows_and_dtypes_follow_the_module():
    model = model_of("perceptron", dtype=torch.float32)
    X = points(2, 6, dtype=torch.float32)
    assert model.features(X).dtype == torch.float32
    assert check_rows("X", X, model) is X
    with pytest.raises(TypeError, match="float32, got torch.float64"):
        model.features(X.double())
    with pytest.raises(ValueError, match=r"\(n, 6\), got \(2, 5\)"):
        model.features(X[:, :5])
    with pytest.raises(ValueError, match="its own dtype"):
        list(model.blocks(dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="lifted"):
        next(model.blocks()).linearize(X, lifted=True)


class Sizes(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.BatchNorm1d(6).train(), ValueError, r"mixes the rows.*eval\(\) first"),
        (lambda: nn.Dropout(0.5).train(), ValueError, r"called again.*eval\(\) first"),
        (lambda: Sizes(lambda x: x - x.mean(0)).eval(), ValueError, "one sample alone"),
        (lambda: Sizes(lambda x: x.sum(0)).eval(), ValueError, r"one row.*\(6,\)"),
        (lambda: Sizes(lambda x: x / 0), ValueError, "not finite"),
        (lambda: Sizes(lambda x: (x, x)), TypeError, "return a tensor, got tuple"),
        (lambda: Sizes(lambda x: x.float()), TypeError, "must return torch.float64"),
        (lambda: Sizes(lambda x: x.detach().numpy()), TypeError, "got ndarray"),
        (lambda: Sizes(lambda x: x.detach() ** 2), ValueError, "Sizes has no derivative"),
        (lambda: Sizes(lambda x: torch.sign(x)), ValueError, "or a step"),
        (lambda: nn.Linear(7, 6), ValueError, r"take real inputs of shape \(6\): Run"),
        (lambda: nn.Embedding(7, 6), ValueError, "Embedding does not take real inputs"),
        (lambda: torch.tanh, TypeError, "torch.nn.Module, got builtin"),
    ],
)
def test_modules_that_are_no_feature_map_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        ModuleFeatures(make(), 6, dtype=torch.float64)


def test_a_module_of_one_number_a_row_has_one_feature():
    model = ModuleFeatures(Sizes(lambda x: x.square().sum(1)), 6, dtype=torch.float64)
    X = points(5, 6, seed=1)
    assert model.p == 1
    torch.testing.assert_close(model.features(X), X.square().sum(1)[:, None])
    torch.testing.assert_close(model.vjp(X, torch.ones(5, 1, dtype=X.dtype)), 2 * X)


def test_input_shapes_are_whole_numbers_of_any_library():
    for shape in (np.int64(6), [np.int32(6)], torch.Size([6])):
        assert ModuleFeatures(nn.Linear(6, 3), shape).input_shape == (6,)
    for shape, got in ((6.0, "6.0"), (None, "None"), ((6, True), "True")):
        with pytest.raises(TypeError, match=f"input_shape must be a whole number, got {got}"):
            ModuleFeatures(nn.Linear(6, 3), shape)


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad])
def test_recurrent_layers_go_back_whether_gradients_are_on_or_not(outer):
    """OneDNN's LSTM keeps nothing for the way back where they are off."""

    class Last(nn.LSTM):
        def forward(self, x):
            return super().forward(x)[0][:, -1]

    make = lambda: Last(4, 40, batch_first=True)  # noqa: E731
    model = ModuleFeatures(seeded(make, torch.float32), (3, 4))
    X = points(2, 12, dtype=torch.float32)
    theta = model.features(X).sum(0, keepdim=True)
    with outer():
        assert float(projection_loss(model, theta, X)) < 1e-10


def test_layers_without_a_second_derivative_are_replaced_by_the_same_functions():
    gate = nn.Hardsigmoid()
    module = nn.Sequential(nn.Sequential(nn.Linear(6, 9), gate), nn.Linear(9, 7), gate)
    module = module.double().eval()
    model, X = ModuleFeatures(module, 6), points(4, 6)
    torch.testing.assert_close(model.features(X), module(X))
    assert module[0][1] is module[2] is gate  # those of the user stay
    alone = ModuleFeatures(gate.eval(), 6, dtype=torch.float64)
    x = torch.tensor([[-4.0, -3.5, -1, 0, 2, 5]], dtype=torch.float64)
    torch.testing.assert_close(alone.features(x), nn.functional.hardsigmoid(x))
    slopes = Tangents(alone.forward, x).vjp(torch.ones_like(x))
    expected = torch.tensor([[0, 0, 1, 1, 1, 0]], dtype=torch.float64) / 6
    torch.testing.assert_close(slopes, expected)


def test_wrong_options_are_refused():
    module = nn.Linear(6, 3)
    for options, message in (
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"probes": 0}, "probes must be at least 1"),
        ({"memory": 0}, "memory must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ModuleFeatures(module, 6, **options)
    with pytest.raises(TypeError, match="seed must be a whole number, got 1.7"):
        ModuleFeatures(module, 6, seed=1.7)


def test_attention_settings_of_torch_are_put_back():
    before = torch.backends.mha.get_fastpath_enabled()
    model_of("attention").features(points(2, 20))
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_given_features_are_random_features_with_those_weights():
    rf = RandomFeatures(8, 2100, seed=1, dtype=torch.float64, block_rows=1024)
    given = GivenFeatures(rf.V, "relu", block_rows=1000)
    X, S = points(4, 8), points(4, 8, seed=1)
    assert [block.start for block in given.blocks()] == [0, 1000, 2000]
    torch.testing.assert_close(given.features(X), rf.features(X))
    W = torch.randn(4, 2100, dtype=X.dtype)
    torch.testing.assert_close(given.vjp(X, W), rf.vjp(X, W))
    torch.testing.assert_close(given.jvp(X, S), rf.jvp(X, S))
    assert given.linear_coefficient == rf.linear_coefficient == pytest.approx(0.5)
    theta = fit_min_norm(rf, X, torch.ones(4))
    assert float(projection_loss(given, theta, S)) == pytest.approx(
        float(projection_loss(rf, theta, S)), rel=1e-12
    )
    assert {V.dtype for _, V in given.weight_blocks(dtype=torch.bfloat16)} == {torch.bfloat16}
    given.release(torch.bfloat16)
    given.release(torch.float64)
    assert torch.equal(given.V, rf.V)


def test_given_features_come_in_tiles_that_fit_the_cache(monkeypatch):
    monkeypatch.setattr(matrix_units, "available", lambda: False)
    V = torch.randn(700, 30_000)
    tiles = list(GivenFeatures(V).weight_blocks())
    assert [start for start, _ in tiles] == [0, 256, 512]
    assert torch.equal(torch.cat([rows for _, rows in tiles]), V)
    lower = GivenFeatures(V, block_rows=100).weight_blocks()
    assert [len(rows) for _, rows in lower] == 7 * [100]


def test_given_features_are_multiplied_as_they_are_stored():
    model = GivenFeatures(torch.randn(70, 30))
    (block,) = model.blocks(dtype=torch.float16)
    ((_, V),) = model.weight_blocks(dtype=torch.float16)
    assert block.stored.dtype == torch.float16 and V.dtype == torch.float32
    assert torch.equal(V, model.V.half().float()) and torch.equal(block.weights, V)
    torch.testing.assert_close(block.project(torch.ones(1, 30)), V.sum(1)[None])


def test_given_weights_of_any_length_have_exact_slope_gram():
    V = torch.randn(30, 5, dtype=torch.float64) * torch.linspace(0.1, 4, 30)[:, None]
    X = points(3, 5)
    (block,) = GivenFeatures(V, "gelu").blocks()
    state = block.linearize(X)[1]
    J = state[:, :, None] * V
    exact = torch.einsum("ikd,jkd->ij", J, J) / 5
    torch.testing.assert_close(block.slope_gram(state), exact)


def test_samples_come_back_from_given_weights_that_are_correlated():
    mix = torch.eye(10, dtype=torch.float64) + 0.1
    rf = RandomFeatures(10, 400, seed=2, dtype=torch.float64)
    model = GivenFeatures(rf.V @ mix, "relu+tanh")
    X = points(3, 10)
    theta = fit_min_norm(model, X, torch.tensor([1.0, -1.0, 0.7]))
    found = reconstruct(model, theta, 3, progress=False)
    assert found.explained
    assert float(torch.cdist(X, found.samples).min(1).values.max()) < 1e-6


def test_wrong_weights_are_refused():
    V = torch.ones(4, 3)
    with pytest.raises(TypeError, match="torch tensor, got list"):
        GivenFeatures([[1.0]])
    with pytest.raises(TypeError, match="float32 or torch.float64"):
        GivenFeatures(V.int())
    with pytest.raises(ValueError, match=r"\(p, d\), got \(4,\)"):
        GivenFeatures(V[:, 0])
    with pytest.raises(ValueError, match="finite"):
        GivenFeatures(V / 0)
    with pytest.raises(ValueError, match=r"\(n, 3\), got \(2, 4\)"):
        GivenFeatures(V).features(to_sphere(torch.ones(2, 4)))
