"""A model on the attention operator trains as on SDPA, and is on SDPA again afterwards."""

from __future__ import annotations

import contextlib
import re

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from aletheia_tune import attention
from aletheia_tune.attention import kernel_attention, ranges_of
from tests.training_case import loss_and_gradient, served

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES))


def mistral() -> MistralForCausalLM:
    return MistralForCausalLM(MistralConfig(num_key_value_heads=2, sliding_window=6, **SIZES))


def batch(padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    labels = ids.clone()
    if padded:
        for row, length in enumerate((20, 11, 3)):
            mask[row, length:] = 0
            labels[row, length:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def operator_calls(monkeypatch) -> list[int]:
    calls: list[int] = []
    original = attention.range_attention

    def counting(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(attention, "range_attention", counting)
    return calls


@served
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("build", [llama, mistral])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_loss_and_gradients(dtype, build, padded, operator_calls):
    torch.manual_seed(0)
    model = build().to(dtype).train()
    exact = build().double().train()
    exact.load_state_dict(model.state_dict())
    inputs = batch(padded)
    exact_loss, exact_gradient = loss_and_gradient(exact, inputs)
    plain_loss, plain_gradient = loss_and_gradient(model, inputs)
    with kernel_attention(model) as state:
        assert state.active
        loss, gradient = loss_and_gradient(model, inputs)
    assert len(operator_calls) == 2
    slack = max(torch.finfo(dtype).eps, 1e-5)
    assert (loss - exact_loss).abs() <= 2 * (plain_loss - exact_loss).abs() + slack
    assert (gradient - exact_gradient).norm() <= 2 * (plain_gradient - exact_gradient).norm() + 1e-5


@served
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_evaluation_runs_on_the_operator_as_well(dtype, operator_calls):
    torch.manual_seed(0)
    model = llama().to(dtype).eval()
    exact = llama().double().eval()
    exact.load_state_dict(model.state_dict())
    inputs = batch(padded=True)
    seen = inputs["attention_mask"].bool()  # of a padded position nothing is asked
    with torch.no_grad():
        expected, plain = (m(**inputs).logits[seen] for m in (exact, model))
        with kernel_attention(model):
            given = model(**inputs).logits[seen]
    assert len(operator_calls) == 2
    assert (given - expected).norm() <= 2 * (plain - expected).norm() + 1e-5


@served
def test_decoding_stays_on_sdpa(operator_calls):
    model = llama().eval()
    inputs = batch(padded=True)
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(inputs["input_ids"], **settings)
    with kernel_attention(model):
        assert torch.equal(model.generate(inputs["input_ids"], **settings), expected)
    assert len(operator_calls) == 2  # the prompt's pass, in two layers


@served
def test_the_models_own_attention_is_set_again():
    model = llama().bfloat16().train()
    inputs = batch(padded=False)
    before = model(**inputs).logits
    with contextlib.suppress(ZeroDivisionError), kernel_attention(model):
        assert model.config._attn_implementation == "aletheia"
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(**inputs).logits, before)


@served
def test_dropout_falls_back(operator_calls):
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, attention_dropout=0.5, **SIZES)).bfloat16()
    with kernel_attention(model.train()):
        loss_and_gradient(model, batch(padded=False))
    assert operator_calls == []


@served
def test_an_encoder_sees_all_its_real_tokens(operator_calls):
    config = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).bfloat16().train()
    inputs = batch(padded=True) | {"labels": torch.tensor([0, 1, 1])}
    expected = model(**inputs).logits
    with kernel_attention(model):
        logits = model(**inputs).logits
    assert len(operator_calls) == 2
    torch.testing.assert_close(logits, expected, rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: llama().double(), "has no torch.float64"),
        (
            lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attn_implementation="eager")).bfloat16(),
            "eager, not sdpa",
        ),
    ],
    ids=["float64", "eager"],
)
def test_what_it_does_not_serve_is_left_alone_and_says_why(build, reason):
    model = build()
    before = model.config._attn_implementation
    with kernel_attention(model) as state:
        assert not state.active
        assert model.config._attn_implementation == before
    assert re.search(reason, state.reason)


def test_masks_that_are_ranges():
    causal = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    first, last = ranges_of(causal)
    assert first.tolist() == [[0] * 5]
    assert last.tolist() == [[1, 2, 3, 4, 5]]
    empty = torch.zeros(1, 1, 2, 5, dtype=torch.bool)
    first, last = ranges_of(empty)
    assert (first == last).all()
    with_hole = causal.clone()
    with_hole[0, 0, 4, 2] = False
    assert ranges_of(with_hole) is None
    assert ranges_of(causal.float()) is None
    assert ranges_of(causal.expand(1, 3, 5, 5)) is None
