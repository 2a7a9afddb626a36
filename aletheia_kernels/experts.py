"""One LoRA projection of every expert of a mixture, over tokens sorted by expert: schema, checks, fake, autograd.

The mathematics stands in :mod:`aletheia_kernels.reference.experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aletheia_kernels.autocast import outside_autocast
from aletheia_kernels.backends import implementation
from aletheia_kernels.eager import eager_function, is_eager


def _check(x, weight, lora_A, lora_B, scalings, offs, ranks):
    torch._check(x.dim() == 2, lambda: f"x: expected [tokens, in], got {tuple(x.shape)}")
    torch._check(x.is_floating_point(), lambda: f"x: expected a floating dtype, got {x.dtype}")
    torch._check(
        weight.dim() == 3 and weight.shape[2] == x.shape[1] and weight.shape[0] > 0,
        lambda: f"weight: expected [experts, out, {x.shape[1]}], got {tuple(weight.shape)}",
    )
    torch._check(weight.dtype == x.dtype, lambda: f"weight: expected x's dtype {x.dtype}, got {weight.dtype}")
    experts = weight.shape[0]
    torch._check(
        lora_A.dim() == 3 and lora_A.shape[0] == experts and lora_A.shape[2] == x.shape[1],
        lambda: f"lora_A: expected [{experts}, rank, {x.shape[1]}], got {tuple(lora_A.shape)}",
    )
    torch._check(
        lora_B.shape == (experts, weight.shape[1], lora_A.shape[1]),
        lambda: f"lora_B: expected {(experts, weight.shape[1], lora_A.shape[1])}, got {tuple(lora_B.shape)}",
    )
    for name, tensor, dtype in (
        ("scalings", scalings, torch.float32),
        ("offs", offs, torch.int32),
        ("ranks", ranks, torch.int32),
    ):
        torch._check(
            tensor is None or (tensor.shape == (experts,) and tensor.dtype == dtype),
            lambda n=name, t=tensor, d=dtype: (
                f"{n}: expected [{experts}] {d}, got {tuple(t.shape)} {t.dtype}"
            ),
        )
    for tensor in (weight, lora_A, lora_B, scalings, offs, ranks):
        torch._check(
            tensor is None or tensor.device == x.device,
            lambda t=tensor: f"expected tensors on {x.device}, got one on {t.device}",
        )


def _forward(x, weight, lora_A, lora_B, scalings, offs, ranks):
    _check(x, weight, lora_A, lora_B, scalings, offs, ranks)
    backend = implementation("lora_experts", x.device, x.dtype)
    with outside_autocast(x):
        return backend.lora_experts_forward(x, weight, lora_A, lora_B, scalings, offs, ranks)


_lora_experts = torch.library.custom_op(
    "aletheia::lora_experts",
    _forward,
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scalings, Tensor offs, Tensor? ranks)"
        " -> (Tensor, Tensor)"
    ),
)


@_lora_experts.register_fake
def _(x, weight, lora_A, lora_B, scalings, offs, ranks):
    _check(x, weight, lora_A, lora_B, scalings, offs, ranks)
    return x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], lora_A.shape[1])


def _backward(dy, x, h, weight, lora_A, lora_B, scalings, offs, ranks, needs_dx):
    backend = implementation("lora_experts", x.device, x.dtype)
    with outside_autocast(x):
        return backend.lora_experts_backward(
            dy, x, h, weight, lora_A, lora_B, scalings, offs, ranks, needs_dx
        )


_lora_experts_backward = torch.library.custom_op(
    "aletheia::lora_experts_backward",
    _backward,
    mutates_args=(),
    schema=(
        "(Tensor dy, Tensor x, Tensor h, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scalings, Tensor offs,"
        " Tensor? ranks, bool needs_dx) -> (Tensor, Tensor, Tensor)"
    ),
)


@_lora_experts_backward.register_fake
def _(dy, x, h, weight, lora_A, lora_B, scalings, offs, ranks, needs_dx):
    dx = x.new_empty(x.shape if needs_dx else (0,))
    return dx, torch.empty_like(lora_A), torch.empty_like(lora_B)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, lora_A, lora_B, scalings, offs, ranks = inputs
    ctx.save_for_backward(x, output[1], weight, lora_A, lora_B, scalings, offs, ranks)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, backward: Any, dy: Tensor | None) -> tuple:
    x, h, weight, *rest = ctx.saved_tensors
    needs_dx = ctx.needs_input_grad[0]
    dy = x.new_zeros(x.shape[0], weight.shape[1]) if dy is None else dy
    dx, dA, dB = backward(dy, x, h, weight, *rest, needs_dx)
    return dx if needs_dx else None, None, dA, dB, None, None, None


def _traced_gradients(ctx: Any, dy: Tensor | None, _dh: Tensor | None) -> tuple:
    return _gradients(ctx, _lora_experts_backward, dy)


def _eager_gradients(ctx: Any, dy: Tensor | None, _dh: Tensor | None) -> tuple:
    return _gradients(ctx, _backward, dy)


_lora_experts.register_autograd(_traced_gradients, setup_context=_setup_context)
_eager = eager_function(_forward, _setup_context, _eager_gradients)


def lora_experts(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    offs: Tensor,
    ranks: Tensor | None = None,
) -> Tensor:
    """y_e = x_e W_eᵀ + s_e (x_e A_eᵀ) B_eᵀ for the rows x_e of every expert e.

    The factors of PEFT's ``target_parameters`` are views of this shape, and need no copy:
    ``lora_A.weight.view(experts, r, in)`` and ``lora_B.weight.view(out, r, experts).permute(2, 0, 1)``.

    Args:
        x: [tokens, in], floating, rows sorted by expert. Rows from ``offs[-1]`` on belong to no expert.
        weight: [experts, out, in] in x's dtype, frozen, of any strides.
        lora_A: [experts, rank, in], x's dtype or wider, of any strides; rounded to x's dtype for the products.
        lora_B: [experts, out, rank], likewise.
        scalings: [experts] float32, s_e.
        offs: [experts] int32, the row at which each expert's end, as ``torch.nn.functional.grouped_mm`` takes it.
            It stays on the device: no launch waits for its values, which a card therefore does not check.
        ranks: [experts] int32, each expert's rank, at most ``rank``; what the factors hold beyond is not read.
            None: all have the full rank.

    Returns:
        y [tokens, out] in x's dtype, zero in rows of no expert. Gradients flow to x, lora_A and lora_B, the adapters'
        in their own dtype and strides.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit (the message says expected against given), a weight
            that requires a gradient, or, on a processor, ``offs`` that fall or point outside the tokens.
        BackendError: ``ALETHEIA_BACKEND`` asks for a backend that cannot serve.
    """
    torch._check(
        not weight.requires_grad or not torch.is_grad_enabled(),
        lambda: "weight: expected frozen weights; lora_experts computes no gradient for them",
    )
    operator = _eager if is_eager(x, weight, lora_A, lora_B) else _lora_experts
    return operator(x, weight, lora_A, lora_B, scalings, offs, ranks)[0]
