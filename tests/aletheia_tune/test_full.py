"""Modules trained in full beside adapters: what trains, at which rate, in which dtype, and what stock PEFT loads."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
)

from aletheia_tune.data import load_examples
from aletheia_tune.errors import NonFiniteLoss
from aletheia_tune.full import float32_weights
from aletheia_tune.layers import full_modules
from aletheia_tune.patch import apply_kernels
from aletheia_tune.plan import ModulePlan, Plan, uniform_plan
from aletheia_tune.rates import parameter_groups
from aletheia_tune.train import TrainConfig, TrainResult, fine_tune, load_model
from tests.at_step import AtStep

VOCABULARY = 64
WRAPPED = "base_model.model."


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


FULL = {
    llama: ("model.layers.1.self_attn.k_proj", "model.layers.2.mlp.down_proj"),
    gpt2: ("transformer.h.1.attn.c_attn", "transformer.h.2.mlp.c_proj"),
}


def hybrid(build: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> tuple[PeftModel, Plan]:
    """Adapters that do something already on all linears but two, which are trained in full."""
    torch.manual_seed(0)
    model = build().to(dtype)
    everywhere = uniform_plan(model, rank=4, alpha=8)
    modules = {name: module for name, module in everywhere.modules.items() if name not in FULL[build]}
    plan = Plan(modules, everywhere.num_layers, everywhere.layer_path, full=FULL[build])
    peft_model = get_peft_model(model, plan.to_lora_config(model))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft_model, plan


def loss_and_grads(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def trained_weight(model: nn.Module, name: str) -> nn.Parameter:
    return full_modules(model)[WRAPPED + name].modules_to_save["default"].weight


# One step


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_gradients_are_those_of_plain_peft(build, dtype, rtol):
    model, plan = hybrid(build, dtype)
    expected_loss, expected = loss_and_grads(model)
    report = apply_kernels(model)
    with float32_weights(model):
        loss, given = loss_and_grads(model)
    torch.testing.assert_close(loss, expected_loss, rtol=rtol, atol=rtol)
    assert given.keys() == expected.keys()
    assert sum("modules_to_save" in name for name in given) == (2 if build is llama else 4)
    for name, grad in given.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grad, expected[name], rtol=rtol, atol=rtol / 10, msg=name)

    paths = {entry.module.removeprefix(WRAPPED): entry.path for entry in report.entries}
    assert paths == {**dict.fromkeys(plan.modules, "kernel"), **dict.fromkeys(plan.full, "peft")}
    assert "2 on PEFT's own path: it is trained in full" in str(report)


def test_siblings_of_a_module_trained_in_full_stay_in_one_call():
    report = apply_kernels(hybrid(llama)[0])
    siblings = {entry.module.removeprefix(WRAPPED): entry.siblings for entry in report.entries}
    last = {name: tuple(one.rpartition(".")[2] for one in group) for name, group in siblings.items()}
    assert last["model.layers.1.self_attn.q_proj"] == ("q_proj", "v_proj")
    assert last["model.layers.0.self_attn.q_proj"] == ("q_proj", "k_proj", "v_proj")
    # Without its down_proj the MLP is no call of its own; what is left of it is one.
    assert last["model.layers.2.mlp.up_proj"] == ("gate_proj", "up_proj")
    assert last["model.layers.0.mlp.up_proj"] == ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("build", [llama, gpt2])
def test_float32_weights_act_rounded_and_keep_what_rounds_away(build):
    model, plan = hybrid(build, torch.bfloat16)
    expected_loss, expected = loss_and_grads(model)
    weights = {name: trained_weight(model, name) for name in plan.full}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    with float32_weights(model):
        loss, given = loss_and_grads(model)
        assert torch.equal(loss, expected_loss)
        assert given.keys() == expected.keys()
        for name, grad in given.items():
            assert grad.dtype == torch.float32 or "modules_to_save" not in name
            assert torch.equal(grad, expected[name].to(grad.dtype)), name
        small = 1e-5
        with torch.no_grad():
            for name, weight in weights.items():
                assert weight.dtype == torch.float32
                large = before[name].abs() > 0.01
                assert torch.equal((before[name] + small)[large], before[name][large])
                for _ in range(100):
                    weight.add_(small)
        exact = {name: weight.detach().clone() for name, weight in weights.items()}
    for name, weight in weights.items():
        assert weight is trained_weight(model, name)
        assert weight.grad is None
        assert torch.equal(weight, exact[name].bfloat16())
        moved = (weight.detach().float() - before[name].float()).mean().item()
        assert moved == pytest.approx(100 * small, rel=0.05)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_float32_weights_are_put_back_after_an_error_and_leave_float32_alone():
    model, plan = hybrid(llama, torch.bfloat16)
    before = model.state_dict()
    with pytest.raises(KeyError), float32_weights(model):
        raise KeyError
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    model, plan = hybrid(llama)
    places = {name: trained_weight(model, name).data_ptr() for name in plan.full}
    with float32_weights(model):
        assert {name: trained_weight(model, name).data_ptr() for name in plan.full} == places
        assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("build", [llama, gpt2])
def test_every_trained_weight_is_in_one_group_with_the_rate_of_its_kind(build):
    model, _ = hybrid(build)
    groups = parameter_groups(model, 1e-3, lora_plus=4.0, full_rate=0.1)
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(rate_of) == sum(len(group["params"]) for group in groups)
    assert groups[0]["lr"] == 1e-3
    for name, parameter in model.named_parameters():
        kind = next((kind for kind in ("lora_A", "lora_B", "modules_to_save") if kind in name), None)
        assert rate_of.get(id(parameter)) == pytest.approx(
            {"lora_A": 1e-3, "lora_B": 4e-3, "modules_to_save": 1e-4, None: None}[kind]
        ), name


# A training run

CONFIG = TrainConfig(
    steps=5, batch_size=4, learning_rate=1e-2, warmup=0, dtype="float32", progress=False, schedule="constant"
)
PLAN = Plan(
    {
        f"model.layers.{layer}.{name}": ModulePlan(4, 8.0)
        for layer in (2, 3)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
    },
    num_layers=4,
    layer_path="model.layers",
    full=("model.layers.1.mlp.down_proj", "model.layers.3.self_attn.k_proj"),
)

Tune = Callable[..., TrainResult]


@pytest.fixture
def tune(tiny_model_dir: Path, train_file: Path, eval_file: Path) -> Tune:
    """fine_tune with the hybrid plan on a fresh copy of the tiny model."""

    def run(out: Path, config: TrainConfig = CONFIG, **options: Any) -> TrainResult:
        model, tokenizer = load_model(tiny_model_dir, config.dtype)
        examples, held_out = load_examples(train_file, tokenizer), load_examples(eval_file, tokenizer)
        return fine_tune(model, tokenizer, examples, held_out, PLAN, config, out, **options)

    return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_full_weights_and_adapters_train_and_stock_peft_loads_both(tune, tmp_path, tiny_model_dir, dtype):
    out = tmp_path / "out"
    result = tune(out, dataclasses.replace(CONFIG, dtype=dtype))
    pristine = dict(load_model(tiny_model_dir, dtype)[0].named_parameters())
    for name, parameter in result.model.get_base_model().named_parameters():
        if "lora_B" in name:
            assert parameter.any(), name
        elif "modules_to_save" in name:
            assert parameter.dtype == getattr(torch, dtype)
            assert not torch.equal(parameter, pristine[name.replace(".modules_to_save.default", "")]), name
        elif "lora_A" not in name:
            bare = name.replace(".base_layer", "").replace(".original_module", "")
            assert torch.equal(parameter, pristine[bare]), name
    assert result.eval_loss_after < result.eval_loss_before
    # The lowest module that trains has no adapter.
    assert result.prefix_layers == 1
    saved = load_file(out / "adapter_model.safetensors")
    assert result.trainable_parameters == sum(tensor.numel() for tensor in saved.values())
    assert result.trainable_parameters == PLAN.trainable_parameters(result.model)
    assert Plan.from_json((out / "plan.json").read_text()) == PLAN
    modules = json.loads((out / "metrics.json").read_text())["patch_report"]["modules"]
    assert {m["module"].removeprefix(WRAPPED) for m in modules if m["path"] == "peft"} == set(PLAN.full)

    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=getattr(torch, dtype))
    stock = PeftModel.from_pretrained(base, out).eval()
    PLAN.check(stock)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(result.model.eval()(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_however_it_is_computed_the_losses_are_the_same(tune, tmp_path):
    mine = tune(tmp_path / "mine").history
    for change in ({"kernels": False}, {"gradient_checkpointing": True}, {"packing": True}):
        other = tune(tmp_path / "".join(change), dataclasses.replace(CONFIG, **change)).history
        assert [r.loss for r in other] == pytest.approx([r.loss for r in mine], rel=1e-4), change
        assert [r.grad_norm for r in other] == pytest.approx([r.grad_norm for r in mine], rel=1e-3), change


def test_full_weights_have_their_own_rate_under_the_same_schedule(tune, tmp_path):
    rates: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            kinds = ("lora_A", "lora_B", "modules_to_save")
            names = kwargs["model"].named_parameters()
            rates.append({kind: rate_of[id(p)] for name, p in names for kind in kinds if kind in name})

    config = dataclasses.replace(CONFIG, steps=3, lora_plus=4.0, full_rate=0.5, schedule="linear")
    result = tune(tmp_path / "out", config, callbacks=[Watch()])
    assert [r["lora_A"] for r in rates] == pytest.approx([1e-2, 2e-2 / 3, 1e-2 / 3])
    assert [r["lora_B"] / r["lora_A"] for r in rates] == pytest.approx([4.0] * 3)
    assert [r["modules_to_save"] / r["lora_A"] for r in rates] == pytest.approx([0.5] * 3)
    assert [record.learning_rate for record in result.history] == pytest.approx([r["lora_A"] for r in rates])


def test_not_finite_keeps_the_last_good_full_weights(tune, tmp_path):
    def break_weight(model: Any) -> None:
        with torch.no_grad():
            trained_weight(model, PLAN.full[0]).fill_(float("nan"))

    with pytest.raises(NonFiniteLoss, match="after 2 good updates"):
        tune(tmp_path / "out", callbacks=[AtStep(4, break_weight)])
    tune(tmp_path / "short", dataclasses.replace(CONFIG, steps=2))
    mine, short = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "short"))
    assert mine.keys() == short.keys()
    assert all(torch.equal(mine[name], short[name]) for name in mine)
