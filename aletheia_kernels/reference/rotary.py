"""Rotary position embedding in the rotate-half convention.

With R(z) = (-z_2, z_1) for z of the halves z_1 and z_2, and x the first ``rotated`` features of a head:

    out = x ⊙ cos + R(x) ⊙ sin,   the features after them as they are

(Su et al., "RoFormer", 2021; halves in place of neighbouring pairs as in GPT-NeoX.) It is linear in x, so its backward
is the transpose. R is a signed permutation with Rᵀ = -R:

    dx = dout ⊙ cos + Rᵀ(dout ⊙ sin) = dout ⊙ cos - R(dout ⊙ sin)

which asks nothing of the angles. Where both halves of cos and of sin are equal, it is the rotation by -angle.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aletheia_kernels.dtypes import accumulation_dtype


def _half_turn(z: Tensor) -> Tensor:
    first, second = z.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _assembled(turned: Tensor, x: Tensor) -> Tensor:
    """The rotated features before the others, in memory [batch, tokens, heads, dim]."""
    whole = torch.cat((turned.to(x.dtype), x[..., turned.shape[-1] :]), dim=-1)
    return whole.transpose(1, 2).contiguous().transpose(1, 2)


def rotary_forward(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q [batch, heads, tokens, dim] and k [batch, key heads, tokens, dim], turned.

    cos and sin are [batch or 1, tokens, rotated]. Float32 inside (float64 for float64), one rounding. Memory ordered
    [batch, tokens, heads, dim].
    """
    wide = accumulation_dtype(q.dtype)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    rotated = cos.shape[-1]

    def turn(x: Tensor) -> Tensor:
        part = x[..., :rotated].to(wide)
        return _assembled(part * cos + _half_turn(part) * sin, x)

    return turn(q), turn(k)


def rotary_backward(dq: Tensor, dk: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of q and k from those of the two outputs, shaped and laid out as :func:`rotary_forward`'s."""
    wide = accumulation_dtype(dq.dtype)
    cos, sin = cos.to(wide)[:, None], sin.to(wide)[:, None]
    rotated = cos.shape[-1]

    def turn_back(dx: Tensor) -> Tensor:
        part = dx[..., :rotated].to(wide)
        return _assembled(part * cos - _half_turn(part * sin), dx)

    return turn_back(dq), turn_back(dk)
