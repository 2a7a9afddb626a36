"""Root mean square normalisation.

    r = (mean_i x_i² + ε)^(-1/2),   n = r x,   y = n ⊙ (offset + w)
    dn = dy ⊙ (offset + w),   dx = r (dn - n mean_i(dn_i n_i)),   dw = Σ_rows dy ⊙ n

(Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.) Models differ in two ways: Gemma's weight is stored
less one (offset = 1), and Llama and T5 round n to x's dtype before the weight, Gemma and OLMo 2 after it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aletheia_kernels.dtypes import accumulation_dtype


def rms_norm_forward(
    x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool
) -> tuple[Tensor, Tensor]:
    """y [..., features], contiguous, in x's dtype, and r [...] in float32 (float64 for float64 x)."""
    wide = accumulation_dtype(x.dtype)
    x_wide = x.to(wide)
    rstd = torch.rsqrt(x_wide.square().mean(-1) + eps)
    normalised = x_wide * rstd[..., None]
    if rounds_first:
        normalised = normalised.to(x.dtype).to(wide)
    return (normalised * (offset + weight.to(wide))).to(x.dtype).contiguous(), rstd.contiguous()


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    offset: float,
    needs_dx: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """dx [..., features] and dweight [features] in the dtypes of x and weight; empty where not needed."""
    wide = accumulation_dtype(x.dtype)
    dy_wide, normalised = dy.to(wide), x.to(wide) * rstd[..., None]
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    if needs_dx:
        dn = dy_wide * (offset + weight.to(wide))
        along = (dn * normalised).mean(-1, keepdim=True)
        dx = (rstd[..., None] * (dn - normalised * along)).to(x.dtype).contiguous()
    if needs_dweight:
        dweight = (dy_wide * normalised).reshape(-1, weight.shape[0]).sum(0).to(weight.dtype)
    return dx, dweight
