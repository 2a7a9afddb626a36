"""Attention in which every query sees one contiguous range of keys.

With s = scale · q Kᵀ, P_tj = exp(s_tj - lse_t) for first_t ≤ j < last_t and 0 elsewhere, lse_t = log Σ_j exp(s_tj):

    o = P V
    dP = do Vᵀ,   dS = P ⊙ (dP - Σ_j P_j dP_j),   dV = Pᵀ do,   dq = scale · dS K,   dk = scale · dSᵀ q

(Dao et al., "FlashAttention", 2022, whose backward pass recomputes P from lse.) Causal, sliding-window, padded and
packed batches are all ranges. A query without keys gives zeros. Query head h reads key head h // (heads / key heads).
"""

from __future__ import annotations

import torch
from torch import Tensor

from aletheia_kernels.dtypes import accumulation_dtype


def _weights(q: Tensor, k: Tensor, first: Tensor, last: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """P and lse, in float32 (float64 for float64 q), from k with as many heads as q."""
    wide = accumulation_dtype(q.dtype)
    position = torch.arange(k.shape[2], device=q.device)
    seen = (position >= first[:, :, None]) & (position < last[:, :, None])
    scores = (q @ k.mT).to(wide) * scale
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    # softmax subtracts the row's maximum, which is exact; lse, rounded, would cost large scores their last digits.
    return torch.where(seen[:, None], torch.softmax(scores, dim=-1), 0.0), torch.logsumexp(scores, dim=-1)


def _per_query_head(z: Tensor, heads: int) -> Tensor:
    return z.repeat_interleave(heads // z.shape[1], dim=1)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """o [batch, heads, queries, dim], in memory [batch, queries, heads, dim], and lse [batch, heads, queries]."""
    weights, lse = _weights(q, _per_query_head(k, q.shape[1]), first, last, scale)
    o = weights.to(q.dtype) @ _per_query_head(v, q.shape[1])
    return o.transpose(1, 2).contiguous().transpose(1, 2), lse


def attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, contiguous, shaped as q, k and v."""
    heads, groups = q.shape[1], k.shape[1]
    weights, _ = _weights(q, _per_query_head(k, heads), first, last, scale)
    dweights = (grad_o @ _per_query_head(v, heads).mT).to(weights.dtype)
    mean = (weights * dweights).sum(-1, keepdim=True)
    dscores = (weights * (dweights - mean) * scale).to(q.dtype)
    dq = dscores @ _per_query_head(k, heads)
    dk, dv = dscores.mT @ q, weights.to(q.dtype).mT @ grad_o
    shape = (q.shape[0], groups, heads // groups, *dk.shape[2:])
    return dq.contiguous(), dk.view(shape).sum(2), dv.view(shape).sum(2)
