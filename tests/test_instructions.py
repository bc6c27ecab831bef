"""What a device multiplies fast, from what the processor says it has."""

import pytest
import torch

from paperlib.instructions import (
    bfloat16_units,
    fast_bfloat16,
    fast_int8,
    fast_kernels,
    matrix_units,
    vector_instructions,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUESTIONS = (
    fast_bfloat16,
    bfloat16_units,
    matrix_units,
    fast_int8,
    fast_kernels,
    vector_instructions,
)


@pytest.mark.parametrize(
    ("has", "answers"),
    [
        ([], ""),
        (["avx2"], ""),
        (["avx2", "fma3"], "vector_instructions"),
        (["avx_vnni"], "fast_int8"),
        (["avx512_f"], "fast_kernels vector_instructions"),
        (
            ["avx512_f", "avx512_vnni", "avx512_bf16"],
            "fast_bfloat16 fast_int8 fast_kernels vector_instructions",
        ),
        (["amx_bf16"], "fast_bfloat16 bfloat16_units"),
        (["amx_bf16", "amx_int8"], "fast_bfloat16 bfloat16_units matrix_units"),
    ],
)
def test_a_processor_answers_by_its_instructions(monkeypatch, has, answers):
    listed = dict.fromkeys(["avx2", "avx_vnni", "avx512_f", "amx_bf16", "amx_int8"], False)
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: listed | dict.fromkeys(has, True), raising=False
    )
    assert [ask.__name__ for ask in QUESTIONS if ask(CPU)] == answers.split()


def test_what_a_processor_has_says_nothing_of_a_gpu():
    assert bfloat16_units(CUDA)
    assert not any(ask(CUDA) for ask in (matrix_units, fast_int8, fast_kernels))


def test_an_old_torch_that_cannot_tell_is_taken_for_a_slow_processor(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not any(ask(CPU) for ask in QUESTIONS)
