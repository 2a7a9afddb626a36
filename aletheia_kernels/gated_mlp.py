"""A gated MLP (SwiGLU, GeGLU) with LoRA on its projections, as one operator: schema, checks, fake, autograd.

The mathematics stands in :mod:`aletheia_kernels.reference.gated_mlp`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aletheia_kernels.autocast import outside_autocast
from aletheia_kernels.backends import implementation
from aletheia_kernels.dtypes import accumulation_dtype
from aletheia_kernels.eager import eager_function, is_eager
from aletheia_kernels.lora import (
    Weight,
    check_counts,
    check_projections,
    held_weights,
    made_weights,
    weights_again,
)
from aletheia_kernels.rows import rows_of

ACTIVATIONS = ("silu", "gelu_tanh")


def _check_three(weights, biases, lora_As, lora_Bs, scalings):
    check_counts(weights, biases, lora_As, lora_Bs, scalings)
    if len(weights) != 3:
        raise RuntimeError(f"weights: expected gate, up and down, got {len(weights)}")


def _check(x, weights, biases, lora_As, lora_Bs, scalings, activation):
    _check_three(weights, biases, lora_As, lora_Bs, scalings)
    if activation not in ACTIVATIONS:
        raise RuntimeError(f"activation: expected {' or '.join(ACTIVATIONS)}, got {activation}")
    check_projections(x, weights[:2], biases[:2], lora_As[:2], lora_Bs[:2], scalings[:2])
    if weights[0].shape != weights[1].shape:
        raise RuntimeError(
            f"weights: gate is {tuple(weights[0].shape)}, up is {tuple(weights[1].shape)}; expected one shape"
        )
    # What down reads has up's shape; x's storage stands in for it, since only its shape and dtype are looked at.
    middle = x.new_empty(0, weights[1].shape[0])
    check_projections(middle, weights[2:], biases[2:], lora_As[2:], lora_Bs[2:], scalings[2:], first=2)


def _forward(x, weights, biases, lora_As, lora_Bs, scalings, activation):
    _check(x, weights, biases, lora_As, lora_Bs, scalings, activation)
    backend = implementation("lora_gated_mlp", x.device, x.dtype)
    with outside_autocast(x):
        return backend.lora_gated_mlp_forward(x, weights, biases, lora_As, lora_Bs, scalings, activation)


_lora_gated_mlp = torch.library.custom_op(
    "aletheia::lora_gated_mlp",
    _forward,
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs, float[] scalings,"
        " str activation) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
)


@_lora_gated_mlp.register_fake
def _(x, weights, biases, lora_As, lora_Bs, scalings, activation):
    _check(x, weights, biases, lora_As, lora_Bs, scalings, activation)
    tokens = x.shape[0]
    y, gate, up = (x.new_empty(tokens, weights[i].shape[0]) for i in (2, 0, 1))
    ranks = sum(lora_A.shape[0] for lora_A in lora_As)
    return y, gate, up, x.new_empty(tokens, ranks, dtype=accumulation_dtype(x.dtype))


def _backward(dy, x, gate, up, h, weights, lora_As, lora_Bs, scalings, activation, needs_dx):
    backend = implementation("lora_gated_mlp", x.device, x.dtype)
    with outside_autocast(x):
        return backend.lora_gated_mlp_backward(
            dy, x, gate, up, h, weights, lora_As, lora_Bs, scalings, activation, needs_dx
        )


_lora_gated_mlp_backward = torch.library.custom_op(
    "aletheia::lora_gated_mlp_backward",
    _backward,
    mutates_args=(),
    schema=(
        "(Tensor dy, Tensor x, Tensor gate, Tensor up, Tensor h, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs,"
        " float[] scalings, str activation, bool needs_dx) -> (Tensor, Tensor[], Tensor[])"
    ),
)


@_lora_gated_mlp_backward.register_fake
def _(dy, x, gate, up, h, weights, lora_As, lora_Bs, scalings, activation, needs_dx):
    dx = x.new_empty(x.shape if needs_dx else (0,))
    return dx, [a.new_empty(a.shape) for a in lora_As], [b.new_empty(b.shape) for b in lora_Bs]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weights, biases, lora_As, lora_Bs, ctx.scalings, ctx.activation = inputs
    _y, gate, up, h = output
    saved, ctx.makers = held_weights(weights)
    ctx.save_for_backward(x, gate, up, h, *saved, *lora_As, *lora_Bs)
    ctx.set_materialize_grads(False)
    # torch.library wants a list of gradients for a list of tensors, but one gradient for a list that holds a None.
    ctx.no_dbias = None if any(b is None for b in biases) else [None] * 3


def _gradients(
    ctx: Any, backward: Any, dy: Tensor | None
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    x, gate, up, h, *rest = ctx.saved_tensors
    needs_dx, weights = ctx.needs_input_grad[0], weights_again(rest[:3], ctx.makers)
    if dy is None:
        dy = x.new_zeros(x.shape[0], weights[2].shape[0])
    dx, dAs, dBs = backward(
        dy, x, gate, up, h, weights, rest[3:6], rest[6:], ctx.scalings, ctx.activation, needs_dx
    )
    return dx if needs_dx else None, dAs, dBs


def _traced_gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple:
    dx, dAs, dBs = _gradients(ctx, _lora_gated_mlp_backward, dy)
    return dx, [None] * 3, ctx.no_dbias, dAs, dBs, None, None


_lora_gated_mlp.register_autograd(_traced_gradients, setup_context=_setup_context)


# Autograd's own functions take no lists: x, then what is no tensor, then the four lists end to end.
def _listed(x, scalings, activation, *tensors):
    return x, *(list(tensors[i : i + 3]) for i in (0, 3, 6, 9)), scalings, activation


def _flat_forward(*flat: Any) -> tuple[Tensor, ...]:
    x, weights, *rest = _listed(*flat)
    return tuple(_forward(x, made_weights(weights), *rest))


def _flat_setup_context(ctx: Any, flat: tuple, output: tuple) -> None:
    _setup_context(ctx, _listed(*flat), output)


def _flat_gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple:
    dx, dAs, dBs = _gradients(ctx, _backward, dy)
    return dx, None, None, *[None] * 6, *dAs, *dBs


_eager = eager_function(_flat_forward, _flat_setup_context, _flat_gradients)


def lora_gated_mlp(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    activation: str = "silu",
) -> Tensor:
    """y = d(act(g(x)) ⊙ u(x)) for LoRA projections g, u and d, the activations between them never kept.

    Backward keeps x, g(x), u(x) and the low-rank projections, and computes the product again. A projection without an
    adapter has rank 0: ``lora_A`` [0, in] and ``lora_B`` [out, 0].

    Args:
        x: [..., in], floating.
        weights: of gate [width, in], up [width, in] and down [out, width], in x's dtype, frozen; or functions that make
            them, as :func:`aletheia_kernels.lora_group` takes them.
        biases: of each [out_i] in x's dtype, frozen, or None.
        lora_As: of each [r_i, in_i], x's dtype or wider; rounded to x's dtype, or as they
            are where the processor multiplies in float32 for want of that dtype's products.
        lora_Bs: of each [out_i, r_i], likewise.
        scalings: of each s_i.
        activation: "silu" (SwiGLU) or "gelu_tanh" (GeGLU with the tanh approximation).

    Returns:
        [..., out] in x's dtype. Gradients flow to x, lora_As and lora_Bs, the adapters' in their own dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or a weight or bias that requires a gradient.
        BackendError: ``ALETHEIA_BACKEND`` asks for a backend that cannot serve.
    """
    given = [weight for weight in weights if isinstance(weight, Tensor)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*given, *biases)):
        raise RuntimeError(
            "weights and biases: expected frozen ones; lora_gated_mlp computes no gradient for them"
        )
    flat = rows_of("x", x)
    if is_eager(x, *given, *lora_As, *lora_Bs):
        _check_three(weights, biases, lora_As, lora_Bs, scalings)
        y = _eager(flat, list(scalings), activation, *weights, *biases, *lora_As, *lora_Bs)[0]
    else:
        y = _lora_gated_mlp(
            flat,
            made_weights(weights),
            list(biases),
            list(lora_As),
            list(lora_Bs),
            list(scalings),
            activation,
        )[0]
    return y.view(*x.shape[:-1], y.shape[-1])
