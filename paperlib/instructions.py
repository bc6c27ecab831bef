"""What a device multiplies fast."""

from __future__ import annotations

import torch


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _processor_has(device, "avx512_bf16", "amx_bf16")


def bfloat16_units(device: torch.device) -> bool:
    """Whether hardware for bfloat16 is one for matrices, many times as fast as float32 is."""
    return device.type == "cuda" or _processor_has(device, "amx_bf16")


def matrix_units(device: torch.device) -> bool:
    """Whether the device is a CPU with units for matrices of bfloat16 and of 8 bits."""
    return _processor_has(device, "amx_bf16") and _processor_has(device, "amx_int8")


def fast_int8(device: torch.device) -> bool:
    """Whether the device is a CPU that multiplies whole numbers of 8 bits in hardware."""
    return _processor_has(device, "avx512_vnni", "avx_vnni")


def fast_kernels(device: torch.device) -> bool:
    """Whether the device is a CPU for which oneDNN makes kernels that are faster than MKL's."""
    return _processor_has(device, "avx512_f")


def vector_instructions(device: torch.device) -> bool:
    """Whether the device is a CPU that our own kernels are written for."""
    return _processor_has(device, "avx512_f") or (
        _processor_has(device, "avx2") and _processor_has(device, "fma3")
    )


def _processor_has(device: torch.device, *names: str) -> bool:
    """Whether the device is a CPU with one of these sets of instructions."""
    if device.type != "cpu":
        return False
    # Absent before torch 2.10 or so: then the safe answer is no.
    features = getattr(torch.cpu, "get_capabilities", dict)()
    return any(features.get(name) for name in names)
