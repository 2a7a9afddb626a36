"""Training: what is measured, what is written, and how it ends when it ends early."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
    TrainerCallback,
)

from aletheia_tune import train
from aletheia_tune.data import Collator, load_examples
from aletheia_tune.errors import NonFiniteLoss, UserError
from aletheia_tune.evaluation import held_out_loss
from aletheia_tune.loading import load_model
from aletheia_tune.metrics import NO_PREFIX_CACHE, TrainResult
from aletheia_tune.plan import ModulePlan, Plan, uniform_plan
from aletheia_tune.train import fine_tune
from aletheia_tune.training_config import TrainConfig
from tests.at_step import AtStep, break_weights, interrupt

CONFIG = TrainConfig(
    steps=6, batch_size=4, learning_rate=1e-2, warmup=0, dtype="float32", progress=False, schedule="constant"
)
WRITTEN = ["README.md", "adapter_config.json", "adapter_model.safetensors", "metrics.json", "plan.json"]

Tune = Callable[..., TrainResult]


def plan_on(layers: tuple[int, ...], dropout: float = 0.0) -> Plan:
    names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    modules = {
        f"model.layers.{layer}.{name}": ModulePlan(4 + index, 8.0)
        for layer in layers
        for index, name in enumerate(names)
    }
    return Plan(modules, num_layers=4, layer_path="model.layers", dropout=dropout)


PLAN = plan_on((2, 3))


@pytest.fixture
def tune(tiny_model_dir: Path, train_file: Path, eval_file: Path) -> Tune:
    """fine_tune on a fresh copy of the tiny model."""

    def run(out: Path, config: TrainConfig = CONFIG, plan: Plan = PLAN, **options: Any) -> TrainResult:
        model, tokenizer = load_model(tiny_model_dir, config.dtype)
        for change in options.pop("changes", ()):
            change(model)
        examples, held_out = load_examples(train_file, tokenizer), load_examples(eval_file, tokenizer)
        return fine_tune(model, tokenizer, examples, held_out, plan, config, out, **options)

    return run


def saved_adapter(out: Path) -> dict[str, Tensor]:
    return load_file(out / "adapter_model.safetensors")


def assert_same_adapter(out: Path, other: Path) -> None:
    mine, theirs = saved_adapter(out), saved_adapter(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_one_process_trains_on_one_card(tune, tmp_path, monkeypatch):
    class TwoCards(train.TrainingArguments):
        def __post_init__(self):
            super().__post_init__()
            self._n_gpu = 2

    class Seeing(train._Trainer):
        def __init__(self, *args, **options):
            seen.append(options["args"].n_gpu)
            super().__init__(*args, **options)

    seen: list[int] = []
    monkeypatch.setattr(train, "TrainingArguments", TwoCards)
    monkeypatch.setattr(train, "_Trainer", Seeing)
    tune(tmp_path / "out", dataclasses.replace(CONFIG, steps=1))
    assert seen
    assert max(seen) <= 1


def test_learns_and_writes_what_it_says(tune, tmp_path):
    out = tmp_path / "out"
    config = dataclasses.replace(CONFIG, steps=60, eval_every=25)
    result = tune(out, config)
    assert sorted(path.name for path in out.iterdir()) == WRITTEN
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [record.step for record in result.history] == list(range(1, 61))
    assert [record.step for record in result.evals] == [0, 25, 50, 60]
    assert result.eval_loss_after < result.eval_loss_before - 0.1
    assert result.history[-1].loss < result.history[0].loss
    assert result.stopped is None
    assert result.prefix_layers == 2
    assert result.trainable_parameters == sum(tensor.numel() for tensor in saved_adapter(out).values())
    assert result.trainable_parameters == PLAN.trainable_parameters(result.model)
    seconds = [record.seconds for record in result.history]
    assert all(later > sooner > 0 for sooner, later in itertools.pairwise(seconds))
    assert all(record.grad_norm > 0 and record.learning_rate == 1e-2 for record in result.history)
    assert result.peak_memory_mb > 0

    metrics = json.loads((out / "metrics.json").read_text())
    assert TrainResult.from_dict(metrics) == dataclasses.replace(result, model=None)
    assert metrics["config"] == dataclasses.asdict(config)
    assert metrics["versions"]["torch"] == torch.__version__
    assert {module["path"] for module in metrics["patch_report"]["modules"]} == {"kernel"}
    assert metrics["head"] == "labelled rows"
    assert Plan.from_json((out / "plan.json").read_text()) == PLAN


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stock_peft_loads_the_adapter(tune, tmp_path, tiny_model_dir, dtype):
    result = tune(tmp_path / "out", dataclasses.replace(CONFIG, dtype=dtype))
    assert {tensor.dtype for tensor in saved_adapter(tmp_path / "out").values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=getattr(torch, dtype))
    stock = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        with stock.disable_adapter():
            assert not torch.equal(expected, stock(input_ids=ids).logits)
        assert torch.equal(result.model.eval()(input_ids=ids).logits, expected)


def test_base_weights_stay_frozen_and_adapters_are_float32(tune, tmp_path, tiny_model_dir):
    result = tune(tmp_path / "out", dataclasses.replace(CONFIG, dtype="bfloat16"))
    pristine, _ = load_model(tiny_model_dir, "bfloat16")
    weights = dict(pristine.named_parameters())
    for name, parameter in result.model.get_base_model().named_parameters():
        if "lora_" in name:
            assert parameter.dtype == torch.float32
        else:
            assert torch.equal(parameter, weights[name.replace(".base_layer", "")])


def test_held_out_loss_is_the_mean_over_tokens(tiny_model_dir, eval_file):
    model, tokenizer = load_model(tiny_model_dir, "float32")
    examples = load_examples(eval_file, tokenizer)
    total, count, means = 0.0, 0, []
    for example in examples:
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        logprobs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        picked = [-logprobs[at, label].item() for at, label in enumerate(labels[1:]) if label != -100]
        total, count, means = total + sum(picked), count + len(picked), [*means, sum(picked) / len(picked)]
    model.train()
    for batch_size in (1, 4, 100):
        loss = held_out_loss(model, examples, Collator(tokenizer.pad_token_id), batch_size)
        assert loss == pytest.approx(total / count, rel=1e-5)
    assert model.training
    assert sum(means) / len(means) != pytest.approx(total / count, rel=1e-5)  # the lengths are unequal


def test_held_out_loss_makes_logits_of_labelled_positions_alone(tiny_model_dir, eval_file, monkeypatch):
    model, tokenizer = load_model(tiny_model_dir, "float32")
    examples = load_examples(eval_file, tokenizer)
    rows = []
    hook = model.lm_head.register_forward_hook(
        lambda module, given, logits: rows.append(logits[..., 0].numel())
    )
    loss = held_out_loss(model, examples, Collator(tokenizer.pad_token_id), 4)
    hook.remove()
    assert sum(rows) == sum(label != -100 for example in examples for label in example["labels"][1:])
    assert not model.lm_head._forward_pre_hooks
    # Without a head that is a module of its own, all rows are made and the same ones count.
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)
    assert held_out_loss(model, examples, Collator(tokenizer.pad_token_id), 4) == pytest.approx(
        loss, rel=1e-6
    )


def test_kernels_give_the_losses_of_plain_peft(tune, tmp_path):
    fast = tune(tmp_path / "fast")
    plain = tune(tmp_path / "plain", dataclasses.replace(CONFIG, kernels=False))
    assert plain.patch_report is None
    assert plain.head == "all rows: kernels are off"
    for mine, theirs in zip(fast.history, plain.history, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


def test_label_smoothing_is_the_trainers_with_kernels_and_without(tune, tmp_path):
    sharp = tune(tmp_path / "sharp")
    config = dataclasses.replace(CONFIG, label_smoothing=0.2)
    ours = tune(tmp_path / "ours", config)
    plain = tune(tmp_path / "plain", dataclasses.replace(config, kernels=False))
    assert ours.head == "labelled rows"
    assert [r.loss for r in ours.history] == pytest.approx([r.loss for r in plain.history], rel=1e-4)
    assert ours.history[-1].loss != pytest.approx(sharp.history[-1].loss, rel=1e-2)
    assert ours.eval_loss_before == sharp.eval_loss_before, "held-out loss is never smoothed"


def test_lora_plus_gives_b_its_own_rate_under_the_same_schedule(tune, tmp_path):
    rates: list[tuple[float, float]] = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
            by_parameter = {id(p): group for group in optimizer.param_groups for p in group["params"]}
            assert len(by_parameter) == sum(len(group["params"]) for group in optimizer.param_groups)
            assert all(group["weight_decay"] == 0 for group in optimizer.param_groups)
            found = {
                kind: {
                    by_parameter[id(p)]["lr"]
                    for name, p in kwargs["model"].named_parameters()
                    if kind in name
                }
                for kind in ("lora_A", "lora_B")
            }
            rates.append((*found["lora_A"], *found["lora_B"]))

    config = dataclasses.replace(CONFIG, steps=4, lora_plus=8.0, schedule="linear")
    result = tune(tmp_path / "out", config, callbacks=[Watch()])
    assert [a for a, _ in rates] == pytest.approx([1e-2, 7.5e-3, 5e-3, 2.5e-3])
    assert [b / a for a, b in rates] == pytest.approx([8.0] * 4)
    assert [record.learning_rate for record in result.history] == pytest.approx([a for a, _ in rates])


def test_the_seed_alone_decides(tune, tmp_path):
    again = [tune(tmp_path / name, plan=plan_on((2, 3), dropout=0.2)) for name in ("first", "second")]
    assert_same_adapter(tmp_path / "first", tmp_path / "second")
    assert [r.loss for r in again[0].history] == [r.loss for r in again[1].history]


def test_every_plan_sees_the_same_batches(tune, tmp_path):
    config = dataclasses.replace(CONFIG, steps=14)  # into the second epoch
    few = tune(tmp_path / "few", config)
    many = tune(tmp_path / "many", dataclasses.replace(config, kernels=False), plan_on((0, 1, 2)))
    other = tune(tmp_path / "other", dataclasses.replace(config, seed=1))
    tokens = [record.tokens for record in few.history]
    assert tokens == [record.tokens for record in many.history]
    assert tokens != [record.tokens for record in other.history]
    assert few.history[0].loss == pytest.approx(many.history[0].loss, rel=1e-5)  # adapters begin as zero


def test_gradient_checkpointing_changes_nothing_but_memory(tune, tmp_path):
    plain = tune(tmp_path / "plain")
    thrifty = tune(tmp_path / "thrifty", dataclasses.replace(CONFIG, gradient_checkpointing=True))
    assert thrifty.prefix_layers == 2
    for mine, theirs in zip(thrifty.history, plain.history, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)


@pytest.mark.parametrize("on_before", [False, True])
def test_gradient_checkpointing_is_afterwards_as_it_was(tune, tmp_path, on_before):
    def switch_on(model: Any) -> None:
        if on_before:
            model.activation_checkpointing_enable()

    config = dataclasses.replace(CONFIG, steps=1, gradient_checkpointing=True)
    model = tune(tmp_path / "out", config, changes=[switch_on]).model.get_base_model()
    assert [layer.gradient_checkpointing for layer in model.model.layers] == [on_before] * 4
    assert on_before or not model.model.embed_tokens._forward_hooks


def test_a_start_from_the_gradient_that_fails_leaves_no_hook_behind(tune, tmp_path):
    models: list[Any] = []

    def break_norm(model: Any) -> None:
        models.append(model)
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")

    config = dataclasses.replace(CONFIG, init="gradient", gradient_checkpointing=True)
    with pytest.raises(NonFiniteLoss, match="before training"):
        tune(tmp_path / "out", config, changes=[break_norm])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in models[0].modules())
    assert not models[0].is_activation_checkpointing


@pytest.mark.parametrize("kernels", [True, False])
def test_a_prefix_cache_changes_nothing_but_what_is_computed(tune, tmp_path, kernels):
    config = dataclasses.replace(CONFIG, steps=None, epochs=3, eval_every=4, kernels=kernels)
    plain = tune(tmp_path / "plain", config)
    assert plain.prefix_cache == NO_PREFIX_CACHE
    kept = dataclasses.replace(config, prefix_cache=str(tmp_path / "cache"))
    sentences = []
    for name in ("builds", "reads"):
        cached = tune(tmp_path / name, kept)
        sentences.append(cached.prefix_cache)
        assert cached.evals[0].loss == pytest.approx(plain.evals[0].loss, rel=1e-6)
        for mine, theirs in zip(cached.history, plain.history, strict=True):
            assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
            assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)
        assert cached.eval_loss_after == pytest.approx(plain.eval_loss_after, rel=1e-4)
    read, stored = (int(word) for word in sentences[0].split() if word.isdigit())
    assert sentences == [sentences[0], f"{read + stored} examples read, 0 computed and kept"]
    evaluations = len(plain.evals)
    assert evaluations > 2
    assert read + stored == 3 * 48 + evaluations * 11
    assert stored <= 48 + 11
    assert_same_adapter(tmp_path / "builds", tmp_path / "reads")


def test_a_prefix_cache_that_cannot_be_is_reported(tune, tmp_path):
    config = dataclasses.replace(CONFIG, steps=1, prefix_cache=str(tmp_path / "cache"))
    result = tune(tmp_path / "out", config, plan_on((0, 3)))
    assert result.prefix_cache == "none: the first layer is adapted: there is no prefix"
    with pytest.raises(UserError, match="prefix cache of 0 GiB"):
        dataclasses.replace(CONFIG, prefix_cache_gb=0)


def test_accumulation_is_a_larger_batch(tune, tmp_path):
    whole = tune(tmp_path / "whole")
    parts = tune(tmp_path / "parts", dataclasses.replace(CONFIG, batch_size=2, gradient_accumulation=2))
    for mine, theirs in zip(parts.history, whole.history, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


def test_a_start_from_the_gradient_counts_as_training_time(tune, tmp_path, monkeypatch):
    clock = itertools.count()
    start = train.gradient_start

    def slow(*args: Any, **kwargs: Any) -> None:
        for _ in range(100):
            next(clock)
        start(*args, **kwargs)

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(train, "gradient_start", slow)
    result = tune(tmp_path / "out", dataclasses.replace(CONFIG, init="gradient"))
    # A step looks at the clock four times between its begin and its end, for its forward and backward pass.
    assert [record.seconds for record in result.evals] == [101.0, 131.0]
    assert [record.seconds for record in result.history] == [106.0, 111.0, 116.0, 121.0, 126.0, 131.0]
    assert [record.step_seconds for record in result.history] == [5.0] * 6


def test_a_start_from_the_gradient_learns_faster_from_the_same_function_and_data(
    tune, tmp_path, tiny_model_dir
):
    config = dataclasses.replace(CONFIG, steps=20, learning_rate=2e-3)
    default = tune(tmp_path / "default", config)
    aimed = tune(tmp_path / "aimed", dataclasses.replace(config, init="gradient"))
    again = tune(tmp_path / "again", dataclasses.replace(config, init="gradient"))
    assert_same_adapter(tmp_path / "aimed", tmp_path / "again")
    assert aimed.eval_loss_before == default.eval_loss_before
    assert [r.tokens for r in aimed.history] == [r.tokens for r in default.history]
    assert aimed.eval_loss_after < default.eval_loss_after
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    stock = PeftModel.from_pretrained(base, tmp_path / "aimed").eval()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(again.model.eval()(input_ids=ids).logits, stock(input_ids=ids).logits)


def test_sampled_depth_trains_some_steps_from_the_upper_layer_alone(tune, tmp_path):
    moved: list[set[int]] = []
    before: dict[str, Tensor] = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            before.update({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})

        def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            changed = [
                n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])
            ]
            moved.append({int(n.split("layers.")[1].split(".")[0]) for n in changed})

    config = dataclasses.replace(CONFIG, steps=40, sampled_depth={0: 1.0, 3: 1.0}, gradient_accumulation=2)
    result = tune(tmp_path / "out", config, callbacks=[Watch()])
    shallow = sum(layers == {3} for layers in moved)
    assert shallow + sum(layers == {2, 3} for layers in moved) == 40
    assert 10 <= shallow <= 30
    assert result.eval_loss_after < result.eval_loss_before
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert TrainResult.from_dict(metrics) == dataclasses.replace(result, model=None)
    assert all(p.requires_grad for n, p in result.model.named_parameters() if "lora_" in n)
    tune(tmp_path / "again", config)
    assert_same_adapter(tmp_path / "out", tmp_path / "again")


def test_reweighting_raises_the_gradients_that_are_seldom_reached(tune, tmp_path):
    config = dataclasses.replace(CONFIG, sampled_depth={0: 1.0, 3: 1.0}, learning_rate=1e-3)
    plain = tune(tmp_path / "plain", config)
    weighted = tune(tmp_path / "weighted", dataclasses.replace(config, reweight_depth=True))
    pairs = zip(plain.history, weighted.history, strict=True)
    first, again = next(pair for pair in pairs if pair[0].grad_norm != pair[1].grad_norm)
    # Until a pass goes below layer 3 the runs are one; there, layer 2 counts twice.
    assert first.loss == again.loss
    assert first.grad_norm < again.grad_norm < 2 * first.grad_norm
    with pytest.raises(UserError, match="reweight_depth goes with sampled_depth"):
        tune(tmp_path / "out", dataclasses.replace(CONFIG, reweight_depth=True))
    assert not (tmp_path / "out").exists()


def test_packing_is_the_padded_batch_without_padding(tune, tmp_path):
    padded = tune(tmp_path / "padded")
    packed = tune(tmp_path / "packed", dataclasses.replace(CONFIG, packing=True))
    plain = tune(tmp_path / "plain", dataclasses.replace(CONFIG, packing=True, kernels=False))
    for mine, other, theirs in zip(packed.history, plain.history, padded.history, strict=True):
        assert mine.tokens == other.tokens == theirs.tokens
        assert [mine.loss, other.loss] == pytest.approx([theirs.loss] * 2, rel=1e-4)
        assert [mine.grad_norm, other.grad_norm] == pytest.approx([theirs.grad_norm] * 2, rel=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernels": False, "label_smoothing": 0.1},
        {"gradient_accumulation": 2, "label_smoothing": 0.1},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_examples_have_their_common_beginning_once_in_a_packed_batch(tune, tmp_path, monkeypatch, options):
    config = dataclasses.replace(CONFIG, packing=True, **options)
    rows: dict[str, list[int]] = {}

    def run(name: str, config: TrainConfig) -> TrainResult:
        rows[name] = []

        def watch(model: Any) -> None:
            model.get_input_embeddings().register_forward_hook(
                lambda module, _, output: rows[name].append(output.shape[1]) if module.training else None
            )

        return tune(tmp_path / name, config, changes=[watch])

    assert run("padded", CONFIG).packing == "none: batches are padded"
    shared = run("shared", config)
    assert shared.packing == "a common beginning once"
    cached = run("cached", dataclasses.replace(config, prefix_cache=str(tmp_path / "cache")))
    assert cached.packing == "examples in whole: the prefix cache keeps whole ones"
    monkeypatch.setattr(train, "why_not_shared", lambda *_: "told so")
    whole = run("whole", config)
    assert whole.packing == "examples in whole: told so"
    # "repeat" begins every prompt: of a batch of 4 examples three have it from the first one.
    count = CONFIG.steps * config.gradient_accumulation
    assert [tokens + 3 for tokens in rows["shared"][-count:]] == rows["whole"][-count:]
    for mine, theirs in zip(shared.history, whole.history, strict=True):
        assert mine.tokens == theirs.tokens
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-4)


def test_grouping_by_length_leaves_less_padding_in_an_order_of_the_seed(tune, tmp_path):
    config = dataclasses.replace(CONFIG, steps=24, group_by_length=True)  # two epochs
    widths: dict[str, list[int]] = {}

    def run(name: str, config: TrainConfig, plan: Plan = PLAN) -> list[int]:
        widths[name] = []

        def watch(model: Any) -> None:
            model.register_forward_pre_hook(
                lambda _, args, kwargs: (
                    widths[name].append(kwargs["input_ids"].shape[1]) if model.training else None
                ),
                with_kwargs=True,
            )

        result = tune(tmp_path / name, config, plan, changes=[watch])
        return [record.tokens for record in result.history]

    grouped = run("grouped", config)
    assert grouped == run("other plan", config, plan_on((0, 1, 2), dropout=0.3))
    assert grouped != run("other seed", dataclasses.replace(config, seed=1))
    shuffled = run("shuffled", dataclasses.replace(config, group_by_length=False))
    assert sum(grouped) == sum(shuffled), "each epoch has every example"
    assert sum(grouped[:12]) == sum(grouped[12:])
    assert grouped[:12] != grouped[12:]
    assert sum(widths["grouped"]) < sum(widths["shuffled"])


def test_packing_is_refused_where_examples_would_mix(tune, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)
    with pytest.raises(UserError, match="does not keep the examples of a packed batch apart"):
        tune(tmp_path / "out", dataclasses.replace(CONFIG, packing=True))
    assert list(tmp_path.iterdir()) == []


def test_epochs_are_passes_over_the_examples(tune, tmp_path):
    result = tune(tmp_path / "out", dataclasses.replace(CONFIG, steps=None, epochs=0.5))
    assert len(result.history) == 6  # half of 48 examples in batches of 4


def test_evaluation_is_in_no_time_of_training(tune, tmp_path, monkeypatch):
    clock = itertools.count()
    evaluate = train.held_out

    def slow(*args: Any) -> tuple[float, float | None]:
        for _ in range(10_000):
            next(clock)
        return evaluate(*args)

    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(train, "held_out", slow)
    result = tune(tmp_path / "out", dataclasses.replace(CONFIG, eval_every=1))
    # Four looks at the clock besides the one that ends it.
    assert [record.step_seconds for record in result.history] == [5.0] * 6
    assert result.history[-1].seconds == 30.0
    assert result.tokens_per_second == sum(record.tokens for record in result.history) / 30


def test_progress_off_a_terminal_is_plain_lines_on_stderr(tune, tmp_path, capsys):
    tune(tmp_path / "out", dataclasses.replace(CONFIG, steps=40, progress=True))
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("step ")]
    assert len(lines) == 11
    assert lines[0].startswith("step 1/40  loss ")
    assert "tokens/s" in lines[-1]
    assert lines[-1].endswith("0 s left")


def break_gradients(model: Any) -> None:
    next(p for p in model.parameters() if p.requires_grad).register_hook(lambda grad: grad * float("inf"))


@pytest.mark.parametrize(
    ("act", "what"),
    [(break_weights, "the loss became nan"), (break_gradients, "the gradient norm became inf")],
)
def test_not_finite_keeps_the_last_good_adapter(tune, tmp_path, act, what):
    out = tmp_path / "out"
    with pytest.raises(NonFiniteLoss, match=f"{what} at step 4; .* after 2 good updates") as e:
        tune(out, callbacks=[AtStep(4, act)])
    assert e.value.step == 4
    assert sorted(path.name for path in out.iterdir()) == WRITTEN
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["stopped"] == str(e.value)
    assert len(metrics["history"]) == 3
    assert metrics["eval_loss_after"] is None
    tune(tmp_path / "short", dataclasses.replace(CONFIG, steps=2))
    assert_same_adapter(out, tmp_path / "short")


def test_a_rate_beyond_reason_keeps_the_untrained_adapter(tune, tmp_path):
    with pytest.raises(NonFiniteLoss) as caught:
        tune(tmp_path / "out", dataclasses.replace(CONFIG, learning_rate=1e38))
    assert caught.value.step == 2
    adapter = saved_adapter(tmp_path / "out")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert all((tensor == 0).all() for name, tensor in adapter.items() if "lora_B" in name)


def test_a_gradient_norm_that_overflows_is_not_finite(tune, tmp_path):
    def swell(model: Any) -> None:
        next(p for p in model.parameters() if p.requires_grad).register_hook(
            lambda grad: grad.clamp(1) * 1e38
        )

    with pytest.raises(NonFiniteLoss, match="the gradient norm became inf at step 2"):
        tune(tmp_path / "out", callbacks=[AtStep(2, swell)])


def test_a_broken_model_leaves_nothing_behind(tune, tmp_path):
    def poison(model: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight[0] = float("nan")

    with pytest.raises(NonFiniteLoss, match="nothing was written") as caught:
        tune(tmp_path / "out", changes=[poison])
    assert caught.value.step == 0
    assert list(tmp_path.iterdir()) == []


def test_interrupt_keeps_the_adapter_so_far(tune, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="after step 2; the adapter so far is in"):
        tune(tmp_path / "out", callbacks=[AtStep(3, interrupt)])
    assert "interrupted" in json.loads((tmp_path / "out" / "metrics.json").read_text())["stopped"]
    tune(tmp_path / "short", dataclasses.replace(CONFIG, steps=2))
    assert_same_adapter(tmp_path / "out", tmp_path / "short")


def test_interrupt_within_an_update_undoes_it(tune, tmp_path, monkeypatch):
    step = torch.optim.AdamW.step

    def half(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        if self.state and max(state["step"] for state in self.state.values()) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(KeyboardInterrupt, match="after step 2"):
        tune(tmp_path / "out")
    monkeypatch.undo()
    tune(tmp_path / "short", dataclasses.replace(CONFIG, steps=2))
    assert_same_adapter(tmp_path / "out", tmp_path / "short")


def test_interrupt_before_the_first_step_writes_nothing(tune, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="nothing was written"):
        tune(tmp_path / "out", callbacks=[AtStep(1, interrupt)])
    assert list(tmp_path.iterdir()) == []


def test_a_taken_directory_is_refused_before_any_work(tune, tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with monkeypatch.context() as patch:
        patch.setattr(Plan, "wrap", lambda *_, **__: pytest.fail("work began"))
        with pytest.raises(UserError, match="--overwrite"):
            tune(out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    tune(out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == WRITTEN


def test_a_plan_for_another_model_is_refused(tune, tmp_path):
    foreign = Plan(
        {"model.layers.2.attn.c_attn": ModulePlan(4, 8.0)}, num_layers=4, layer_path="model.layers"
    )
    with pytest.raises(UserError, match="c_attn"):
        tune(tmp_path / "out", plan=foreign)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("held_out_too", [False, True])
def test_an_example_longer_than_the_model_has_positions_is_refused(tiny_model_dir, tmp_path, held_out_too):
    _, tokenizer = load_model(tiny_model_dir, "float32")
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=20, n_embd=16, n_layer=2, n_head=2)
    )
    short, long = (load_examples([{"text": "a " * count}], tokenizer) for count in (5, 20))
    given = (short, long) if held_out_too else (long, None)
    with pytest.raises(UserError, match=r"an example has 21 tokens .* for 20: .* positions=20"):
        fine_tune(model, tokenizer, *given, uniform_plan(model, rank=2), CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_training_without_held_out_examples(tiny_model_dir, train_file, tmp_path):
    model, tokenizer = load_model(tiny_model_dir, "float32")
    plan = uniform_plan(model, rank=2)
    result = fine_tune(
        model, tokenizer, load_examples(train_file, tokenizer), None, plan, CONFIG, tmp_path / "out"
    )
    assert result.evals == ()
    assert result.eval_loss_before is result.eval_loss_after is None
    assert result.prefix_layers == 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"steps": 5, "epochs": 1.0}, "exclude each other"),
        ({"steps": 0}, "steps is 0"),
        ({"epochs": -1.0}, "epochs is -1.0"),
        ({"eval_every": 0}, "eval_every is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"gradient_accumulation": 0}, "gradient_accumulation is 0"),
        ({"learning_rate": 0.0}, "learning rate is 0.0"),
        ({"learning_rate": float("nan")}, "learning rate is nan"),
        ({"lora_plus": 0.0}, "lora_plus is 0.0"),
        ({"warmup": -1.0}, "warmup is -1.0"),
        ({"label_smoothing": 1.0}, "label smoothing is 1.0"),
        ({"schedule": "cosinus"}, "schedule 'cosinus' is unknown"),
        ({"sampled_depth": {2: -1.0}}, "the odds of layer 2 are -1.0"),
        ({"shrink_after": 0.0}, "shrink_after is 0.0"),
        ({"shrink_after": 100.0}, "shrink_after is 100.0"),
        ({"shrink_after": 50.0, "shrink_to": 0.0}, "shrink_to is 0.0"),
        ({"shrink_after": 50.0, "sampled_depth": {0: 1.0}}, "exclude each other"),
        ({"init": "zero"}, "init 'zero' is unknown"),
        ({"dtype": "float16"}, "dtype 'float16' is unknown"),
        ({"steps": 24.5}, "steps is 24.5: give a whole number"),
        ({"packing": "false"}, "packing is 'false': give true or false"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3': give a number"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"prefix_cache_gb": float("inf")}, "a size above 0 that the disk has"),
    ],
)
def test_settings_that_cannot_be_meant(options, line):
    with pytest.raises(UserError, match=line):
        TrainConfig(**options)


def test_models_that_cannot_be_loaded(tiny_model_dir, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no-weights").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "no-weights" / name).write_bytes((tiny_model_dir / name).read_bytes())
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "nobody-knows"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    for name in ("cut", "other-sizes", "no-words"):
        shutil.copytree(tiny_model_dir, tmp_path / name)
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = tmp_path / "other-sizes" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "intermediate_size": 64}))
    (tmp_path / "no-words" / "tokenizer.json").write_text("{")
    headless = LlamaConfig.from_pretrained(tiny_model_dir, tie_word_embeddings=False)
    shutil.copytree(tiny_model_dir, tmp_path / "headless", ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaModel(headless).save_pretrained(tmp_path / "headless")
    for name, line in {
        "missing": "does not exist",
        "file": "is a file",
        "empty": "has no config.json",
        "no-weights": "cannot load a model",
        "strange": "cannot load a model",
        "broken": "cannot load a model",
        "cut": "cannot load a model",
        "other-sizes": "cannot load a model",
        "no-words": "cannot load a model",
        "headless": r"lacks lm_head\.weight \(of 1 weights\), which would be drawn anew",
    }.items():
        with pytest.raises(UserError, match=line) as caught:
            load_model(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="dtype 'int8'"):
        load_model(tiny_model_dir, "int8")


def test_pickled_weights_are_not_read(tiny_model_dir, tmp_path):
    model, tokenizer = load_model(tiny_model_dir, "float32")
    tokenizer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load a model"):
        load_model(tmp_path)


def test_metrics_of_another_kind_are_refused():
    with pytest.raises(UserError, match="not aletheia metrics"):
        TrainResult.from_dict({"format": "something"})
    with pytest.raises(UserError, match="not aletheia metrics"):
        TrainResult.from_dict({"format": "aletheia-metrics", "version": 2})


@pytest.mark.parametrize("fast", [True, False])
def test_native_keeps_weights_in_bfloat16_only_where_its_products_are_fast(monkeypatch, tiny_model_dir, fast):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    expected = "bfloat16" if fast else "float32"
    assert TrainConfig(steps=1, progress=False).dtype == expected
    assert load_model(tiny_model_dir)[0].dtype == getattr(torch, expected)
