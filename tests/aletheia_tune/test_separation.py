"""Packed rows: the same loss and gradients as padded ones, or a refusal; a beginning that is shared, or the reason."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import LoraConfig, get_peft_model
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
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from aletheia_tune.attention import kernel_attention
from aletheia_tune.data import collate, load_examples
from aletheia_tune.errors import UserError
from aletheia_tune.head import labelled_head
from aletheia_tune.loading import load_model
from aletheia_tune.norms import kernel_norms
from aletheia_tune.patch import apply_kernels
from aletheia_tune.plan import uniform_plan
from aletheia_tune.separation import require_separation, why_not_shared


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


def bare_llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=4, **sizes, **settings))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernels", [False, True])
def test_a_beginning_may_be_shared(tiny_model_dir, dtype, kernels):
    model, _ = adapted(tiny_model_dir, dtype)
    state = torch.get_rng_state()
    with contextlib.ExitStack() as stack:
        if kernels:
            apply_kernels(model)
            for context in (kernel_attention, kernel_norms, labelled_head):
                stack.enter_context(context(model))
        assert why_not_shared(model, longest=1000) == ""
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_a_beginning_may_be_shared_in_a_deep_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=97, num_hidden_layers=48, initializer_range=0.2, **sizes))
    model.config.use_cache = False
    assert why_not_shared(model.bfloat16(), longest=1000) == ""


def test_a_window_must_hold_every_example():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=40, num_hidden_layers=1, sliding_window=20, use_cache=False, **sizes)
    model = MistralForCausalLM(config)
    assert why_not_shared(model, longest=20) == ""
    assert why_not_shared(model, longest=21) == "sliding_window is 20 and an example has 21 tokens"


def test_noise_that_examples_would_share():
    assert "random numbers" in why_not_shared(bare_llama(attention_dropout=0.1), longest=8)
    model = get_peft_model(bare_llama(), LoraConfig(target_modules=["q_proj"], lora_dropout=0.1))
    assert "random numbers" in why_not_shared(model, longest=8)


def test_a_loss_of_routers():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=40, num_hidden_layers=1, use_cache=False, **sizes))
    assert why_not_shared(model, longest=8) == ""
    model.config.output_router_logits = True
    assert why_not_shared(model, longest=8) == "the routers' loss counts tokens"


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_attention_that_reads_no_such_mask_is_not_tried(monkeypatch, attention):
    model = bare_llama(use_cache=False)
    assert why_not_shared(model, longest=8) == ""
    model.set_attn_implementation(attention)
    monkeypatch.setattr(model, "forward", lambda **_: pytest.fail("tried"))
    assert why_not_shared(model, longest=8) == f"the model's attention is {attention}, not sdpa"


def test_keys_that_are_chosen_by_their_place():
    model = bare_llama(use_cache=False)
    require_separation(model)
    model.config.index_topk = 2048
    with pytest.raises(UserError, match=r"chooses keys by their place in a row \(index_topk\)"):
        require_separation(model)


def test_every_module_is_in_its_mode_again():
    model = bare_llama(use_cache=False).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    require_separation(model)
    why_not_shared(model, longest=8)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("fault", ["no beginning", "a little of another example"])
def test_a_mask_that_is_not_obeyed(monkeypatch, fault):
    model = bare_llama(use_cache=False)
    layer = type(model.model.layers[0])
    original = layer.forward

    def disobey(self, hidden, *args, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.shape[-1] == 12:
            attention_mask, hidden = attention_mask.clone(), hidden.clone()
            if fault == "no beginning":
                attention_mask[..., 8:, :4] = False
            else:
                hidden[:, 8:] += 1e-3 * hidden[:, 4:5]
        return original(self, hidden, *args, attention_mask=attention_mask, **kwargs)

    assert why_not_shared(model, longest=8) == ""
    monkeypatch.setattr(layer, "forward", disobey)
    assert why_not_shared(model, longest=8) == "logits are others then"


def test_a_model_that_takes_no_such_mask(monkeypatch):
    model = bare_llama()
    original = model.forward

    def forward(*args, attention_mask=None, **kwargs):
        if attention_mask is not None:
            raise ValueError("a mask of [batch, length] is needed")
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "forward", forward)
    assert why_not_shared(model, longest=8) == "ValueError: a mask of [batch, length] is needed"
