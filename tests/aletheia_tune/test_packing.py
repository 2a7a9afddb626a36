"""A packed row is its examples: what they begin with once, and the same losses and gradients."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from aletheia_tune import attention
from aletheia_tune.attention import kernel_attention
from aletheia_tune.data import Example
from aletheia_tune.packing import PackingCollator, common_beginning, tokens_in
from tests.training_case import loss_and_gradient, served

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
}


def example(ids: list[int], learned_from: int) -> Example:
    return {"input_ids": ids, "labels": [-100] * learned_from + ids[learned_from:]}


def conversations() -> list[Example]:
    """Five examples of 11 to 30 tokens, of which the first 7 are the same and 3 more are not learned."""
    draw = torch.Generator().manual_seed(0)
    lengths = (30, 11, 17, 24, 13)
    system = torch.randint(1, 64, (7,), generator=draw).tolist()
    return [
        example([*system, *torch.randint(1, 64, (n - 7,), generator=draw).tolist()], learned_from=10)
        for n in lengths
    ]


def llama(**settings: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **settings))


def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, use_cache=False)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    return GPT2LMHeadModel(config)


def experts() -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            head_dim=8,
            experts_implementation="eager",
        )
    )


def test_what_examples_begin_with_stands_once():
    batch = PackingCollator(share=True)(
        [example([5, 6, 7, 8, 9], 4), example([5, 6, 1], 3), example([5, 6, 2, 3, 4], 4)]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 1, 2, 3, 4]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 2, 3, 4]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 9, -100, -100, -100, 4]]
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 1, 1],
    ]
    assert tokens_in(batch) == 13


@pytest.mark.parametrize(
    ("examples", "common"),
    [
        ([example([1, 2, 3, 4], 3)], 0),
        ([example([1, 2, 3, 4], 3), example([9, 2, 3, 4], 3)], 0),
        ([example([1, 2, 3, 4], 3), example([1, 2, 9, 4], 3)], 2),
        # Token 2 predicts a label in one of them: what precedes it is the last to be shared.
        ([example([1, 2, 3, 4, 5], 3), example([1, 2, 3, 4, 6], 4)], 2),
        ([example([1, 2, 3], 1), example([1, 2, 4], 2)], 0),
        ([example([1, 2, 3], 0), example([1, 2, 4], 0)], 0),
        # Something of each is left, also of examples without a label and of one that begins another.
        ([example([1, 2, 3], 3), example([1, 2, 3], 3)], 2),
        ([example([1, 2, 3], 3), example([1, 2, 3, 4, 5], 5)], 2),
    ],
)
def test_a_beginning_ends_before_what_is_learned(examples, common):
    assert common_beginning(examples) == common


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=8), st.integers(0, 8)), min_size=1),
    st.booleans(),
)
def test_every_example_is_in_the_row(drawn, share):
    examples = [example(ids, min(learned, len(ids))) for ids, learned in drawn]
    batch = PackingCollator(share)(examples)
    ids, positions, labels = (batch[name][0] for name in ("input_ids", "position_ids", "labels"))
    assert tokens_in(batch) == sum(len(each["input_ids"]) for each in examples)
    common = common_beginning(examples) if share else 0
    if not common:
        plain = DataCollatorWithFlattening()(examples)
        assert batch.keys() == plain.keys()
        assert all(torch.equal(batch[name], plain[name]) for name in plain)
        return
    end = 0
    for number, each in enumerate(examples):
        start, end = end, end + len(each["input_ids"]) - (common if number else 0)
        columns = [*range(common), *range(start + (0 if number else common), end)]
        seen = batch["attention_mask"][0, 0, end - 1].nonzero().flatten().tolist()
        assert seen == columns
        assert ids[columns].tolist() == each["input_ids"]
        assert positions[columns].tolist() == list(range(len(columns)))
        assert labels[columns][1:].tolist() == each["labels"][1:]
    assert end == len(ids)


@pytest.mark.parametrize("build", [llama, gpt2, experts])
def test_loss_and_gradients_are_those_of_the_whole_examples(build):
    torch.manual_seed(0)
    model = build().double().train()
    examples = conversations()
    shared, whole = PackingCollator(True)(examples), PackingCollator(False)(examples)
    assert shared["input_ids"].shape[1] == whole["input_ids"].shape[1] - 4 * 7
    loss, gradient = loss_and_gradient(model, shared)
    expected_loss, expected = loss_and_gradient(model, whole)
    assert (
        loss - expected_loss
    ).abs() <= 1e-6 * expected_loss  # transformers makes losses and norms in float32
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()


@served
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_operator_is_as_near_to_float64_as_sdpa(monkeypatch, checkpointing):
    torch.manual_seed(0)
    model = llama().bfloat16().train()
    exact = llama().double().train()
    exact.load_state_dict(model.state_dict())
    examples = conversations()
    exact_loss, exact_gradient = loss_and_gradient(exact, PackingCollator(False)(examples))
    plain_loss, plain_gradient = loss_and_gradient(model, PackingCollator(False)(examples))
    keys: list[int] = []
    original = attention.range_attention

    def counting(query, key, value, *args, **kwargs):
        keys.append(key.shape[2])
        return original(query, key, value, *args, **kwargs)

    monkeypatch.setattr(attention, "range_attention", counting)
    with contextlib.ExitStack() as stack:
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        assert stack.enter_context(kernel_attention(model)).active
        loss, gradient = loss_and_gradient(model, PackingCollator(True)(examples))
    tokens = sum(len(each["input_ids"]) for each in examples)
    assert keys == [tokens] * 3 * (2 if checkpointing else 1)
    assert (loss - exact_loss).abs() <= 2 * (plain_loss - exact_loss).abs() + torch.finfo(torch.bfloat16).eps
    assert (gradient - exact_gradient).norm() <= 2 * (plain_gradient - exact_gradient).norm() + 1e-5


@served
def test_one_mask_may_serve_several_rows():
    torch.manual_seed(0)
    model = llama().bfloat16().train()
    batch = PackingCollator(True)(conversations())
    mask, positions = batch["attention_mask"], batch["position_ids"]
    rows = torch.randint(1, 64, (2, mask.shape[-1]))
    with kernel_attention(model) as state:
        assert state.active
        both = model(input_ids=rows, position_ids=positions, attention_mask=mask).logits
        each = [
            model(input_ids=row[None], position_ids=positions, attention_mask=mask).logits for row in rows
        ]
    torch.testing.assert_close(both, torch.cat(each), rtol=2e-2, atol=2e-2)
