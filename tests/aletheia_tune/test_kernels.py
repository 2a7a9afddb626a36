"""All operators at once: the same losses and gradients, a word on each, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from aletheia_tune.errors import UserError
from aletheia_tune.kernels import use_kernels


@pytest.fixture
def model(tiny_model_dir):
    bare = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    adapted = get_peft_model(bare, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return adapted.train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(48).reshape(2, 24) % 29
    labels = ids.clone()
    labels[:, :10] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def loss_and_gradients(model) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def forwards(model) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def test_same_losses_and_gradients_and_everything_put_back(model):
    plain, gradients = loss_and_gradients(copy.deepcopy(model))
    before = forwards(model)
    with use_kernels(model, strict=True) as kernels:
        ours, our_gradients = loss_and_gradients(model)
        assert len(forwards(model)) > len(before)
        assert kernels.head.active
    assert ours == pytest.approx(plain, rel=1e-5)
    assert len(our_gradients) == len(gradients) > 0
    for mine, theirs in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert forwards(model) == before
    assert loss_and_gradients(model)[0] == pytest.approx(plain, rel=1e-6)


def test_inference_mode_in_training_mode(model):
    padded = batch()
    padded["attention_mask"][1, 20:] = 0
    with torch.no_grad():
        expected = model(**padded).loss
    with use_kernels(model), torch.inference_mode():
        given = model(**{name: tensor.clone() for name, tensor in padded.items()}).loss
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_it_says_what_runs_where(model):
    with use_kernels(model) as kernels:
        lines = str(kernels).splitlines()
    assert "modules run on the kernels" in lines[0]
    assert lines[-1] == "head: labelled rows"
    assert [line.split(":")[0] for line in lines[-3:]] == ["attention", "norms", "head"]


def test_an_error_inside_puts_everything_back_too(model):
    before = forwards(model)
    with pytest.raises(ZeroDivisionError), use_kernels(model):
        _ = 1 / 0
    assert forwards(model) == before


def test_a_model_without_adapters_is_refused_and_left_as_it_was(tiny_model_dir):
    bare = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with pytest.raises(UserError, match="LoRA"), use_kernels(bare):
        pass
    assert forwards(bare) == []
