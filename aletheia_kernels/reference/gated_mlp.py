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

from collections.abc import Sequence

import torch
from torch import Tensor

from aletheia_kernels.reference.lora import lora_group_backward, lora_group_forward


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    return torch.nn.functional.gelu(gate, approximate="tanh")


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
    (gate, up), h_in = lora_group_forward(
        x, weights[:2], biases[:2], lora_As[:2], lora_Bs[:2], scalings[:2], 0.0, None
    )
    (y,), h_mid = lora_group_forward(
        _activate(gate, activation) * up,
        weights[2:],
        biases[2:],
        lora_As[2:],
        lora_Bs[2:],
        scalings[2:],
        0.0,
        None,
    )
    return y, gate, up, torch.cat([h_in, h_mid], dim=1)


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
    h_in, h_mid = h.split([h.shape[1] - lora_As[2].shape[0], lora_As[2].shape[0]], dim=1)
    active = _activate(gate, activation)
    dproduct, dA_mid, dB_mid = lora_group_backward(
        [dy], active * up, h_mid, weights[2:], lora_As[2:], lora_Bs[2:], scalings[2:], 0.0, None, True
    )
    dactive = dproduct * up
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(dactive, gate)
    else:
        dgate = torch.ops.aten.gelu_backward(dactive, gate, approximate="tanh")
    dx, dAs, dBs = lora_group_backward(
        [dgate, dproduct * active],
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
