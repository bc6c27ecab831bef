"""Settings of all tests."""

import torch

# Small problems: threads cost more than they gain, and pytest-xdist runs a process for each core.
torch.set_num_threads(1)
