"""Squared Frobenius norms of weight gradients from the two tensors that make the gradient.

For y = x Wᵀ the weight gradient is G = dyᵀ x [out, in], with x [tokens, in] and dy [tokens, out].

    tiles:   ‖G‖² = Σ over row blocks of ‖dy[:, block]ᵀ x‖², one block held at a time
    gram:    ‖G‖² = Σ_{t,t'} (x_t · x_t') (dy_t · dy_t')   (Goodfellow, arXiv 1510.01799)
    sketch:  E ‖G Ω‖² = m ‖G‖² for Ω [in, m] of independent standard normals, so that each of the m columns of
             G Ω = dyᵀ (x Ω) gives one unbiased estimate; their spread gives the standard error
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aletheia_kernels.dtypes import accumulation_dtype

# A tile of the gradient is kept near this many elements: small beside the operands, enough for a full-rate product.
TILE_ELEMENTS = 1 << 18
TOKEN_BLOCK = 512
# Rounding error of one Gram term in units of float32's ε (dot products of about a thousand terms), and the relative
# error that the automatic choice lets the Gram form have.
GRAM_NOISE_UNITS = 16.0
GRAM_TOLERANCE = 1e-5


def _by_tiles(x: Tensor, dy: Tensor) -> Tensor:
    rows = max(16, TILE_ELEMENTS // max(1, x.shape[1]))
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for block in dy.split(rows, dim=1):
        total += (
            (block.T @ x)
            .to(accumulation_dtype(x.dtype))
            .square()
            .sum(dtype=accumulation_dtype(x.dtype))
            .double()
        )
    return total


def _by_gram(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, and whether it can be trusted.

    Gram entries of both signs cancel, so they are formed from operands widened to float32. The rounding errors of the
    terms p are independent to first order: together about a few ε √(Σ p²), which has to be small beside the sum.
    """
    wide = accumulation_dtype(x.dtype)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    squares = torch.zeros_like(total)
    for start in range(0, x.shape[0], TOKEN_BLOCK):
        rows_x, rows_dy = x[start : start + TOKEN_BLOCK].to(wide), dy[start : start + TOKEN_BLOCK].to(wide)
        # Both Gram matrices are symmetric: blocks right of the diagonal count twice.
        for other in range(start, x.shape[0], TOKEN_BLOCK):
            gram_x = rows_x @ x[other : other + TOKEN_BLOCK].to(wide).T
            gram_dy = rows_dy @ dy[other : other + TOKEN_BLOCK].to(wide).T
            terms = gram_x.mul_(gram_dy)
            weight = 1.0 if other == start else 2.0
            total += weight * terms.sum().double()
            squares += weight**2 * terms.double().square().sum()
    noise = GRAM_NOISE_UNITS * torch.finfo(wide).eps * squares.sqrt()
    return total.clamp_min(0.0), noise <= GRAM_TOLERANCE * total


def gram_is_cheaper(tokens: int, in_features: int, out_features: int, itemsize: int) -> bool:
    """Whether the Gram form costs less than tiles: T (K + N) / 2 against K N multiply-adds a token.

    The symmetric half counts once. For 2-byte dtypes the Gram form runs in float32, which the processors that have
    2-byte products run about five times slower (measured: 150 against 770 GFLOP/s on a two-core AVX512-BF16 machine).
    """
    rate = 5.0 if itemsize < 4 else 1.0
    return rate * tokens * (in_features + out_features) / 2.0 < float(in_features) * out_features


def weight_grad_norm_sq(x: Tensor, dy: Tensor, method: str) -> Tensor:
    """‖dyᵀ x‖² of x [tokens, in] and dy [tokens, out], float32 (float64 for float64 inputs), 0-d.

    ``auto`` takes the cheaper form, and tiles after all where the Gram form lost too much to cancellation.
    """
    if method == "gram" or (
        method == "auto" and gram_is_cheaper(x.shape[0], x.shape[1], dy.shape[1], x.element_size())
    ):
        total, trusted = _by_gram(x, dy)
        if method == "gram" or bool(trusted):
            return total.to(accumulation_dtype(x.dtype))
    return _by_tiles(x, dy).to(accumulation_dtype(x.dtype))


def weight_grad_norms_sq(xs: Sequence[Tensor], dys: Sequence[Tensor]) -> Tensor:
    """‖dy_iᵀ x_i‖² of every pair, by the cheaper form, [pairs]."""
    return torch.stack([weight_grad_norm_sq(x, dy, "auto") for x, dy in zip(xs, dys, strict=True)])


def weight_grad_norm_sq_per_example(x: Tensor, dy: Tensor) -> Tensor:
    """‖dy_bᵀ x_b‖² of every example of x [batch, tokens, in] and dy [batch, tokens, out], [batch]."""
    if x.shape[0] == 0:
        return x.new_empty(0, dtype=accumulation_dtype(x.dtype))
    return weight_grad_norms_sq(x.unbind(), dy.unbind())


def weight_grad_norm_sq_sketch(x: Tensor, dy: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased estimate of ‖dyᵀ x‖² and its standard error, from omega [in, m], m ≥ 2."""
    wide = accumulation_dtype(x.dtype)
    columns = (dy.T @ (x @ omega.to(x.dtype))).to(wide).square().sum(dim=0)
    return columns.mean(), columns.std() / omega.shape[1] ** 0.5


def embedding_grad_norm_sq(indices: Tensor, dy: Tensor) -> Tensor:
    """Squared norm of an embedding's weight gradient: rows of dy [tokens, dim] summed by index, then squared."""
    distinct, slot = indices.unique(return_inverse=True)
    rows = torch.zeros(distinct.numel(), dy.shape[1], dtype=accumulation_dtype(dy.dtype), device=dy.device)
    return rows.index_add_(0, slot, dy.to(rows.dtype)).square().sum()


def bias_grad_norm_sq(dy: Tensor) -> Tensor:
    """Squared norm of a bias gradient, ‖Σ_t dy_t‖², of dy [tokens, out]."""
    return dy.sum(dim=0, dtype=accumulation_dtype(dy.dtype)).square().sum()
