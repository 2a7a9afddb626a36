"""The prefix cut: no graph under the lowest adapter, the same gradients above."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from aletheia_tune.layers import find_layers
from aletheia_tune.prefix import cut_prefix

CHECKPOINTING = [None, {"use_reentrant": True}, {"use_reentrant": False}]
IDS = ["plain", "reentrant", "non-reentrant"]


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    )


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=24, n_layer=5, n_head=4, n_positions=32))


def gpt_neox() -> PreTrainedModel:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=5,
            num_attention_heads=4,
            tie_word_embeddings=False,
        )
    )


FAMILIES = {
    "llama": (llama, "q_proj|down_proj"),
    "gpt2": (gpt2, "c_attn|c_proj"),
    "gpt_neox": (gpt_neox, "query_key_value"),
}


def adapted(family: str, layers: tuple[int, ...], checkpointing: dict[str, bool] | None = None) -> PeftModel:
    """A model with adapters that act (B is not zero) on the given layers, in training mode."""
    make, names = FAMILIES[family]
    torch.manual_seed(0)
    model = make()
    chosen = "|".join(str(layer) for layer in layers)
    config = LoraConfig(
        r=3,
        target_modules=rf".*\.({chosen})\..*({names})",
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    if checkpointing is not None:
        model.activation_checkpointing_enable(checkpointing)
    return peft_model.train()


def batch() -> dict[str, Tensor]:
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def gradients(model: PeftModel) -> dict[str, Tensor]:
    model.zero_grad()
    model(**batch()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def entering(layer: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states that a layer receives."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    yield seen
    handle.remove()


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=IDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [(0, 3), (2, 4), (4,)])
def test_gradients_are_those_without_a_cut(family, layers, checkpointing):
    expected = gradients(adapted(family, layers))
    model = adapted(family, layers, checkpointing)
    model.get_base_model().enable_input_require_grads()
    cut = cut_prefix(model)
    assert cut.lowest_layer == layers[0]
    assert cut.reason == ""
    got = gradients(model)
    assert got.keys() == expected.keys()
    assert any(gradient.abs().sum() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=IDS)
def test_no_graph_reaches_the_lowest_adapted_layer(checkpointing):
    model = adapted("llama", (2, 4), checkpointing)
    model.get_base_model().enable_input_require_grads()
    layers = find_layers(model).layers
    with entering(layers[2]) as without:
        model(**batch())
    assert without[0].grad_fn is not None  # what the cut is for

    cut_prefix(model)
    with entering(layers[2]) as hidden:
        model(**batch())
    assert hidden[0].grad_fn is None
    # Only the reentrant checkpoint needs an input with a gradient; elsewhere it would cost products for nothing.
    assert hidden[0].requires_grad == (checkpointing == {"use_reentrant": True})


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=IDS)
def test_the_prefix_saves_no_tensor(checkpointing):
    model = adapted("llama", (2, 4), checkpointing)
    model.get_base_model().enable_input_require_grads()
    running: list[int] = []

    def enter(index: int) -> None:
        running.append(index)

    def leave() -> None:
        running.pop()

    for index, layer in enumerate(find_layers(model).layers):
        layer.register_forward_pre_hook(lambda *_, index=index: enter(index))
        layer.register_forward_hook(lambda *_: leave())

    def saved() -> list[int]:
        counts = [0] * 5

        def pack(tensor: Tensor) -> Tensor:
            if running:
                counts[running[-1]] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch())
        return counts

    assert saved()[:2] != [0, 0] or checkpointing == {
        "use_reentrant": False
    }  # which saves by hooks of its own
    cut_prefix(model)
    counts = saved()
    assert counts[:2] == [0, 0]
    assert all(counts[2:]) or checkpointing == {"use_reentrant": False}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=IDS)
def test_layers_below_are_never_called_in_backward(checkpointing):
    model = adapted("llama", (2, 4), checkpointing)
    model.get_base_model().enable_input_require_grads()
    layers = find_layers(model).layers
    reached: set[int] = set()

    def watch(index: int, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: reached.add(index))

    def backward() -> set[int]:
        handles = [
            layer.register_forward_hook(lambda _, __, out, index=index: watch(index, out))
            for index, layer in enumerate(layers)
        ]
        loss = model(**batch()).loss
        reached.clear()
        rerun = [
            layer.mlp.register_forward_hook(lambda *_, index=index: reached.add(index))
            for index, layer in enumerate(layers)
        ]
        loss.backward()
        for handle in (*handles, *rerun):
            handle.remove()
        return set(reached)

    assert backward() == {0, 1, 2, 3, 4}
    cut_prefix(model)
    assert backward() == {2, 3, 4}


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=IDS)
def test_remove_restores(checkpointing):
    model = adapted("llama", (2, 4), checkpointing)
    model.get_base_model().enable_input_require_grads()
    layers = find_layers(model).layers
    flags = [layer.gradient_checkpointing for layer in layers]
    hooks = [len(layer._forward_pre_hooks) for layer in layers]
    cut = cut_prefix(model)
    gradients(model)
    cut.remove()
    assert [layer.gradient_checkpointing for layer in layers] == flags
    assert [len(layer._forward_pre_hooks) for layer in layers] == hooks
    with entering(layers[2]) as hidden:
        model(**batch())
    assert hidden[0].grad_fn is not None


def test_checkpointing_switched_on_after_the_cut_is_cut_as_well():
    expected = gradients(adapted("llama", (2, 4)))
    model = adapted("llama", (2, 4))
    cut_prefix(model)
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    with entering(find_layers(model).layers[2]) as hidden:
        got = gradients(model)
    assert hidden[0].grad_fn is None
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_trainable_head_and_final_norm_do_not_hinder():
    model = adapted("gpt_neox", (2,))
    base = model.get_base_model()
    base.get_output_embeddings().weight.requires_grad_()
    base.gpt_neox.final_layer_norm.weight.requires_grad_()
    assert cut_prefix(model).lowest_layer == 2


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_trainable_embeddings_forbid_the_cut(name):
    model = adapted("llama", (2, 4))
    base = model.get_base_model()
    # The head is tied to the embeddings: training it trains what feeds the layers.
    (base.lm_head if name == "lm_head" else base.model.embed_tokens).weight.requires_grad_()
    expected = gradients(model)
    cut = cut_prefix(model)
    assert cut.lowest_layer is None
    assert "embed_tokens" in cut.reason
    got = gradients(model)
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    cut.remove()


def test_nothing_trainable_in_the_layers_is_said():
    model = llama().requires_grad_(False)
    cut = cut_prefix(model)
    assert cut.lowest_layer is None
    assert "no parameter" in cut.reason


def test_thawing_a_prefix_layer_under_the_cut_is_an_error():
    model = adapted("llama", (2, 4))
    cut_prefix(model)
    find_layers(model).layers[0].mlp.up_proj.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="after cut_prefix"):
        model(**batch())


def test_no_backward_pass_through_an_encoder_beside_the_layers():
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_heads": 4, "dropout_rate": 0.0}
    base = T5ForConditionalGeneration(
        T5Config(vocab_size=61, decoder_start_token_id=0, pad_token_id=0, **sizes)
    )
    config = LoraConfig(target_modules=r"decoder\.block\.[12]\..*\.(q|k|v)", init_lora_weights=False)
    model = get_peft_model(base, config).train()
    expected = gradients(model)
    base.enable_input_require_grads()
    reached: list[bool] = []

    def watch(_layer: nn.Module, _args: object, output: tuple[Tensor, ...]) -> None:
        if output[0].requires_grad:
            output[0].register_hook(lambda _: reached.append(True))

    base.encoder.block[0].register_forward_hook(watch)
    gradients(model)
    assert reached  # what the cut is for
    reached.clear()
    assert cut_prefix(model).lowest_layer == 1
    got = gradients(model)
    assert not reached
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-7, msg=name)
