"""Settings of all tests."""

import pytest
import torch

# Small problems: threads cost more than they gain, and pytest-xdist runs a process for each core.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    """Tests that draw from torch's global stream draw the same in every order and every run."""
    torch.manual_seed(0)
