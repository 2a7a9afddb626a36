"""Linear + softmax cross entropy over given rows, a block of rows at a time.

    z = c · tanh((h Wᵀ + b) / c)   (c: soft cap; without one z = h Wᵀ + b)
    q = (1 - ε) onehot(label) + ε / V   (ε: label smoothing)
    loss = Σ_n logsumexp(z_n) - q_n · z_n,     dh = (softmax(z) - q) ⊙ (1 - (z / c)²) W

The gradient of h is made while a block's logits are at hand, so that no more than one block of them ever exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aletheia_kernels.dtypes import accumulation_dtype

# Rows of logits held at once.
ROWS = 256


def linear_cross_entropy_forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float,
    label_smoothing: float,
    needs_dh: bool,
) -> tuple[Tensor, Tensor]:
    """Summed loss (float32, float64 for float64 inputs) and dh [rows, hidden] (empty when not needed)."""
    wide = accumulation_dtype(h.dtype)
    loss = torch.zeros((), dtype=wide, device=h.device)
    dh = h.new_empty(h.shape) if needs_dh else h.new_empty(0)
    uniform = label_smoothing / weight.shape[0]
    for start in range(0, h.shape[0], ROWS):
        block = slice(start, start + ROWS)
        z = torch.nn.functional.linear(h[block], weight, bias).to(wide)
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        target = labels[block, None]
        log_p = torch.log_softmax(z, dim=1)
        loss -= (1.0 - label_smoothing) * log_p.gather(1, target).sum()
        if label_smoothing:
            loss -= uniform * log_p.sum()
        if needs_dh:
            dz = log_p.exp_().sub_(uniform)
            dz.scatter_add_(1, target, dz.new_full((), label_smoothing - 1.0).expand(target.shape))
            if softcap:
                dz *= 1.0 - (z / softcap).square()
            torch.mm(dz.to(h.dtype), weight, out=dh[block])
    return loss, dh
