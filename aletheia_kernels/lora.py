"""Variable-rank LoRA over a group of projections that share their input: schema, checks, fake, autograd.

The mathematics stands in :mod:`aletheia_kernels.reference.lora`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aletheia_kernels.autocast import outside_autocast
from aletheia_kernels.backends import implementation
from aletheia_kernels.dtypes import accumulation_dtype
from aletheia_kernels.eager import eager_function, is_eager
from aletheia_kernels.rows import rows_of

Weight = Tensor | Callable[[], Tensor]


def made_weights(weights: Sequence[Weight]) -> list[Tensor]:
    """The weights as tensors: those that are given as a function are made."""
    return [weight if isinstance(weight, Tensor) else weight() for weight in weights]


def held_weights(weights: Sequence[Weight]) -> tuple[list[Tensor | None], list[Weight | None]]:
    """What of the weights autograd saves, and what makes the rest again."""
    return (
        [weight if isinstance(weight, Tensor) else None for weight in weights],
        [None if isinstance(weight, Tensor) else weight for weight in weights],
    )


def weights_again(saved: Sequence[Tensor | None], makers: Sequence[Weight | None]) -> list[Tensor]:
    """The weights for the backward pass, from what :func:`held_weights` gave."""
    return made_weights(
        [s if m is None else m for s, m in zip(saved, makers, strict=True)]  # type: ignore[misc]
    )


# Plain comparisons: torch._check costs a microsecond each, and an eager call has some twenty.
def check_counts(
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
) -> None:
    """Raises RuntimeError, saying expected against given, unless every projection has its parts."""
    if not weights:
        raise RuntimeError("weights: expected at least one projection")
    if not len(weights) == len(biases) == len(lora_As) == len(lora_Bs) == len(scalings):
        raise RuntimeError(
            f"expected one weight, bias, A, B and scaling a projection, got {len(weights)}, {len(biases)}, "
            f"{len(lora_As)}, {len(lora_Bs)} and {len(scalings)}"
        )


def _check_bias(i: int, bias: Tensor, out: int, dtype: torch.dtype) -> None:
    if bias.shape != (out,) or bias.dtype != dtype:
        raise RuntimeError(f"biases[{i}]: expected [{out}] {dtype}, got {tuple(bias.shape)} {bias.dtype}")


def check_projections(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    first: int = 0,
) -> None:
    """Raises RuntimeError, saying expected against given, unless these are LoRA projections of x [tokens, in].

    Messages count projections from ``first``.
    """
    if x.dim() != 2:
        raise RuntimeError(f"x: expected [tokens, in], got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise RuntimeError(f"x: expected a floating dtype, got {x.dtype}")
    check_counts(weights, biases, lora_As, lora_Bs, scalings)
    inner, dtype, device = x.shape[1], x.dtype, x.device
    for i, (weight, bias, lora_A, lora_B) in enumerate(
        zip(weights, biases, lora_As, lora_Bs, strict=True), start=first
    ):
        if weight.dim() != 2 or weight.shape[1] != inner:
            raise RuntimeError(f"weights[{i}]: expected [out, {inner}], got {tuple(weight.shape)}")
        if weight.dtype != dtype:
            raise RuntimeError(f"weights[{i}]: expected x's dtype {dtype}, got {weight.dtype}")
        out = weight.shape[0]
        if bias is not None:
            _check_bias(i, bias, out, dtype)
        if lora_A.dim() != 2 or lora_A.shape[1] != inner:
            raise RuntimeError(f"lora_As[{i}]: expected [rank, {inner}], got {tuple(lora_A.shape)}")
        if lora_B.shape != (out, lora_A.shape[0]):
            raise RuntimeError(f"lora_Bs[{i}]: expected {(out, lora_A.shape[0])}, got {tuple(lora_B.shape)}")
        for tensor in (weight, bias, lora_A, lora_B):
            if tensor is not None and tensor.device != device:
                raise RuntimeError(
                    f"projection {i}: expected tensors on {device}, got one on {tensor.device}"
                )


def _check(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed):
    check_projections(x, weights, biases, lora_As, lora_Bs, scalings)
    if not 0.0 <= dropout_p < 1.0:
        raise RuntimeError(f"dropout_p: expected 0 <= p < 1, got {dropout_p}")
    if dropout_p > 0.0 and seed is None:
        raise RuntimeError("seed: dropout needs an int64 seed of one element")
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1):
        raise RuntimeError(f"seed: expected int64 of one element, got {seed.dtype} {tuple(seed.shape)}")


def _forward(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed):
    _check(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed)
    backend = implementation("lora_group", x.device, x.dtype)
    with outside_autocast(x):
        return backend.lora_group_forward(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed)


_lora_group = torch.library.custom_op(
    "aletheia::lora_group",
    _forward,
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs, float[] scalings,"
        " float dropout_p, Tensor? seed) -> (Tensor[], Tensor)"
    ),
)


@_lora_group.register_fake
def _(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed):
    _check(x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed)
    tokens = x.shape[0]
    ys = [x.new_empty(tokens, weight.shape[0]) for weight in weights]
    wide = accumulation_dtype(x.dtype)
    return ys, x.new_empty(tokens, sum(a.shape[0] for a in lora_As), dtype=wide)


def _backward(dys, x, h, weights, lora_As, lora_Bs, scalings, dropout_p, seed, needs_dx):
    backend = implementation("lora_group", x.device, x.dtype)
    with outside_autocast(x):
        return backend.lora_group_backward(
            dys, x, h, weights, lora_As, lora_Bs, scalings, dropout_p, seed, needs_dx
        )


_lora_group_backward = torch.library.custom_op(
    "aletheia::lora_group_backward",
    _backward,
    mutates_args=(),
    schema=(
        "(Tensor[] dys, Tensor x, Tensor h, Tensor[] weights, Tensor[] lora_As, Tensor[] lora_Bs, float[] scalings,"
        " float dropout_p, Tensor? seed, bool needs_dx) -> (Tensor, Tensor[], Tensor[])"
    ),
)


@_lora_group_backward.register_fake
def _(dys, x, h, weights, lora_As, lora_Bs, scalings, dropout_p, seed, needs_dx):
    dx = x.new_empty(x.shape if needs_dx else (0,))
    return dx, [a.new_empty(a.shape) for a in lora_As], [b.new_empty(b.shape) for b in lora_Bs]


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed = inputs
    _ys, h = output
    saved, ctx.makers = held_weights(weights)
    ctx.save_for_backward(x, h, seed, *saved, *lora_As, *lora_Bs)
    ctx.count = len(weights)
    ctx.scalings = scalings
    ctx.dropout_p = dropout_p
    ctx.set_materialize_grads(False)
    # torch.library wants a list of gradients for a list of tensors, but one gradient for a list that holds a None.
    ctx.no_dbias = None if any(b is None for b in biases) else [None] * len(biases)


def _gradients(
    ctx: Any, backward: Any, dys: Sequence[Tensor | None]
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    x, h, seed, *rest = ctx.saved_tensors
    n, needs_dx = ctx.count, ctx.needs_input_grad[0]
    weights, lora_As, lora_Bs = weights_again(rest[:n], ctx.makers), rest[n : 2 * n], rest[2 * n :]
    dys = [
        x.new_zeros(x.shape[0], weight.shape[0]) if dy is None else dy
        for dy, weight in zip(dys, weights, strict=True)
    ]
    dx, dAs, dBs = backward(dys, x, h, weights, lora_As, lora_Bs, ctx.scalings, ctx.dropout_p, seed, needs_dx)
    return dx if needs_dx else None, dAs, dBs


def _traced_gradients(ctx: Any, dys: list[Tensor | None], _dh: Tensor | None) -> tuple:
    dx, dAs, dBs = _gradients(ctx, _lora_group_backward, dys)
    return dx, [None] * ctx.count, ctx.no_dbias, dAs, dBs, None, None, None


_lora_group.register_autograd(_traced_gradients, setup_context=_setup_context)


# Autograd's own functions take no lists: x, then what is no tensor, then the four lists end to end.
def _listed(x, scalings, dropout_p, seed, *tensors):
    n = len(scalings)
    lists = [list(tensors[i * n : (i + 1) * n]) for i in range(4)]
    return x, *lists, scalings, dropout_p, seed


def _flat_forward(*flat: Any) -> tuple[Tensor, ...]:
    x, weights, *rest = _listed(*flat)
    ys, h = _forward(x, made_weights(weights), *rest)
    return *ys, h


def _flat_setup_context(ctx: Any, flat: tuple, output: tuple) -> None:
    _setup_context(ctx, _listed(*flat), (output[:-1], output[-1]))


def _flat_gradients(ctx: Any, *grads: Tensor | None) -> tuple:
    dx, dAs, dBs = _gradients(ctx, _backward, grads[:-1])
    return dx, None, None, None, *[None] * (2 * ctx.count), *dAs, *dBs


_eager = eager_function(_flat_forward, _flat_setup_context, _flat_gradients)


def lora_group(
    x: Tensor,
    weights: Sequence[Weight],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> list[Tensor]:
    """y_i = x W_iᵀ + b_i + s_i (dropout(x) A_iᵀ) B_iᵀ for every projection i of one input.

    Ranks may differ from projection to projection; each costs what it is. One dropout mask serves the group: every
    projection sees the dropout distribution of its own, but siblings see the same draw.

    Args:
        x: [..., in], floating.
        weights: per projection [out_i, in] in x's dtype, frozen; or a function that makes it, called in the forward
            and in eager mode again in the backward pass, so that nothing of what it makes is kept; where the call is
            traced, once.
        biases: per projection [out_i] in x's dtype, or None.
        lora_As: per projection [r_i, in], x's dtype or wider; rounded to x's dtype, or as they
            are where the processor multiplies in float32 for want of that dtype's products.
        lora_Bs: per projection [out_i, r_i], likewise.
        scalings: per projection s_i (alpha / r, or alpha / √r for rsLoRA).
        dropout_p: 0 ≤ p < 1.
        seed: int64 of one element on x's device; needed when dropout_p > 0. The same seed gives the same mask.

    Returns:
        The outputs [..., out_i], in x's dtype. Gradients flow to x, lora_As, lora_Bs and biases, the adapters' in
        their own dtype.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit (the message says expected against given), or a weight
            that requires a gradient.
        BackendError: ``ALETHEIA_BACKEND`` asks for a backend that cannot serve.
    """
    given = [weight for weight in weights if isinstance(weight, Tensor)]
    if torch.is_grad_enabled() and any(w.requires_grad for w in given):
        raise RuntimeError("weights: expected frozen weights; lora_group computes no gradient for them")
    # A trained bias is added outside, where autograd knows its gradient; a frozen one rides in the base product.
    trained = [b is not None and b.requires_grad for b in biases]
    frozen_biases = [None if train else b for train, b in zip(trained, biases, strict=True)]
    flat = rows_of("x", x)
    seed = seed if dropout_p > 0.0 else None
    if is_eager(x, *given, *lora_As, *lora_Bs):
        check_counts(weights, biases, lora_As, lora_Bs, scalings)
        ys = _eager(flat, list(scalings), dropout_p, seed, *weights, *frozen_biases, *lora_As, *lora_Bs)[:-1]
    else:
        ys, _ = _lora_group(
            flat,
            made_weights(weights),
            frozen_biases,
            list(lora_As),
            list(lora_Bs),
            list(scalings),
            dropout_p,
            seed,
        )
    outputs = []
    for i, (y, bias, train) in enumerate(zip(ys, biases, trained, strict=True)):
        if train and bias is not None:
            _check_bias(i, bias, y.shape[-1], y.dtype)
            y = y + bias
        outputs.append(y.view(*x.shape[:-1], y.shape[-1]))
    return outputs
