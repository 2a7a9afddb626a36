"""Linear + softmax cross entropy over given rows, a block of rows at a time.

    z = c · tanh((h Wᵀ + b) / c)   (c: soft cap; without one z = h Wᵀ + b)
    loss = Σ_n logsumexp(z_n) - z_n[label_n],     dh = (softmax(z) - onehot) ⊙ (1 - (z / c)²) W

The gradient of h is made while a block's logits are at hand, so that no more than one block of them ever exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aletheia_kernels.dtypes import accumulation_dtype

# Logits held at once, in elements: 128 rows of a 49,152-word vocabulary.
BLOCK_ELEMENTS = 128 * 49152


def rows_per_block(vocabulary: int) -> int:
    """How many rows of logits are held at once for a vocabulary of this size."""
    return max(16, BLOCK_ELEMENTS // max(1, vocabulary))


def linear_cross_entropy_forward(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float, needs_dh: bool
) -> tuple[Tensor, Tensor]:
    """Summed loss (float32, float64 for float64 inputs) and dh [rows, hidden] (empty when not needed)."""
    wide = accumulation_dtype(h.dtype)
    loss = torch.zeros((), dtype=wide, device=h.device)
    dh = torch.empty_like(h) if needs_dh else h.new_empty(0)
    rows = rows_per_block(weight.shape[0])
    for start in range(0, h.shape[0], rows):
        block = slice(start, start + rows)
        z = torch.nn.functional.linear(h[block], weight, bias).to(wide)
        if softcap:
            z = softcap * torch.tanh(z / softcap)
        target = labels[block, None]
        log_p = torch.log_softmax(z, dim=1)
        loss -= log_p.gather(1, target).sum()
        if needs_dh:
            dz = log_p.exp_()
            dz.scatter_add_(1, target, dz.new_full((), -1.0).expand(target.shape))
            if softcap:
                dz *= 1.0 - (z / softcap).square()
            torch.mm(dz.to(h.dtype), weight, out=dh[block])
    return loss, dh
