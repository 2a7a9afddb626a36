"""Several LoRA projections of one input, each of its own rank.

Forward, for projection i with frozen W_i [out_i, in], b_i [out_i] and trained A_i [r_i, in], B_i [out_i, r_i]:

    x̂ = dropout(x),   h = x̂ [A_1; A_2; ...]ᵀ,   y_i = x W_iᵀ + b_i + s_i h_i B_iᵀ

Backward, from dy_i:

    g_i = s_i dy_i B_i,   dB_i = s_i dy_iᵀ h_i,   dA = gᵀ x̂,   dx = Σ_i dy_i W_i + mask ⊙ (g A) / (1 - p)

(Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.) A and B may be kept in a wider dtype than x:
they are rounded to x's dtype for the products, and their gradients are returned in their own dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aletheia_kernels.dtypes import accumulation_dtype
from aletheia_kernels.reference.philox import dropout


def lora_group_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Outputs y_i [tokens, out_i], and h [tokens, Σ r_i] in float32 (float64 for float64 x), from x [tokens, in]."""
    shrink = torch.cat([a.to(x.dtype) for a in lora_As])
    h = dropout(x, seed, dropout_p) @ shrink.T
    ys = []
    for weight, bias, lora_B, scaling, h_i in zip(
        weights, biases, lora_Bs, scalings, h.split([a.shape[0] for a in lora_As], dim=1), strict=True
    ):
        ys.append(torch.nn.functional.linear(x, weight, bias) + scaling * (h_i @ lora_B.to(x.dtype).T))
    return ys, h.to(accumulation_dtype(x.dtype))


def lora_group_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    h: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """dx [tokens, in] (empty when not needed), dA_i and dB_i in the dtypes of A_i and B_i."""
    ranks = [a.shape[0] for a in lora_As]
    x_hat = dropout(x, seed, dropout_p)
    gs, dAs, dBs = [], [], []
    for dy, lora_A, lora_B, scaling, h_i in zip(
        dys, lora_As, lora_Bs, scalings, h.to(x.dtype).split(ranks, dim=1), strict=True
    ):
        gs.append(scaling * (dy @ lora_B.to(x.dtype)))
        dAs.append((gs[-1].T @ x_hat).to(lora_A.dtype))
        dBs.append((scaling * (dy.T @ h_i)).to(lora_B.dtype))
    if not needs_dx:
        return x.new_empty(0), dAs, dBs
    low_rank = torch.cat(gs, dim=1) @ torch.cat([a.to(x.dtype) for a in lora_As])
    dx = dropout(low_rank, seed, dropout_p)
    for dy, weight in zip(dys, weights, strict=True):
        dx = dx + dy @ weight
    return dx, dAs, dBs
