"""Packed rows: the same loss and gradients as padded ones, or a refusal."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from aletheia_tune.attention import kernel_attention
from aletheia_tune.data import collate, load_examples
from aletheia_tune.errors import UserError
from aletheia_tune.head import labelled_head
from aletheia_tune.loading import load_model
from aletheia_tune.norms import kernel_norms
from aletheia_tune.packing import require_separation
from aletheia_tune.patch import apply_kernels
from aletheia_tune.plan import uniform_plan


def adapted(directory, dtype: str):
    model, tokenizer = load_model(directory, dtype)
    torch.manual_seed(0)
    peft_model = get_peft_model(model, uniform_plan(model, rank=4, alpha=8).to_lora_config(model))
    model.config.use_cache = False  # as the Trainer sets it
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft_model.train(), tokenizer


def loss_and_gradients(model, batch) -> tuple[float, dict[str, Tensor]]:
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return loss.item(), gradients


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize(("dtype", "rel", "share"), [("float32", 1e-5, 1e-4), ("bfloat16", 1e-2, 5e-2)])
def test_loss_and_gradients_are_those_of_the_padded_batch(
    tiny_model_dir, train_file, kernels, dtype, rel, share
):
    model, tokenizer = adapted(tiny_model_dir, dtype)
    examples = load_examples(train_file, tokenizer)[:5]
    padded = collate(examples, tokenizer.pad_token_id)
    packed = DataCollatorWithFlattening()(examples)
    assert packed["input_ids"].shape == (1, padded["attention_mask"].sum())
    with contextlib.ExitStack() as stack:
        if kernels:
            apply_kernels(model)
            for context in (kernel_attention, kernel_norms, labelled_head):
                stack.enter_context(context(model))
        require_separation(model)
        loss, gradients = loss_and_gradients(model, packed)
        expected_loss, expected = loss_and_gradients(model, padded)
    assert loss == pytest.approx(expected_loss, rel=rel)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= share * gradient.norm(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_in_use_hides_where_examples_begin(tiny_model_dir, dtype):
    model, _ = adapted(tiny_model_dir, dtype)
    require_separation(model)
    model.config.use_cache = True
    with pytest.raises(
        UserError, match="LlamaForCausalLM does not keep the examples of a packed batch apart"
    ):
        require_separation(model)
    assert model.training


def test_learned_positions_start_again_with_each_example():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    model.config.use_cache = False
    state = torch.get_rng_state()
    require_separation(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_rounding_through_many_layers_is_no_reading_of_the_other_example():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=48, initializer_range=0.2, **sizes))
    model.config.use_cache = False
    require_separation(model)
    model.config.use_cache = True
    with pytest.raises(UserError, match="does not keep the examples"):
        require_separation(model)


@pytest.mark.parametrize(
    "model",
    [
        lambda: BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=16, n_layer=2, n_head=2)),
        lambda: MambaForCausalLM(
            MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
        ),
    ],
    ids=["alibi", "recurrent"],
)
@pytest.mark.filterwarnings("ignore")
def test_models_that_read_no_positions_are_refused(model):
    torch.manual_seed(0)
    refused = model()
    refused.config.use_cache = False
    with pytest.raises(UserError, match="packed batch"):
        require_separation(refused)
