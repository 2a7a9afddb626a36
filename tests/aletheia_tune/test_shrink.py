"""A training that shrinks: frozen adapters act, the suffix learns as it would, and the cache changes nothing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from aletheia_tune.data import batches, load_examples
from aletheia_tune.errors import UserError
from aletheia_tune.layers import find_layers
from aletheia_tune.loading import load_model
from aletheia_tune.metrics import TrainResult
from aletheia_tune.patch import apply_kernels
from aletheia_tune.plan import ModulePlan, Plan
from aletheia_tune.prefix import cut_prefix
from aletheia_tune.prefix_cache import cache_prefix
from aletheia_tune.shrink import Shrinking, lowest_kept
from aletheia_tune.train import fine_tune
from aletheia_tune.training_config import TrainConfig

NAMES = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")


def plan_on(*layers: int) -> Plan:
    modules = {f"model.layers.{layer}.{name}": ModulePlan(4, 8.0) for layer in layers for name in NAMES}
    return Plan(modules, num_layers=4, layer_path="model.layers")


def layer_of(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


def adapters(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


@pytest.fixture
def adapted(tiny_model_dir, train_file):
    """The tiny model with adapters that act on layers 0 to 3, and a batch."""
    model, tokenizer = load_model(tiny_model_dir, "float32")
    torch.manual_seed(0)
    peft_model = get_peft_model(model, plan_on(0, 1, 2, 3).to_lora_config(model)).train()
    for name, parameter in adapters(peft_model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    examples = load_examples(train_file, tokenizer)
    return peft_model, batches(examples, 4, tokenizer.pad_token_id, seed=0, count=1)[0]


def gradients(model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor | None]]:
    loss = model(**batch).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in adapters(model).items()}
    model.zero_grad()
    return loss.item(), found


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kernels", [False, True])
def test_the_suffix_learns_as_it_would_and_the_prefix_acts_unchanged(adapted, tmp_path, kernels, cached):
    model, batch = adapted
    if kernels:
        apply_kernels(model)
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    full_loss, full = gradients(model, batch)
    before = {name: parameter.detach().clone() for name, parameter in adapters(model).items()}

    cut = cut_prefix(model)
    keep = partial(cache_prefix, model, directory=tmp_path) if cached else None
    with Shrinking(model, 2, 50, cut, None, keep) as shrinking:
        shrinking.shrink(optimizer)
        assert shrinking.cut.lowest_layer == 2
        assert {layer_of(n) for n, p in adapters(model).items() if p in optimizer.state} == {2, 3}
        ran: list[bool] = []
        find_layers(model).layers[1].register_forward_hook(
            lambda layer, args, out: ran.append(out.requires_grad)
        )
        for _ in range(3):
            loss, found = gradients(model, batch)
            assert loss == full_loss
            for name, gradient in found.items():
                if layer_of(name) < 2:
                    assert gradient is None, name
                else:
                    assert torch.equal(gradient, full[name]), name
        assert not any(ran)
        if cached:
            assert (shrinking.cache.hits, shrinking.cache.stored) == (8, 4)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in adapters(model).items():
            assert torch.equal(parameter, before[name]) == (layer_of(name) < 2), name
    assert list(tmp_path.iterdir()) == []
    assert all(parameter.requires_grad for parameter in adapters(model).values())
    _, again = gradients(model, batch)
    assert all(gradient is not None and gradient.any() for gradient in again.values())


def test_a_context_that_never_shrank_leaves_what_it_was_given(adapted, tmp_path):
    model, batch = adapted
    model.get_base_model().model.layers[0].requires_grad_(False)
    cut = cut_prefix(model)
    with cache_prefix(model, cut, tmp_path) as cache:
        with Shrinking(model, 2, 50, cut, cache, None):
            model(**batch)
        model(**batch)
        assert (cache.hits, cache.stored) == (4, 4)
    assert any(path.is_dir() for path in tmp_path.iterdir())


class Watch(TrainerCallback):
    """The adapters after each step, and the layers that the optimizer holds a state of."""

    def __init__(self) -> None:
        self.adapters: list[dict[str, Tensor]] = []
        self.held: list[set[int]] = []

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        found = adapters(model)
        self.adapters.append({name: parameter.detach().clone() for name, parameter in found.items()})
        self.held.append({layer_of(name) for name, p in found.items() if p in optimizer.state})


CONFIG = TrainConfig(
    steps=8,
    batch_size=4,
    learning_rate=1e-2,
    warmup=0,
    dtype="float32",
    progress=False,
    schedule="constant",
    eval_every=2,
    shrink_after=50,
    shrink_to=50,
)


@pytest.fixture
def tune(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., tuple[TrainResult, Watch]]:
    """fine_tune of all layers on 8 examples of one length, so that products have as many rows in every batch."""
    file = tmp_path / "train.jsonl"
    completions = [" ".join("ab"[i >> j & 1] for j in (0, 1, 2, 0, 1)) for i in range(8)]
    lines = [json.dumps({"prompt": "repeat", "completion": completion}) for completion in completions]
    file.write_text("\n".join(lines) + "\n")

    def run(name: str, **changes: Any) -> tuple[TrainResult, Watch]:
        model, tokenizer = load_model(tiny_model_dir, "float32")
        examples, watch = load_examples(file, tokenizer), Watch()
        config, plan = dataclasses.replace(CONFIG, **changes), plan_on(0, 1, 2, 3)
        out = tmp_path / name
        return fine_tune(model, tokenizer, examples, examples[:4], plan, config, out, [watch]), watch

    return run


def saved(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def test_from_its_step_on_the_lower_adapters_stay_and_act(tune, tmp_path, tiny_model_dir):
    result, seen = tune("shrunk")
    whole, unshrunk = tune("whole", shrink_after=None)
    assert result.prefix_layers == 2
    # The loss of a step is that of before its update: the fifth is the first that trains the upper half alone.
    assert [r.loss for r in result.history[:5]] == [r.loss for r in whole.history[:5]]
    assert [r.loss for r in result.history[5:]] != [r.loss for r in whole.history[5:]]
    assert seen.held == [{0, 1, 2, 3}] * 4 + [{2, 3}] * 4
    assert unshrunk.held == [{0, 1, 2, 3}] * 8
    kept = saved(tmp_path / "shrunk")
    assert len(kept) == len(seen.adapters[-1])
    for name, parameter in seen.adapters[-1].items():
        assert torch.equal(seen.adapters[3][name], unshrunk.adapters[3][name])
        assert torch.equal(parameter, seen.adapters[3][name]) == (layer_of(name) < 2), name
        assert torch.equal(kept[name.replace(".default", "")], parameter)
    base, _ = load_model(tiny_model_dir, "float32")
    stock = PeftModel.from_pretrained(base, tmp_path / "shrunk").eval()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(stock(input_ids=ids).logits, result.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("options", [{}, {"kernels": False}, {"packing": True}], ids=str)
def test_a_cached_training_is_the_uncached_one(tune, tmp_path, options):
    plain, _ = tune("plain", **options)
    cached, _ = tune("cached", prefix_cache=str(tmp_path / "kept"), **options)
    mine, theirs = saved(tmp_path / "cached"), saved(tmp_path / "plain")
    assert mine.keys() == theirs.keys()
    if "packing" in options:
        # Attention sums in an order that depends on where in the row an example lies.
        assert [r.loss for r in cached.evals] == pytest.approx([r.loss for r in plain.evals], rel=1e-5)
    else:
        assert [r.loss for r in cached.history] == [r.loss for r in plain.history]
        assert [r.loss for r in cached.evals] == [r.loss for r in plain.evals]
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    # Of the 8 examples and the 4 held out ones, each twice since it shrank.
    assert cached.prefix_cache == "12 examples read, 12 computed and kept"
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize(
    ("layers", "share", "lowest"), [((0, 1, 2, 3), 50, 2), ((0, 3), 75, 1), ((0, 1, 2, 3), 10, 3)]
)
def test_the_lowest_layer_that_goes_on_learning(layers, share, lowest):
    assert lowest_kept(plan_on(*layers), share) == lowest


@pytest.mark.parametrize(
    ("layers", "share", "says"),
    [
        ((2, 3), 50, "keeps those from 2 up, and the plan adapts none below"),
        ((0, 1), 50, "keeps those from 2 up, and the plan adapts none of them"),
    ],
)
def test_plans_that_cannot_shrink_so(layers, share, says):
    with pytest.raises(UserError, match=says):
        lowest_kept(plan_on(*layers), share)
