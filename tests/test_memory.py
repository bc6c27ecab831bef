"""Memory: predicted before the start, refused when it cannot fit."""

import pytest
import torch

import paperlib
from paperlib import memory


def test_a_reconstruction_that_cannot_fit_is_refused_before_v_is_drawn(monkeypatch):
    model = paperlib.RandomFeatures(50, 4000, placement="resident")
    theta = torch.ones(1, 4000)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100_000)
    with pytest.raises(MemoryError, match=r"needs .* 100 kB are free .* placement='streamed'"):
        paperlib.reconstruct(model, theta, 3)
    assert not model.holds(torch.float32)


def test_the_prediction_counts_every_resident_copy_of_the_weights():
    model = paperlib.RandomFeatures(50, 4000, placement="resident")
    parts = memory.predicted_bytes(model, 10, 1, torch.bfloat16)
    assert parts["weights"] == 50 * 4000 * (4 + 2)
    list(model.weight_blocks())
    assert memory.predicted_bytes(model, 10, 1, torch.bfloat16)["weights"] == 50 * 4000 * 2
    streamed = paperlib.RandomFeatures(50, 4000, placement="streamed")
    assert memory.predicted_bytes(streamed, 10, 1, torch.bfloat16)["weights"] == 0


def test_auto_streams_what_does_not_fit(monkeypatch):
    monkeypatch.setattr("paperlib.random_features.free_bytes", lambda device: 1_000_000)
    model = paperlib.RandomFeatures(50, 4000)
    assert not model.keeps(torch.float32)  # 800 kB of 1 MB: more than its share
    assert model.keeps(torch.bfloat16)  # 400 kB


@pytest.mark.parametrize(
    ("size", "words"), [(12, "12 bytes"), (3.2e9, "3.2 GB"), (4.5e11, "450 GB")]
)
def test_sizes_in_words(size, words):
    assert memory.readable(size) == words
