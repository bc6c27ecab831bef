"""A check of what a cell computes on, made where the sweep is driven."""

from __future__ import annotations

import torch


def check_device_name(device: str) -> None:
    """Refuses a device that PyTorch does not know.

    Whether it is there is for the worker that runs the cell to find out: the driver may be another
    machine, without the GPUs of the workers.

    Raises:
        ValueError: for another name.
    """
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be one that PyTorch knows, got {device!r}") from error
