"""A patched model computes what PEFT computes, takes the path its report says, and can be put back."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import aletheia_kernels
from aletheia_kernels.dtypes import has_vendor_products
from aletheia_tune.dora import magnitude_over_norm
from aletheia_tune.errors import UserError
from aletheia_tune.patch import apply_kernels, restore

VOCABULARY = 64


def llama(**extra) -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, **extra,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def neox() -> nn.Module:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


def adapted(
    build: Callable[[], nn.Module] = llama, dtype: torch.dtype = torch.float32, **options
) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | options
    return get_peft_model(build().to(dtype), LoraConfig(**settings))


def ids(seed: int = 1, rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def loss_and_grads(model: nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many projections each call of the operator computed, in order."""
    seen: list[int] = []

    def count(name: str) -> None:
        original = getattr(aletheia_kernels, name)

        def counting(x, weights, *args, **kwargs):
            seen.append(len(weights))
            return original(x, weights, *args, **kwargs)

        monkeypatch.setattr(aletheia_kernels, name, counting)

    count("lora_group")
    count("lora_gated_mlp")
    return seen


@pytest.mark.parametrize("build", [llama, gpt2, neox])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank_pattern": {"gate_proj": 7, "q_proj": 9, "c_attn": 5}},
        {"use_rslora": True},
        {"bias": "all"},
    ],
    ids=["plain", "unequal ranks", "rslora", "trained bias"],
)
def test_same_loss_and_gradients(build, options, calls):
    model = adapted(build, **options)
    expected_loss, expected = loss_and_grads(model, ids())
    report = apply_kernels(model, strict=True)
    calls.clear()
    loss, given = loss_and_grads(model, ids())
    assert sum(calls) == len(report.entries) == len(report.fast)
    torch.testing.assert_close(loss, expected_loss)
    assert given.keys() == expected.keys()
    for name, grad in given.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_siblings_are_found_and_computed_in_one_call(calls):
    model = adapted()
    report = apply_kernels(model)
    siblings = {tuple(name.rpartition(".")[2] for name in entry.siblings) for entry in report.entries}
    assert siblings == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj"), ()}
    calls.clear()
    model(input_ids=ids())
    assert calls == [3, 1, 3] * 2
    assert str(report).splitlines() == [
        "14 of 14 adapted modules run on the kernels, in 6 calls a forward pass"
    ]


def test_restore_is_bit_identical(calls):
    model = adapted()
    tokens = ids()
    before = model(input_ids=tokens).logits
    assert not calls
    apply_kernels(model)
    model(input_ids=tokens)
    assert calls
    calls.clear()
    assert restore(model) == 16
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert not calls
    assert restore(model) == 0


def trajectory(dtype: torch.dtype, patched: bool, steps: int = 20) -> torch.Tensor:
    """Losses [steps, tokens] along AdamW steps from one set of bf16-representable weights and PEFT's own start."""
    model = adapted(rank_pattern={"gate_proj": 7}, init_lora_weights=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    model = model.to(dtype)
    adapters = [p for p in model.parameters() if p.requires_grad]
    if dtype == torch.bfloat16:
        for parameter in adapters:
            parameter.data = parameter.data.float()
    if patched:
        apply_kernels(model, strict=True)
    optimizer = torch.optim.AdamW(adapters, lr=2e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        tokens = ids(rows=4, length=33)
        logits = model(input_ids=tokens).logits[:, :-1]
        wide = logits if dtype == torch.float64 else logits.float()
        loss = cross_entropy(wide.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.detach().double())
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_twenty_steps_with_and_without_the_patch(dtype):
    """The 2× rule at every step of a training: RMS error of the 128 tokens' losses against float64's."""
    exact = trajectory(torch.float64, patched=False)
    plain, ours = ((trajectory(dtype, patched) - exact).square().mean(1).sqrt() for patched in (False, True))
    assert (exact[-1].mean() - exact[0].mean()).abs() > 1e-3  # it trains
    assert (ours <= 2 * plain + 1e-5).all(), (ours, plain)


def test_saves_and_loads_as_peft_would(tmp_path):
    model = adapted(rank_pattern={"gate_proj": 7})
    model.save_pretrained(tmp_path / "before")
    apply_kernels(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    tokens = ids()
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "after")
    torch.testing.assert_close(loaded(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)


def test_disable_merge_and_unload_still_work(calls):
    model = adapted().eval()
    tokens = ids()
    with model.disable_adapter():
        base = model(input_ids=tokens).logits
    expected = model(input_ids=tokens).logits
    apply_kernels(model)
    calls.clear()
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens).logits, base)
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert calls == []
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert calls != []
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_several_adapters(calls):
    model = adapted().eval()
    torch.manual_seed(3)
    model.add_adapter(
        "other", LoraConfig(r=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    tokens = ids()
    expected = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        expected[name] = model(input_ids=tokens).logits
    model.base_model.set_adapter(["default", "other"])
    both = model(input_ids=tokens).logits
    report = apply_kernels(model)
    assert {e.reason for e in report.entries if e.path == "peft"} == {"2 adapters are active on it"}
    assert torch.equal(model(input_ids=tokens).logits.argmax(-1), both.argmax(-1))
    for name in ("default", "other"):
        model.set_adapter(name)
        calls.clear()
        torch.testing.assert_close(model(input_ids=tokens).logits, expected[name], rtol=1e-4, atol=1e-5)
        assert calls


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = adapted(lora_dropout=0.2)
    apply_kernels(model)
    model.train()
    torch.manual_seed(5)
    expected_loss, expected = loss_and_grads(model, ids())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    loss, given = loss_and_grads(model, ids())
    assert torch.equal(loss, expected_loss)
    for name, grad in given.items():
        torch.testing.assert_close(grad, expected[name], msg=name)


def test_autocast(calls):
    model = adapted(dtype=torch.bfloat16)
    tokens = ids()
    apply_kernels(model, strict=True)
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast, _ = loss_and_grads(model, tokens)
    head = 0 if has_vendor_products(torch.bfloat16) else 1
    assert sum(calls) == 14 + head
    restore(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        slow, _ = loss_and_grads(model, tokens)
    torch.testing.assert_close(fast, slow, rtol=2e-2, atol=2e-2)
    wide = adapted()
    apply_kernels(wide)
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide(input_ids=tokens)
    assert calls == []  # fp32 weights under bf16 autocast are PEFT's to cast


def test_compiles_as_one_graph():
    model = adapted(rank_pattern={"gate_proj": 7})
    tokens = ids()
    expected_loss, expected = loss_and_grads(model, tokens)
    apply_kernels(model)
    loss, given = loss_and_grads(torch.compile(model, fullgraph=True, backend="aot_eager"), tokens)
    torch.testing.assert_close(loss, expected_loss)
    for name, grad in expected.items():
        torch.testing.assert_close(given[f"_orig_mod.{name}"], grad, rtol=1e-4, atol=1e-5)


def test_dropout_stays_on_the_operator_and_keeps_the_mean(calls):
    model = adapted(lora_dropout=0.3)
    tokens = ids()
    report = apply_kernels(model, strict=True)
    assert len(report.fast) == 14
    module = model.base_model.model.model.layers[0].mlp.down_proj
    x = torch.randn(8, 48)
    model.eval()
    exact = module(x)
    model.train()
    torch.manual_seed(0)
    draws = torch.stack([module(x) for _ in range(3000)])
    spread = draws.std(0) / 3000**0.5
    assert ((draws.mean(0) - exact).abs() <= 6 * spread + 1e-5).all()
    calls.clear()
    model(input_ids=tokens)
    assert sum(calls) == 14


def test_a_tensor_changed_in_place_between_siblings_is_computed_afresh():
    model = adapted()
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        expected_q = attention.q_proj(x)
        expected_k = attention.k_proj(x * 2)
        apply_kernels(model)
        torch.testing.assert_close(attention.q_proj(x), expected_q)
        x.mul_(2)
        torch.testing.assert_close(attention.k_proj(x), expected_k)


def test_an_output_made_without_gradients_is_not_handed_to_a_call_that_needs_them():
    model = adapted()
    attention = model.base_model.model.model.layers[0].self_attn
    apply_kernels(model)
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        attention.q_proj(x)
    assert attention.k_proj(x).requires_grad


def test_what_the_operator_does_not_compute_stays_on_pefts_path_and_says_why():
    # A model without gated MLPs, which would be on the operator with or without adapters.
    model = adapted(neox, use_dora=True, lora_dropout=0.1, target_modules=["query_key_value"]).eval()
    expected = model(input_ids=ids()).logits
    report = apply_kernels(model)
    assert [entry.path for entry in report.entries] == ["peft", "peft"]
    assert "DoRA with dropout" in str(report)
    assert torch.equal(model(input_ids=ids()).logits, expected)
    with pytest.raises(UserError, match=r"strict=True.*2 adapted modules.*DoRA"):
        apply_kernels(model, strict=True)


@pytest.mark.parametrize("build", [llama, neox])
@pytest.mark.parametrize("options", [{}, {"bias": "all"}, {"rank_pattern": {"q_proj": 9}}])
def test_dora_from_its_factors(build, options, calls):
    model = adapted(build, use_dora=True, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # as it starts, m is the norm, and nothing would be rescaled
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
    expected_loss, expected = loss_and_grads(model, ids())
    report = apply_kernels(model, strict=True)
    calls.clear()
    loss, given = loss_and_grads(model, ids())
    assert sum(calls) == len(report.entries)
    assert any("magnitude" in name for name in given)
    torch.testing.assert_close(loss, expected_loss)
    assert given.keys() == expected.keys()
    for name, grad in given.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)

    # The norms follow the factors, and the weight where it is merged into.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "q_proj.base_layer.weight" in name or "query_key_value.base_layer" in name:
                parameter.mul_(1.5)
    changed = model(input_ids=ids()).logits
    restore(model)
    torch.testing.assert_close(changed, model(input_ids=ids()).logits, rtol=1e-4, atol=1e-4)


def test_a_magnitude_near_the_norm_is_not_rounded_to_bfloat16():
    model = adapted(use_dora=True).to(torch.bfloat16)
    apply_kernels(model, strict=True)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    magnitude = layer.lora_magnitude_vector["default"].weight
    magnitude.data = magnitude.float()
    x = torch.randn(512, layer.in_features, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        magnitude.div_(magnitude_over_norm(layer, "default"))
        before = layer(x).double().norm(dim=0)
        magnitude.mul_(1.02)  # of which bfloat16 makes 1.0234
        grown = layer(x).double().norm(dim=0) / before
    torch.testing.assert_close(grown, torch.full_like(grown, 1.02), rtol=0, atol=1e-3)


def test_a_weight_put_in_anothers_place_has_its_own_norm():
    model = adapted(use_dora=True)
    apply_kernels(model, strict=True)
    model(input_ids=ids())
    weight = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight
    weight.data = 2 * weight
    changed = model(input_ids=ids()).logits
    restore(model)
    torch.testing.assert_close(changed, model(input_ids=ids()).logits, rtol=1e-4, atol=1e-4)


def test_dora_keeps_siblings_in_one_call(calls):
    model = adapted(use_dora=True)
    report = apply_kernels(model, strict=True)
    siblings = {tuple(name.rpartition(".")[2] for name in entry.siblings) for entry in report.entries}
    assert siblings == {("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ()}
    calls.clear()
    model(input_ids=ids())
    assert calls == [3, 1, 2, 1] * 2


def test_dora_on_a_conv1d_stays_on_pefts_path():
    report = apply_kernels(adapted(gpt2, use_dora=True, fan_in_fan_out=True))
    assert not report.fast
    assert "DoRA on a Conv1D" in str(report)


class OwnLinear(nn.Linear):
    """A model's own class that computes what its parent does, in another way."""

    def forward(self, input):
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Scaled(nn.Linear):
    def forward(self, input):
        return 0.5 * super().forward(input)


@pytest.mark.parametrize(("kind", "path"), [(OwnLinear, "kernel"), (Scaled, "peft")])
def test_a_linear_of_a_models_own_class_is_tried(kind, path):
    model = adapted(target_modules=["q_proj"])
    projection = model.base_model.model.model.layers[0].self_attn.q_proj
    projection.base_layer.__class__ = kind
    expected = model(input_ids=ids()).logits
    report = apply_kernels(model)
    assert report.entries[0].path == path
    if path == "peft":
        assert report.entries[0].reason == f"its base layer is a {kind.__name__}"
    torch.testing.assert_close(model(input_ids=ids()).logits, expected, rtol=1e-5, atol=1e-5)


def test_an_embedding_adapter_is_reported():
    model = adapted(target_modules=["q_proj", "embed_tokens"])
    report = apply_kernels(model)
    assert [(e.module.rpartition(".")[2], e.path) for e in report.entries] == [
        ("embed_tokens", "peft"), ("q_proj", "kernel"), ("q_proj", "kernel")]  # fmt: skip
    assert "lora.layer.Embedding has no operator" in str(report)


def test_a_hook_on_the_base_layer_still_fires():
    model = adapted()
    apply_kernels(model)
    fired = []
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(
        lambda *_: fired.append(True)
    )
    model(input_ids=ids())
    assert fired == [True]


def test_patching_leaves_modes_and_random_state(calls):
    model = adapted(lora_dropout=0.1).train()
    model.base_model.model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    apply_kernels(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


def test_a_deep_copy_is_patched_on_its_own():
    model = adapted().eval()
    apply_kernels(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    tokens = ids()
    with twin.disable_adapter():
        base = twin(input_ids=tokens).logits
    torch.testing.assert_close(twin(input_ids=tokens).logits, base)
    assert not torch.allclose(model(input_ids=tokens).logits, base)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(UserError, match=r"no LoRA layer; wrap it with peft.get_peft_model first"):
        apply_kernels(llama())


def test_inference_mode_and_generation():
    model = adapted().eval()
    tokens = ids(rows=1)
    with torch.inference_mode():
        expected = model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False)
        apply_kernels(model)
        assert torch.equal(model.generate(input_ids=tokens, max_new_tokens=5, do_sample=False), expected)
