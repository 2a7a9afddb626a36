"""Attention over one contiguous range of keys a query: schema, checks, fake, autograd.

The mathematics stands in :mod:`aletheia_kernels.reference.attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aletheia_kernels.autocast import outside_autocast
from aletheia_kernels.backends import implementation
from aletheia_kernels.dtypes import accumulation_dtype


def _check(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> None:
    torch._check(
        q.dim() == k.dim() == 4 and k.shape == v.shape,
        lambda: (
            "expected q [batch, heads, queries, dim] and k, v [batch, key heads, keys, dim], got "
            f"{tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        ),
    )
    torch._check(
        q.shape[0] == k.shape[0]
        and q.shape[3] == k.shape[3]
        and k.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0,
        lambda: (
            f"expected one batch and dim and heads a multiple of key heads, got {tuple(q.shape)}, {tuple(k.shape)}"
        ),
    )
    torch._check(
        q.dtype == k.dtype == v.dtype and q.is_floating_point(),
        lambda: f"expected one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}",
    )
    for name, bound in (("first", first), ("last", last)):
        torch._check(
            bound.shape == (q.shape[0], q.shape[2]) and bound.dtype == torch.int32,
            lambda name=name, bound=bound: (
                f"{name}: expected int32 [{q.shape[0]}, {q.shape[2]}], got {bound.dtype} {tuple(bound.shape)}"
            ),
        )


@torch.library.custom_op("aletheia::range_attention", mutates_args=())
def _attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, first, last)
    if first.numel() and (int(first.min()) < 0 or int(last.max()) > k.shape[2]):
        raise RuntimeError(
            f"expected ranges within [0, {k.shape[2]}], got [{int(first.min())}, {int(last.max())})"
        )
    with outside_autocast(q):
        backend = implementation("range_attention", q.device, q.dtype)
        return backend.attention_forward(q, k, v, first.contiguous(), last.contiguous(), scale)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    _check(q, k, v, first, last)
    batch, heads, queries, dim = q.shape
    wide = accumulation_dtype(q.dtype)
    o = q.new_empty(batch, queries, heads, dim).transpose(1, 2)
    return o, q.new_empty(batch, heads, queries, dtype=wide)


@torch.library.custom_op("aletheia::range_attention_backward", mutates_args=())
def _attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    with outside_autocast(q):
        backend = implementation("range_attention", q.device, q.dtype)
        return backend.attention_backward(grad_o, q, k, v, lse, first.contiguous(), last.contiguous(), scale)


@_attention_backward.register_fake
def _(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, first, last, scale = inputs
    _o, lse = output
    ctx.save_for_backward(q, k, v, lse, first, last)
    ctx.scale = scale


def _backward(ctx: Any, grad_o: Tensor, _grad_lse: Tensor) -> tuple:
    q, k, v, lse, first, last = ctx.saved_tensors
    dq, dk, dv = _attention_backward(grad_o, q, k, v, lse, first, last, ctx.scale)
    return dq, dk, dv, None, None, None


_attention.register_autograd(_backward, setup_context=_setup_context)


def range_attention(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, *, scale: float | None = None
) -> Tensor:
    """softmax(scale · q Kᵀ over the keys first_t ≤ j < last_t) V: causal, sliding-window, padded and packed batches.

    Args:
        q: [batch, heads, queries, dim], floating.
        k: [batch, key heads, keys, dim], q's dtype; heads is a multiple of key heads.
        v: of k's shape and dtype.
        first: [batch, queries] int32, from 0 to keys: the first key that a query sees.
        last: likewise, the key after the last one; a range that is empty gives zeros.
        scale: of the scores; 1/√dim by default.

    Returns:
        [batch, heads, queries, dim] in q's dtype, its memory ordered [batch, queries, heads, dim]. Gradients flow to q,
        k and v.

    Raises:
        RuntimeError: shapes, dtypes or ranges that do not fit.
        BackendError: ``ALETHEIA_BACKEND`` asks for a backend that cannot serve.
    """
    o, _ = _attention(q, k, v, first, last, q.shape[-1:].numel() ** -0.5 if scale is None else scale)
    return o
