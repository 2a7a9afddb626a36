"""One LoRA projection of every expert of a mixture, over tokens sorted by expert.

Forward, for expert e with its rows x_e of x, frozen W_e [out, in] and trained A_e [r_e, in], B_e [out, r_e]:

    h_e = x_e A_eᵀ,   y_e = x_e W_eᵀ + s_e h_e B_eᵀ

Backward, from dy_e:

    g_e = dy_e B_e,   dA_e = s_e g_eᵀ x_e,   dB_e = s_e dy_eᵀ h_e,   dx_e = dy_e W_e + s_e g_e A_e

A [experts, R, in] and B [experts, out, R] lie at the largest rank R; rows of A_e and columns of B_e from r_e on are
never read, and their gradients are zero, as are those of an expert without tokens. Rows of x past the last expert's
belong to none (tokens of other machines, under expert parallelism): zero rows in y and dx.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def each_expert(
    tokens: int, lora_A: Tensor, offs: Tensor, ranks: Tensor | None
) -> Iterator[tuple[int, slice, int]]:
    """Every expert: its index, its rows, its rank.

    Raises:
        RuntimeError: ``offs`` falls, or points outside the tokens.
    """
    begin, ends = 0, offs.tolist()
    if any(not before <= end <= tokens for before, end in zip([0, *ends], ends, strict=False)):
        raise RuntimeError(f"offs: expected ends of rows that rise from 0 to {tokens} at most, got {ends}")
    for expert, end in enumerate(ends):
        yield expert, slice(begin, end), lora_A.shape[1] if ranks is None else int(ranks[expert])
        begin = end


def lora_experts_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    offs: Tensor,
    ranks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [tokens, out], and h [tokens, R] in x's dtype, from x [tokens, in]."""
    ys, hs = [], []
    for expert, rows, rank in each_expert(x.shape[0], lora_A, offs, ranks):
        h = x[rows] @ lora_A[expert, :rank].to(x.dtype).T
        low_rank = h @ lora_B[expert, :, :rank].to(x.dtype).T
        ys.append(x[rows] @ weight[expert].T + scalings[expert] * low_rank)
        hs.append(torch.nn.functional.pad(h, (0, lora_A.shape[1] - rank)))
    spare = x.shape[0] - sum(y.shape[0] for y in ys)
    y = torch.cat([*ys, x.new_zeros(spare, weight.shape[1])])
    return y, torch.cat([*hs, x.new_zeros(spare, lora_A.shape[1])])


def lora_experts_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    offs: Tensor,
    ranks: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [tokens, in] (empty when not needed), dA and dB as A and B are: dtype, shape and strides."""
    dx = x.new_zeros(x.shape if needs_dx else (0,))
    dA, dB = torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    for expert, rows, rank in each_expert(x.shape[0], lora_A, offs, ranks):
        g = dy[rows] @ lora_B[expert, :, :rank].to(x.dtype)
        dA[expert, :rank] = scalings[expert] * (g.T @ x[rows])
        dB[expert, :, :rank] = scalings[expert] * (dy[rows].T @ h[rows, :rank])
        if needs_dx:
            low_rank = g @ lora_A[expert, :rank].to(x.dtype)
            dx[rows] = dy[rows] @ weight[expert] + scalings[expert] * low_rank
    return dx, dA, dB
