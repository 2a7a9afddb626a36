"""Rotary position embedding of queries and keys: schema, checks, fake, autograd.

The mathematics stands in :mod:`aletheia_kernels.reference.rotary`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aletheia_kernels.autocast import outside_autocast
from aletheia_kernels.backends import implementation
from aletheia_kernels.dtypes import accumulation_dtype
from aletheia_kernels.eager import eager_function, is_eager


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    torch._check(
        q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:],
        lambda: (
            "expected q [batch, heads, tokens, dim] and k [batch, key heads, tokens, dim], got "
            f"{tuple(q.shape)}, {tuple(k.shape)}"
        ),
    )
    torch._check(
        cos.dim() == 3
        and cos.shape == sin.shape
        and (cos.shape[0] == q.shape[0] or cos.shape[0] == 1)
        and cos.shape[1] == q.shape[2],
        lambda: (
            f"expected cos and sin [{q.shape[0]} or 1, {q.shape[2]}, rotated], got "
            f"{tuple(cos.shape)}, {tuple(sin.shape)}"
        ),
    )
    torch._check(
        cos.shape[2] % 2 == 0 and cos.shape[2] <= q.shape[3],
        lambda: f"expected an even number of rotated features, {q.shape[3]} at most, got {cos.shape[2]}",
    )
    torch._check(
        q.dtype == k.dtype and q.is_floating_point(),
        lambda: f"expected q and k of one floating dtype, got {q.dtype}, {k.dtype}",
    )
    torch._check(
        cos.dtype == sin.dtype and cos.dtype in (q.dtype, accumulation_dtype(q.dtype)),
        lambda: f"expected cos and sin in {q.dtype} or its sums' dtype, got {cos.dtype}, {sin.dtype}",
    )
    torch._check(
        q.device == k.device == cos.device == sin.device,
        lambda: f"expected one device, got {q.device}, {k.device}, {cos.device}, {sin.device}",
    )


def _forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin)
    backend = implementation("rotary", q.device, q.dtype)
    with outside_autocast(q):
        return backend.rotary_forward(q, k, cos, sin)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    _check(q, k, cos, sin)

    def heads_last(x: Tensor) -> Tensor:
        batch, heads, tokens, dim = x.shape
        return x.new_empty(batch, tokens, heads, dim).transpose(1, 2)

    return heads_last(q), heads_last(k)


def _backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    backend = implementation("rotary", dq.device, dq.dtype)
    with outside_autocast(dq):
        return backend.rotary_backward(dq, dk, cos, sin)


_rotary = torch.library.custom_op("aletheia::rotary", _forward, mutates_args=())
_rotary.register_fake(_fake)
_rotary_backward = torch.library.custom_op("aletheia::rotary_backward", _backward, mutates_args=())
_rotary_backward.register_fake(_fake)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _q, _k, cos, sin = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(backward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple]:
    def gradients(ctx: Any, dq: Tensor, dk: Tensor) -> tuple:
        return *backward(dq, dk, *ctx.saved_tensors), None, None

    return gradients


_rotary.register_autograd(_gradients(_rotary_backward), setup_context=_setup_context)
_eager = eager_function(_forward, _setup_context, _gradients(_backward))


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """x ⊙ cos + (-x₂, x₁) ⊙ sin of q and k, x₁ and x₂ the halves of a head's first ``rotated`` features.

    Args:
        q: [batch, heads, tokens, dim], floating, of any strides.
        k: [batch, key heads, tokens, dim], likewise, in q's dtype.
        cos: [batch or 1, tokens, rotated], q's dtype or float32; rotated is even and at most dim, the features after
            it stay as they are.
        sin: of cos's shape and dtype.

    Returns:
        q and k turned, in their dtype (float32 inside, one rounding), their memory ordered [batch, tokens, heads, dim].
        Gradients flow to q and k.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or cos or sin that require a gradient.
        BackendError: ``ALETHEIA_BACKEND`` asks for a backend that cannot serve.
    """
    torch._check(
        not (cos.requires_grad or sin.requires_grad) or not torch.is_grad_enabled(),
        lambda: "cos, sin: expected constants; rotary computes no gradient for them",
    )
    call = _eager if is_eager(q, k, cos, sin) else _rotary
    return call(q, k, cos, sin)
