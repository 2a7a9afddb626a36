"""Liger's norms, rotary embedding, activation and head live in one model with this package's adapters."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from liger_kernel.transformers import LigerRMSNorm, LigerSwiGLUMLP, apply_liger_kernel_to_llama
from liger_kernel.transformers.model.llama import lce_forward
from peft import LoraConfig, get_peft_model
from transformers.models.llama import modeling_llama

from aletheia_kernels.triton import interpreted
from aletheia_tune.head import labelled_head
from aletheia_tune.norms import kernel_norms
from aletheia_tune.patch import apply_kernels, restore


@triton.jit
def _rsqrt(x):
    return tl.rsqrt(x)


@pytest.fixture(autouse=True)
def liger_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's kernels under the interpreter, and the modeling file as it was afterwards.

    The interpreter hands a kernel Python's floats where a card gives it float32 scalars, and has no libdevice.
    """
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    if not interpreted():
        return
    import numpy
    from liger_kernel.ops import rms_norm
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def with_floats(argument):
        if not isinstance(argument, float):
            return convert(argument)
        data = numpy.array([argument], dtype=numpy.float32)
        return tl.tensor(interpreter.TensorHandle(data, tl.float32), tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", with_floats)
    monkeypatch.setattr(rms_norm, "rsqrt", _rsqrt)


@pytest.fixture
def model(model):
    """The lane's model, with adapters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(model, config)


def step(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch."""
    ids = torch.randint(1, 50, (1, 7), generator=torch.Generator().manual_seed(1))
    ids = ids.to(next(model.parameters()).device)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return loss.detach(), gradients


def assert_same(given, expected) -> None:
    torch.testing.assert_close(given[0], expected[0], rtol=1e-5, atol=0)
    assert given[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(given[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def ligers(model) -> dict[str, bool]:
    """Which of its replacements are in place."""
    bare = model.get_base_model()
    layers = bare.model.layers
    norms = [
        bare.model.norm,
        *(n for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)),
    ]
    return {
        "norms": all(n.forward.__func__ is LigerRMSNorm.forward for n in norms),
        "mlps": all(
            getattr(layer.mlp.forward, "__func__", None) is LigerSwiGLUMLP.forward for layer in layers
        ),
        "head": bare.forward.__func__ is lce_forward,
        "rotary": "liger" in modeling_llama.apply_rotary_pos_emb.__module__,
    }


@pytest.mark.parametrize("liger_first", [True, False], ids=["liger first", "liger second"])
def test_both_patches_live_together(model, liger_first):
    expected = step(model)
    if not liger_first:
        assert len(apply_kernels(model).fast) == 14
    apply_liger_kernel_to_llama(model=model.get_base_model())
    if liger_first:
        report = apply_kernels(model)
        assert len(report.fast) == len(report.entries) == 14
    assert ligers(model) == dict.fromkeys(("norms", "mlps", "head", "rotary"), True)
    assert_same(step(model), expected)

    # What train() puts in place besides keeps its hands off what Liger has, and says so.
    with kernel_norms(model) as norms, labelled_head(model) as head:
        assert norms.norms == 0
        assert "5 × LlamaRMSNorm: its forward is already replaced" in norms.reasons
        assert not head.active
        assert head.reason == "it does not use its settable loss function"
        assert_same(step(model), expected)
    assert ligers(model) == dict.fromkeys(("norms", "mlps", "head", "rotary"), True)

    assert restore(model) >= 14
    assert ligers(model) == dict.fromkeys(("norms", "mlps", "head", "rotary"), True)
    assert_same(step(model), expected)
