"""Gated MLPs run on one operator wherever they are what they look like, and on their own code everywhere else."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, SeedOssConfig

import aletheia_kernels
from aletheia_tune.gated_mlp import activation_of, apply_gated_mlps
from aletheia_tune.patch import apply_kernels, restore


def build(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **options,
    )
    return AutoModelForCausalLM.from_config(config)


def adapted(**options):
    settings = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | options
    return get_peft_model(build(), LoraConfig(**settings))


def loss_of(model):
    tokens = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    return model(input_ids=tokens, labels=tokens).loss


@pytest.fixture
def ranks(monkeypatch) -> list[list[int]]:
    """The ranks of gate, up and down in each call of the operator."""
    seen: list[list[int]] = []
    original = aletheia_kernels.lora_gated_mlp

    def counting(x, weights, biases, lora_As, *rest, **options):
        seen.append([lora_A.shape[0] for lora_A in lora_As])
        return original(x, weights, biases, lora_As, *rest, **options)

    monkeypatch.setattr(aletheia_kernels, "lora_gated_mlp", counting)
    return seen


@pytest.mark.parametrize(
    ("act", "known"), [("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", None), ("relu", None)]
)
def test_the_activation_is_known_by_what_it_computes(act, known):
    model = build(hidden_act=act)
    assert activation_of(model.model.layers[0].mlp) == known
    assert activation_of(model.model.layers[0].self_attn) is None


def test_modules_without_an_adapter_have_rank_zero(ranks):
    model = adapted(
        target_modules=["up_proj", "down_proj"], layers_to_transform=[1], rank_pattern={"up_proj": 7}
    )
    before = loss_of(model)
    report = apply_kernels(model, strict=True)
    ranks.clear()
    after = loss_of(model)
    after.backward()
    assert ranks == [[0, 0, 0], [0, 7, 4]]
    torch.testing.assert_close(after, before)
    assert "1 gated MLPs without adapters run on the operator as well" in str(report)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_model_without_adapters(ranks):
    model = build().requires_grad_(False)
    before = loss_of(model)
    assert apply_gated_mlps(model) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    ranks.clear()
    torch.testing.assert_close(loss_of(model), before)
    assert ranks == [[0, 0, 0]] * 2
    assert restore(model) == 2
    assert torch.equal(loss_of(model), before)


def test_a_models_own_dropout_stays():
    torch.manual_seed(0)
    config = SeedOssConfig(
        vocab_size=97, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, residual_dropout=0.3, attention_dropout=0.0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    assert apply_gated_mlps(model) == []
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("what", ["replaced", "hooked"])
def test_an_activation_that_changes_after_the_patch_is_the_models_own(ranks, what):
    model = build().requires_grad_(False)
    apply_gated_mlps(model)
    mlp = model.model.layers[0].mlp
    seen = []
    if what == "replaced":
        mlp.act_fn = torch.nn.Tanh()
    else:
        mlp.act_fn.register_forward_hook(lambda *_: seen.append(what))
    ranks.clear()
    after = loss_of(model)
    assert len(ranks) == 1
    restore(model)
    torch.testing.assert_close(after, loss_of(model))
    assert what == "replaced" or seen


def test_the_report_does_not_count_a_call_that_training_never_makes():
    report = apply_kernels(adapted(lora_dropout=0.5))
    siblings = {tuple(name.rpartition(".")[2] for name in entry.siblings) for entry in report.entries}
    assert siblings == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ()}
    assert "2 gated MLPs are one call in evaluation alone: their adapters have dropout" in str(report)


@pytest.mark.parametrize("what", ["hook", "forward", "dropout", "trained"])
def test_what_the_operator_does_not_know_runs_the_models_own_code(ranks, what):
    model = adapted(lora_dropout=0.5 if what == "dropout" else 0.0).train()
    apply_kernels(model)
    gates = [layer.mlp.gate_proj for layer in model.base_model.model.model.layers]
    calls = []
    for gate in gates:
        if what == "hook":
            gate.register_forward_hook(lambda *_: calls.append("hook"))
        elif what == "forward":
            gate.forward = lambda x, gate=gate: calls.append("forward") or gate.base_layer(x)
        elif what == "trained":
            gate.base_layer.weight.requires_grad_()
    ranks.clear()
    loss_of(model).backward()
    assert ranks == []
    assert len(calls) == (2 if what in ("hook", "forward") else 0)
    if what == "trained":
        assert all(gate.base_layer.weight.grad is not None for gate in gates)


def test_a_module_that_only_looks_like_one_is_left_alone():
    model = build()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) + mlp.up_proj(x))
    assert activation_of(mlp) is None
    assert apply_gated_mlps(model) == ["model.layers.1.mlp"]
