"""Modules trained in full beside adapters: what trains, at which rate, in which dtype, and what stock PEFT loads."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
)

from aletheia_tune.data import load_examples
from aletheia_tune.errors import NonFiniteLoss
from aletheia_tune.full import float32_weights
from aletheia_tune.layers import full_modules
from aletheia_tune.loading import load_model
from aletheia_tune.metrics import TrainResult
from aletheia_tune.patch import apply_kernels
from aletheia_tune.plan import ModulePlan, Plan, uniform_plan
from aletheia_tune.rates import parameter_groups
from aletheia_tune.train import fine_tune
from aletheia_tune.training_config import TrainConfig
from benchmarks.family_table import FAMILIES
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


def roberta() -> nn.Module:
    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=24, classifier_dropout=0.3,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def deberta() -> nn.Module:
    config = FAMILIES["DeBERTa-v2"].build().config
    config.pooler_dropout = config.cls_dropout = 0.3
    return type(FAMILIES["DeBERTa-v2"].build())(config)


def tied_llama() -> nn.Module:
    model = llama()
    model.config.tie_word_embeddings = True
    return type(model)(model.config)


FULL_OF_ANY_KIND = {
    "RoBERTa's head": (roberta, ["classifier"], 4),
    "DeBERTa's pooler": (deberta, ["pooler", "classifier"], 4),
    "ModernBERT's head": (FAMILIES["ModernBERT"].build, ["head", "classifier"], 4),
    "embeddings": (llama, ["embed_tokens", "lm_head"], 2),
    "tied embeddings": (tied_llama, ["embed_tokens", "lm_head"], 1),
    # Its feed-forward block casts its input to the dtype that it reads off the weight.
    "T5's wo": (t5, ["wo"], 4),
    "norms": (llama, ["input_layernorm"], 3),
}


@pytest.mark.parametrize(("build", "names", "count"), FULL_OF_ANY_KIND.values(), ids=FULL_OF_ANY_KIND)
@pytest.mark.parametrize("training", [True, False])
def test_modules_of_any_kind_act_rounded(build, names, count, training):
    torch.manual_seed(0)
    model = build().bfloat16()
    targets = ["q_proj", "query", "query_proj", "Wqkv", "q"]
    config = LoraConfig(
        target_modules=targets, modules_to_save=names, ensure_weight_tying=build is tied_llama, r=2
    )
    model = get_peft_model(model, config).train(training)
    ids = torch.randint(3, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 1, 0]) if "Sequence" in type(model.get_base_model()).__name__ else ids

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(2)
        model.zero_grad()
        output = model(input_ids=ids, labels=labels)
        output.loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return output.logits.detach(), grads

    full = {name: p for name, p in model.named_parameters() if "modules_to_save" in name}
    assert len(full) == count
    for name, parameter in full.items():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    expected_logits, expected = step()
    before = {name: parameter.detach().clone() for name, parameter in full.items()}
    with float32_weights(model):
        assert all(parameter.dtype == torch.float32 for parameter in full.values())
        logits, given = step()
        assert logits.dtype == expected_logits.dtype
        assert torch.equal(logits, expected_logits)
        assert given.keys() == expected.keys()
        assert full.keys() <= given.keys()
        for name, gradient in given.items():
            # The uses of a tied weight add up in float32.
            rtol = 1e-2 if build is tied_llama and name in full else 0
            torch.testing.assert_close(gradient, expected[name].to(gradient.dtype), rtol=rtol, atol=rtol)
        with torch.no_grad():
            for parameter in full.values():
                parameter.mul_(1 + 2**-10)
                assert not torch.equal(parameter, parameter.bfloat16().float())
        assert torch.equal(step()[0], expected_logits)
        exact = {name: parameter.detach().clone() for name, parameter in full.items()}
    assert dict(model.named_parameters()).items() >= full.items()
    for name, parameter in full.items():
        assert parameter.grad is None
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, exact[name].bfloat16())
        assert torch.equal(parameter, before[name])
    assert not any("forward" in module.__dict__ for module in model.modules())


class _Counted(nn.Module):
    """A backbone and a head with statistics of its own, which is called by the names of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = _Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(states=self.body(x), scale=2.0)


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(8, 3)

    def forward(self, *, states: Tensor, scale: float) -> tuple[Tensor, float]:
        return self.out(self.drop(self.norm(states))) * scale, scale


def test_a_heads_mode_statistics_and_hooks_are_its_own():
    def outcome(float32: bool) -> tuple[list[Tensor], dict[str, Tensor], int]:
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["body"], modules_to_save=["head"])
        model = get_peft_model(_Counted().bfloat16(), config)
        head: Any = full_modules(model)[WRAPPED + "head"].modules_to_save["default"]
        calls: list[nn.Module] = []
        head.register_forward_hook(lambda *_: calls.append(head))
        x, outputs = torch.randn(6, 8).bfloat16(), []
        with float32_weights(model) if float32 else contextlib.nullcontext():
            assert {p.dtype for p in head.parameters()} == {torch.float32 if float32 else torch.bfloat16}
            for training in (True, False):
                logits, scale = model.train(training)(x)
                assert scale == 2.0
                outputs.append(logits.detach())
        return outputs, {name: buffer.clone() for name, buffer in model.named_buffers()}, len(calls)

    (given, buffers, calls), (expected, expected_buffers, expected_calls) = outcome(True), outcome(False)
    assert calls == expected_calls == 2
    assert all(map(torch.equal, given, expected))
    assert buffers.keys() == expected_buffers.keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in expected_buffers.items())
    moved, still = (
        buffers[f"{WRAPPED}head.{at}.norm.running_mean"]
        for at in ("modules_to_save.default", "original_module")
    )
    assert moved.any()
    assert not still.any()


def test_a_forward_that_was_replaced_before_runs_and_comes_back():
    model, _ = hybrid(llama, torch.bfloat16)
    wrapper: Any = full_modules(model)[WRAPPED + FULL[llama][0]]
    trained = wrapper.modules_to_save["default"]
    original, doubled = trained.forward, lambda x: 2 * original(x)
    trained.forward = doubled
    expected = loss_and_grads(model)[0]
    with float32_weights(model):
        assert torch.equal(loss_and_grads(model)[0], expected)
    assert trained.forward is doubled


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
