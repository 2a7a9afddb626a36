"""Tiny models of several families, and batches for them, that the tests of the probe and its scores share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

VOCABULARY = 97


def llama(**changes) -> nn.Module:
    settings = {
        "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def gpt2(**changes) -> nn.Module:
    settings = {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**settings, **{**dropout, **changes}))


def gpt_neox() -> nn.Module:
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=56, vocab_size=VOCABULARY,
            max_position_embeddings=64, hidden_dropout=0.0, attention_dropout=0.0,
        )
    )  # fmt: skip


def mixtral() -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=4, num_experts_per_tok=2, vocab_size=VOCABULARY, max_position_embeddings=64,
            output_router_logits=True, router_aux_loss_coef=0.1,
        )
    )  # fmt: skip


def shared_module() -> nn.Module:
    """Layers 0 and 2 share their MLP module; layers 1 and 3 share only the Parameter of one projection."""
    model = llama()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    model.model.layers[3].self_attn.q_proj.weight = model.model.layers[1].self_attn.q_proj.weight
    return model


def hidden_uses() -> nn.Module:
    """One weight enters the forward other than by a product, one by a product and otherwise, one never."""
    model = llama()
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    first.up_proj.forward = lambda x: torch.einsum("bti,oi->bto", x, first.up_proj.weight)
    first.down_proj.forward = lambda x: (
        torch.nn.functional.linear(x, first.down_proj.weight) * first.down_proj.weight.square().sum()
    )
    second.gate_proj.forward = lambda x: x.new_ones(*x.shape[:-1], second.gate_proj.out_features)
    return model


def bert() -> nn.Module:
    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=56, vocab_size=VOCABULARY,
            max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
        )
    )  # fmt: skip


def build(builder: Callable[..., nn.Module], seed: int = 0, **changes) -> nn.Module:
    """A model with weights large enough that no gradient is near rounding, norms and biases included."""
    torch.manual_seed(seed)
    model = builder(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def some_batches(model: nn.Module, count: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        ids = torch.randint(VOCABULARY, (2, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        if isinstance(model, BertForSequenceClassification):
            labels = torch.randint(3, (2,), generator=generator)
        else:
            labels = ids.masked_fill(mask == 0, -100)
            labels[0, :5] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def layer_prefix(model: nn.Module) -> str:
    return next(
        path
        for path in ("model.layers.", "transformer.h.", "gpt_neox.layers.", "bert.encoder.layer.")
        if any(name.startswith(path) for name, _ in model.named_parameters())
    )
