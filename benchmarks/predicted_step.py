"""What a whole training step of a model would take on a card, predicted from what its launches move and multiply.

Layers are transformers' own, traced on the meta device forward and backward: frozen, with PEFT's adapters, and with our
operators in the place of their linears. Attention is counted as a fused kernel from its shapes and the head over the
labelled rows alone, both alike in every arm, so that arms differ in their adapters and in the layers that these cover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula
from transformers import AttentionInterface
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.adapted import (
    ALPHA,
    LINEARS,
    OurGatedMlp,
    OurGroup,
    counted_pass,
    empty,
    llama_config,
    members,
    on_meta,
    trained,
    with_peft,
)
from benchmarks.shapes import Shape
from benchmarks.traffic import Cost, counting

SEQUENCE = 2048
LABELLED = 0.5
# AdamW in one kernel reads weight, gradient and both moments, and writes all but the gradient: seven float32.
ADAMW_BYTES = 28


# A fused attention as the counter sees it: an operation of q, k and v that moves those and its output, nothing square.
@torch.library.custom_op("roofline::attention", mutates_args=())
def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("roofline::attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


_attention.register_fake(lambda q, k, v: torch.empty_like(q))
_attention_backward.register_fake(
    lambda do, q, k, v, o: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
)
_attention.register_autograd(
    lambda ctx, do: _attention_backward(do, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output),
)


def _two_products(q_shape: Sequence[int]) -> int:
    """q kᵀ and its product with v; causal: half of the square."""
    batch, heads, length, width = q_shape
    return 2 * 2 * batch * heads * length * length * width // 2


@register_flop_formula(torch.ops.roofline.attention)
def _(q_shape: Any, *_: Any, **__: Any) -> int:
    return _two_products(q_shape)


@register_flop_formula(torch.ops.roofline.attention_backward)
def _(do_shape: Any, *_: Any, **__: Any) -> int:
    # Five products: the scores again, and four gradients.
    return _two_products(do_shape) * 5 // 2


def _attend(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return torch.ops.roofline.attention(q, k, v).transpose(1, 2), None


AttentionInterface.register("roofline", _attend)


def _layer(shape: Shape) -> LlamaDecoderLayer:
    config = llama_config(shape)
    config._attn_implementation = "roofline"
    return on_meta(LlamaDecoderLayer, config, 0)


def _input(shape: Shape) -> Tensor:
    return empty(shape.tokens // SEQUENCE, SEQUENCE, shape.hidden)


def _positions(shape: Shape) -> dict[str, tuple[Tensor, Tensor]]:
    return {"position_embeddings": (empty(1, SEQUENCE, shape.head_dim), empty(1, SEQUENCE, shape.head_dim))}


def _with_our_operators(layer: LlamaDecoderLayer, shape: Shape, rank: int) -> LlamaDecoderLayer:
    attention, groups = layer.self_attn, shape.groups
    attention.q_proj, attention.k_proj, attention.v_proj = members(OurGroup(*groups["qkv"], (rank,) * 3))
    (attention.o_proj,) = members(OurGroup(*groups["o"], (rank,)))
    layer.mlp = OurGatedMlp(shape, (rank,) * 3)
    return layer


@dataclass(frozen=True)
class Layer:
    """One layer's costs, and how many parameters it trains."""

    costs: list[Cost]
    parameters: int = 0


def layers(shape: Shape, rank: int) -> dict[str, Layer]:
    """A layer in its forms, by name; all but ``below``, which nothing is trained in or under, with their backward."""
    with torch.no_grad(), counting() as below:
        _layer(shape)(_input(shape), **_positions(shape))
    config = {"r": rank, "lora_alpha": ALPHA, "target_modules": list(LINEARS)}
    forms = {
        "ours": _with_our_operators(_layer(shape), shape, rank),
        "peft": with_peft(_layer(shape), LoraConfig(**config)),
        "peft_bf16": with_peft(_layer(shape), LoraConfig(**config), torch.bfloat16),
    }
    counted = {
        name: Layer(
            counted_pass(layer, _input(shape), **_positions(shape)),
            sum(parameter.numel() for parameter in trained(layer)),
        )
        for name, layer in forms.items()
    }
    return {"below": Layer(below.costs), **counted}


def _around(shape: Shape, parameters: int) -> list[Cost]:
    """Embedding, final norm, head over the labelled rows, optimiser."""
    tokens, hidden, vocabulary = shape.tokens, shape.hidden, shape.vocabulary
    rows = int(LABELLED * tokens)
    product = Cost(
        "head", 2 * (rows * hidden + hidden * vocabulary + rows * vocabulary), 2 * rows * hidden * vocabulary
    )
    return [
        Cost("embedding", 2 * 2 * tokens * hidden, 0),
        Cost("norm", 2 * 2 * tokens * hidden, 0),
        product,
        Cost("cross_entropy", 2 * 2 * rows * vocabulary, 0),
        product,
        Cost("norm_backward", 3 * 2 * tokens * hidden, 0),
        Cost("adamw", ADAMW_BYTES * parameters, 0),
    ]


def arms(shape: Shape, rank: int) -> dict[str, list[Cost]]:
    """Every launch of a step, by arm: a form of the layer, in every layer or in the upper half."""
    forms = layers(shape, rank)
    steps = {}
    for name in ("peft", "peft_bf16", "ours"):
        for part, adapted in (("uniform", shape.layers), ("upper half", shape.layers // 2)):
            costs = forms["below"].costs * (shape.layers - adapted) + forms[name].costs * adapted
            steps[f"{name}, {part}"] = costs + _around(shape, adapted * forms[name].parameters)
    return steps
