"""Sampled depth: the gradients above the boundary are the full pass's, below it there are none."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from aletheia_tune.data import batches, load_examples
from aletheia_tune.errors import UserError
from aletheia_tune.layers import find_layers
from aletheia_tune.loading import load_model
from aletheia_tune.patch import apply_kernels
from aletheia_tune.plan import ModulePlan, Plan
from aletheia_tune.prefix import cut_prefix
from aletheia_tune.sampled_depth import check_odds, sampled_depth


@pytest.fixture
def adapted(tiny_model_dir, train_file):
    """The tiny model with adapters that act on layers 1 to 3, and a batch."""
    model, tokenizer = load_model(tiny_model_dir, "float32")
    names = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")
    plan = Plan(
        {f"model.layers.{layer}.{name}": ModulePlan(4, 8.0) for layer in (1, 2, 3) for name in names},
        num_layers=4,
        layer_path="model.layers",
    )
    torch.manual_seed(0)
    peft_model = get_peft_model(model, plan.to_lora_config(model)).train()
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    examples = load_examples(train_file, tokenizer)
    return peft_model, batches(examples, 4, tokenizer.pad_token_id, seed=0, count=1)[0]


def gradients(model, batch) -> tuple[float, dict[str, Tensor | None]]:
    loss = model(**batch).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
    model.zero_grad()
    return loss.item(), found


def layer_of(name: str) -> int:
    return int(name.split("layers.")[1].split(".")[0])


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_above_the_boundary_are_the_full_passs(adapted, kernels, checkpointing):
    model, batch = adapted
    with contextlib.ExitStack() as stack:
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            stack.callback(cut_prefix(model).remove)
        if kernels:
            apply_kernels(model)
        full_loss, full = gradients(model, batch)
        assert all(gradient is not None and gradient.any() for gradient in full.values())
        needs: list[bool] = []
        for layer in find_layers(model).layers:
            layer.register_forward_hook(lambda _, args, out: needs.append(out.requires_grad))
        for boundary in (0, 1, 2, 3):
            with sampled_depth(model, {boundary: 1.0, 0: float(boundary == 0), 1: 1e-30}, seed=0) as depth:
                assert depth.draw() == boundary
                needs.clear()
                loss, found = gradients(model, batch)
            assert needs[:4] == [layer >= max(boundary, 1) for layer in range(4)]
            assert loss == full_loss
            for name, gradient in found.items():
                if layer_of(name) < boundary:
                    assert gradient is None, name
                else:
                    assert torch.equal(gradient, full[name]), name
    again_loss, again = gradients(model, batch)
    assert again_loss == full_loss
    assert all(torch.equal(again[name], full[name]) for name in full)


def test_the_optimizer_steps_only_what_was_reached(adapted):
    model, batch = adapted
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with sampled_depth(model, {1: 1e-30, 3: 1.0}, seed=0) as depth:
        depth.draw()
        model(**batch).loss.backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        moved = "lora_" in name and layer_of(name) == 3
        assert torch.equal(parameter, before[name]) != moved, name


def test_reweighted_gradients_are_unbiased(adapted):
    model, batch = adapted
    model.double()
    _, full = gradients(model, batch)
    odds = {0: 1.0, 2: 3.0, 3: 4.0}
    seen: dict[int, dict[str, Tensor | None]] = {}
    with sampled_depth(model, odds, seed=0) as depth:
        while len(seen) < len(odds):
            boundary = depth.draw()
            model(**batch).loss.backward()
            depth.reweight()
            seen[boundary] = {name: p.grad for name, p in model.named_parameters() if "lora_" in name}
            model.zero_grad()
    for name, gradient in full.items():
        parts = [odds[end] / 8 * found[name] for end, found in seen.items() if found[name] is not None]
        assert len(parts) == {1: 1, 2: 2, 3: 3}[layer_of(name)]
        torch.testing.assert_close(sum(parts), gradient, rtol=1e-12, atol=1e-15)
    # The rarest depth's gradients are the loudest.
    name = next(name for name in full if layer_of(name) == 1)
    torch.testing.assert_close(seen[0][name], 8 * full[name], rtol=1e-12, atol=1e-15)


def test_odds_are_followed_and_the_seed_decides(adapted):
    model, _ = adapted

    def drawn(seed: int) -> list[int]:
        with sampled_depth(model, {0: 4, 2: 3, 3: 3}, seed) as depth:
            return [depth.draw() for _ in range(3000)]

    first = drawn(0)
    assert first == drawn(0)
    assert first != drawn(1)
    counts = Counter(first)
    for layer, share in {0: 0.4, 2: 0.3, 3: 0.3}.items():
        # Four standard deviations of a binomial share of 3000.
        assert counts[layer] / 3000 == pytest.approx(share, abs=0.036)


@pytest.mark.parametrize(
    ("odds", "line"),
    [
        ({}, "no layer has odds above 0"),
        ({0: 0.0}, "no layer has odds above 0"),
        ({0: -1.0}, "odds of layer 0 are -1.0"),
        ({0: float("nan")}, "odds of layer 0 are nan"),
        ({-1: 1.0}, "-1 is no index of a layer"),
        ({"0": 1.0}, "'0' is no index of a layer"),
    ],
)
def test_odds_that_cannot_be_meant(odds, line):
    with pytest.raises(UserError, match=line):
        check_odds(odds)


def test_odds_that_do_not_fit_the_adapters(adapted):
    model, _ = adapted
    with (
        pytest.raises(UserError, match="adapters of layer 1 would never be trained"),
        sampled_depth(model, {0: 0.0, 2: 1.0}, 0),
    ):
        pass
    model.get_base_model().model.layers[3].requires_grad_(False)
    with (
        pytest.raises(UserError, match="above layer 3 nothing is trained"),
        sampled_depth(model, {0: 1.0, 3: 1.0}, 0),
    ):
        pass
    model.requires_grad_(False)
    with (
        pytest.raises(UserError, match="no parameter of the layers is trainable"),
        sampled_depth(model, {0: 1.0}, 0),
    ):
        pass
