"""Gated MLP with LoRA on its three projections.

Forward, with frozen W_g, W_u [width, in], W_d [out, width], trained A and B of each (rank 0: none), act = silu (SwiGLU)
or tanh-approximated gelu (GeGLU):

    gate = lora_g(x),   up = lora_u(x),   y = lora_d(act(gate) ⊙ up)

(Shazeer, "GLU Variants Improve Transformer", 2020.) Kept for backward: x, gate, up and the tiny h = [x A_gᵀ, x A_uᵀ,
(act(gate) ⊙ up) A_dᵀ]; the product is computed again. Backward, from dy, with dp the input gradient of lora_d:

    dgate = dp ⊙ up ⊙ act'(gate),   dup = dp ⊙ act(gate)

and dx, dA, dB as in :mod:`aletheia_kernels.reference.lora`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from aletheia_kernels.reference.lora import lora_group_backward, lora_group_forward

GroupForward = Callable[..., tuple[list[Tensor], Tensor]]
GroupBackward = Callable[..., tuple[Tensor, list[Tensor], list[Tensor]]]


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh")


def _product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return _activate(gate, activation) * up


def _gradients(dproduct: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dactive = dproduct * up
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(dactive, gate)
    else:
        dgate = torch.ops.aten.gelu_backward(dactive, gate, approximate="tanh")
    return dgate, dproduct * _activate(gate, activation)


def forward_of(
    group: GroupForward,
    product: Callable[[Tensor, Tensor, str], Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass from a backend's ``lora_group_forward`` and its act(gate) ⊙ up."""
    (gate, up), h_in = group(x, weights[:2], biases[:2], lora_As[:2], lora_Bs[:2], scalings[:2], 0.0, None)
    (y,), h_mid = group(
        product(gate, up, activation),
        weights[2:],
        biases[2:],
        lora_As[2:],
        lora_Bs[2:],
        scalings[2:],
        0.0,
        None,
    )
    return y, gate, up, torch.cat([h_in, h_mid], dim=1)


def backward_of(
    group: GroupBackward,
    product: Callable[[Tensor, Tensor, str], Tensor],
    gradients: Callable[[Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor]],
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    h: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    activation: str,
    needs_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The backward pass from a backend's ``lora_group_backward``, its product, and its dgate and dup.

    ``gradients`` is given dproduct to keep: nobody reads it afterwards.
    """
    # Copies of a few hundred KB: a group's backward takes h as its forward made it, without gaps between rows.
    h_in, h_mid = (
        part.contiguous() for part in h.split([h.shape[1] - lora_As[2].shape[0], lora_As[2].shape[0]], dim=1)
    )
    dproduct, dA_mid, dB_mid = group(
        [dy],
        product(gate, up, activation),
        h_mid,
        weights[2:],
        lora_As[2:],
        lora_Bs[2:],
        scalings[2:],
        0.0,
        None,
        True,
    )
    dx, dAs, dBs = group(
        list(gradients(dproduct, gate, up, activation)),
        x,
        h_in,
        weights[:2],
        lora_As[:2],
        lora_Bs[:2],
        scalings[:2],
        0.0,
        None,
        needs_dx,
    )
    return dx, [*dAs, *dA_mid], [*dBs, *dB_mid]


def lora_gated_mlp_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [tokens, out], gate and up [tokens, width], and h [tokens, Σ r_i], from x [tokens, in]."""
    operands = x, weights, biases, lora_As, lora_Bs, scalings, activation
    return forward_of(lora_group_forward, _product, *operands)


def lora_gated_mlp_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    h: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    activation: str,
    needs_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx [tokens, in] (empty when not needed), dA_i and dB_i in the dtypes of A_i and B_i."""
    operands = dy, x, gate, up, h, weights, lora_As, lora_Bs, scalings, activation, needs_dx
    return backward_of(lora_group_backward, _product, _gradients, *operands)
