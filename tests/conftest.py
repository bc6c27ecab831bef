"""Settings of all tests."""

import shlex

import pytest
import stand_in
import torch

import paperlib
from paperlib import compiled, few_rows, gaussian_draws, matrix_units

# Small problems: threads cost more than they gain, and pytest-xdist runs a process for each core.
torch.set_num_threads(1)

stand_in.register()


@pytest.fixture(autouse=True)
def _one_thread():
    """A test that asks for more threads leaves none to the next."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    """Tests that draw from torch's global stream draw the same in every order and every run."""
    torch.manual_seed(0)


@pytest.fixture
def faint_pair():
    """Seed -> model, X, theta; two of eight samples with 4% of the weight, or as asked for.

    What they leave in the loss is as small as the rounding of bfloat16.
    """

    def problem(seed, weights=(0.02, -0.02)):
        model = paperlib.RandomFeatures(60, 6 * 60 * 8, seed=seed)
        X = paperlib.sphere(8, 60, seed).X
        alpha = torch.tensor([[0.44, -0.58, 0.3, 0.6, 0.5, -0.4, *weights]])
        return model, X, alpha @ model.features(X)

    return problem


@pytest.fixture
def compile_with(monkeypatch):
    """flags -> None: the kernels are compiled with these flags besides until the test ends."""
    cached = compiled.library, few_rows.available, gaussian_draws.available, matrix_units.available

    def use(flags):
        if flags:
            monkeypatch.setenv("CXX", f"{shlex.join(compiled._compiler())} {flags}")
        for function in cached:
            function.cache_clear()

    yield use
    for function in cached:
        function.cache_clear()
