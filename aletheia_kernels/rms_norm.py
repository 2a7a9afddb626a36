"""Root mean square normalisation: schema, checks, fake, autograd.

The mathematics stands in :mod:`aletheia_kernels.reference.rms_norm`.
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


def _check(x: Tensor, weight: Tensor) -> None:
    torch._check(
        x.dim() > 0 and weight.dim() == 1 and x.shape[-1] == weight.shape[0],
        lambda: (
            f"expected x [..., features] and weight [features], got {tuple(x.shape)}, {tuple(weight.shape)}"
        ),
    )
    torch._check(
        x.dtype == weight.dtype and x.is_floating_point(),
        lambda: f"expected one floating dtype, got x {x.dtype}, weight {weight.dtype}",
    )
    torch._check(
        x.device == weight.device,
        lambda: f"expected one device, got x on {x.device}, weight on {weight.device}",
    )


def _forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool
) -> tuple[Tensor, Tensor]:
    _check(x, weight)
    backend = implementation("rms_norm", x.device, x.dtype)
    with outside_autocast(x):
        return backend.rms_norm_forward(x, weight, eps, offset, rounds_first)


_rms_norm = torch.library.custom_op("aletheia::rms_norm", _forward, mutates_args=())


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> tuple[Tensor, Tensor]:
    _check(x, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x.dtype))


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    backend = implementation("rms_norm", x.device, x.dtype)
    with outside_autocast(x):
        return backend.rms_norm_backward(dy, x, weight, rstd, offset, needs_dx, needs_dweight)


_rms_norm_backward = torch.library.custom_op("aletheia::rms_norm_backward", _backward, mutates_args=())


@_rms_norm_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs_dx else (0,)), weight.new_empty(
        weight.shape if needs_dweight else (0,)
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, _eps, ctx.offset, _rounds_first = inputs
    _y, rstd = output
    ctx.save_for_backward(x, weight, rstd)


def _gradients(backward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple]:
    def gradients(ctx: Any, dy: Tensor, _drstd: Tensor) -> tuple:
        needs_dx, needs_dweight = ctx.needs_input_grad[:2]
        dx, dweight = backward(dy, *ctx.saved_tensors, ctx.offset, needs_dx, needs_dweight)
        return dx if needs_dx else None, dweight if needs_dweight else None, None, None, None

    return gradients


_rms_norm.register_autograd(_gradients(_rms_norm_backward), setup_context=_setup_context)
_eager = eager_function(_forward, _setup_context, _gradients(_backward))


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0, rounds_first: bool = True
) -> Tensor:
    """x / √(mean(x²) + ε) ⊙ (offset + weight) over the last dimension.

    Args:
        x: [..., features], floating.
        weight: [features] in x's dtype.
        eps: ε, added to the mean of squares.
        offset: added to the weight: 0, or 1 for a weight that is stored less one.
        rounds_first: whether the normalised x is rounded to x's dtype before the weight scales it, as Llama does, or
            only the product, as Gemma does. Sums and products are float32 (float64 for float64 x) in either case.

    Returns:
        [..., features] in x's dtype, contiguous. Gradients flow to x and weight; kept for them are x and one float32
        a row.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        BackendError: ``ALETHEIA_BACKEND`` asks for a backend that cannot serve.
    """
    call = _eager if is_eager(x, weight) else _rms_norm
    return call(x, weight, eps, offset, rounds_first)[0]
