"""What a device multiplies fast, from what the processor says it has."""

import pytest
import torch

from paperlib.instructions import (
    bfloat16_units,
    fast_bfloat16,
    fast_int8,
    fast_kernels,
    vector_instructions,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUESTIONS = fast_bfloat16, bfloat16_units, fast_int8, fast_kernels, vector_instructions


@pytest.mark.parametrize(
    ("has", "answers"),
    [
        ([], (False, False, False, False, False)),
        (["avx2"], (False, False, False, False, False)),
        (["avx2", "fma3"], (False, False, False, False, True)),
        (["avx_vnni"], (False, False, True, False, False)),
        (["avx512_f"], (False, False, False, True, True)),
        (["avx512_f", "avx512_vnni", "avx512_bf16"], (True, False, True, True, True)),
        (["avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16"], (True, True, True, True, True)),
    ],
)
def test_a_processor_answers_by_its_instructions(monkeypatch, has, answers):
    listed = dict.fromkeys(["avx2", "avx_vnni", "avx512_f", "avx512_bf16", "amx_bf16"], False)
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: listed | dict.fromkeys(has, True), raising=False
    )
    assert tuple(ask(CPU) for ask in QUESTIONS) == answers


def test_what_a_processor_has_says_nothing_of_a_gpu():
    assert bfloat16_units(CUDA) and not fast_int8(CUDA) and not fast_kernels(CUDA)


def test_an_old_torch_that_cannot_tell_is_taken_for_a_slow_processor(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not any(ask(CPU) for ask in QUESTIONS)
