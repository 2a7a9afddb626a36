"""Which backend serves tensors on a card, said in words, on a machine that has none."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from aletheia_kernels import backends, triton
from aletheia_kernels.triton import first_use


@pytest.fixture(autouse=True)
def nothing_is_forced(triton_is_forced, monkeypatch):
    monkeypatch.delenv("ALETHEIA_BACKEND")


@pytest.mark.parametrize("dtype", triton.DTYPES)
@pytest.mark.parametrize("operator", backends.OPERATORS)
def test_triton_serves_what_it_has_and_the_reference_the_rest(operator, dtype):
    choice = backends.choose(operator, "cuda", dtype)
    if operator in triton.SERVED:
        assert choice == backends.Choice("triton", "compiled operators for cuda tensors")
    else:
        assert choice.backend == "reference"
        assert (
            choice.reason == f"triton: there is no {operator} in Triton; cpu: it serves CPU tensors, not cuda"
        )


@pytest.mark.parametrize(
    ("operator", "device", "dtype", "reason"),
    [
        ("lora_group", "cuda", torch.float64, "it has no torch.float64"),
        ("rms_norm", "cuda", torch.bfloat16, "there is no rms_norm in Triton"),
        ("lora_group", "xpu", torch.bfloat16, "it serves CUDA and HIP tensors, not xpu"),
    ],
)
def test_a_forced_backend_that_cannot_serve_says_why(operator, device, dtype, reason, monkeypatch):
    monkeypatch.setenv("ALETHEIA_BACKEND", "triton")
    with pytest.raises(backends.BackendError) as error:
        backends.choose(operator, device, dtype)
    assert str(error.value) == f"ALETHEIA_BACKEND=triton cannot serve {operator}: {reason}"


def test_tensors_on_the_processor_are_served_under_the_interpreter_alone(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    choice = backends.choose("lora_group", "cpu", torch.float16)
    assert choice.backend != "triton"
    monkeypatch.setenv("ALETHEIA_BACKEND", "triton")
    with pytest.raises(backends.BackendError, match="CPU tensors only under TRITON_INTERPRET=1"):
        backends.choose("lora_group", "cpu", torch.float32)


def test_without_triton_the_reference_serves(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    triton.unavailable_reason.cache_clear()
    try:
        choice = backends.choose("lora_group", "cuda", torch.bfloat16)
        assert choice.backend == "reference"
        assert "triton: triton is not installed" in choice.reason
    finally:
        triton.unavailable_reason.cache_clear()


def test_where_the_self_test_failed_the_reference_serves_and_a_wish_is_unmet(monkeypatch):
    monkeypatch.setattr(first_use, "_is_card", lambda device: True)
    finding = "its self-test failed on Card 9000 (a relative error of 1.0e+00 where 2e-02 is allowed)"
    monkeypatch.setattr(first_use, "_refusals", {("lora_group", 1, torch.bfloat16): finding})
    choice = backends.choose("lora_group", "cuda:1", torch.bfloat16)
    assert choice == backends.Choice("reference", f"triton: {finding}; cpu: it serves CPU tensors, not cuda")
    monkeypatch.setenv("ALETHEIA_BACKEND", "triton")
    with pytest.raises(backends.BackendError, match="self-test failed on Card 9000"):
        backends.choose("lora_group", "cuda:1", torch.bfloat16)
