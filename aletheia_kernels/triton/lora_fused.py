"""LoRA projections whose base product carries the low-rank part in its epilogue, every sibling in one launch:

    y_i = x W_iᵀ + b_i + (s_i h_i) B_iᵀ,    h from lora_shrink

Against the vendor library's product and lora_expand it saves one reading and one writing of every y_i, and it loses
what the vendor library's product is faster than this one. Which is more depends on the card, so it serves only the
shapes that were measured to gain (:mod:`aletheia_kernels.triton.tuned`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aletheia_kernels.triton import interpreted, tuned
from aletheia_kernels.triton.cards import Card
from aletheia_kernels.triton.dot import rounded, tile_dot
from aletheia_kernels.triton.launch import Options, Traffic, card_for, launch
from aletheia_kernels.triton.siblings import (
    CACHE,
    adapters,
    before,
    bytes_of,
    located,
    multiple,
    picked,
    rows_of,
    unit_of_adapters,
)

# Row blocks that a weight tile serves before the next: x of so many stays in the cache meanwhile.
GROUP = 8


@triton.jit(do_not_specialize=["tokens"])
def lora_linear_fused(
    x,
    weights,
    biases,
    h,
    lora_Bs,
    ys,
    tokens,
    features,
    x_row,
    w_rows,
    b_rows,
    outs,
    ranks,
    total_rank,
    scalings,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    UNIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    column_blocks = 0
    for n in tl.static_range(len(outs)):
        column_blocks += tl.cdiv(outs[n], BLOCK_N)
    first_row_block = (tl.program_id(0) // (GROUP * column_blocks)).to(tl.int64) * GROUP
    in_group = tl.minimum(GROUP, tl.cdiv(tokens, BLOCK_M) - first_row_block)
    within = tl.program_id(0) % (GROUP * column_blocks)
    sibling, column_block = located(within // in_group, outs, BLOCK_N)

    rows = (first_row_block + within % in_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    out = picked(outs, sibling)
    here, inside = rows < tokens, columns < out
    dtype = x.dtype.element_ty
    x_rows = x + rows * x_row
    weight_rows = picked(weights, sibling) + columns.to(tl.int64) * picked(w_rows, sibling)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, features, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(
            x_rows[:, None] + k[None, :], mask=here[:, None] & (k < features)[None, :], other=0.0
        )
        weight_mask = inside[:, None] & (k < features)[None, :]
        weight = tl.load(weight_rows[:, None] + k[None, :], mask=weight_mask, other=0.0)
        acc = tile_dot(x_tile, tl.trans(weight), acc, INTERPRETED)

    rank, scaling = multiple(picked(ranks, sibling), UNIT), picked(scalings, sibling)
    h_rows = h + rows * multiple(total_rank, UNIT) + multiple(before(ranks, sibling), UNIT)
    lora_B_rows = picked(lora_Bs, sibling) + columns.to(tl.int64) * multiple(picked(b_rows, sibling), UNIT)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        h_tile = tl.load(h_rows[:, None] + r[None, :], mask=here[:, None] & (r < rank)[None, :], other=0.0)
        adapter = inside[:, None] & (r < rank)[None, :]
        lora_B = tl.load(lora_B_rows[:, None] + r[None, :], mask=adapter, other=0.0)
        scaled = rounded(scaling * h_tile, dtype, INTERPRETED)
        acc = tile_dot(scaled, tl.trans(rounded(lora_B, dtype, INTERPRETED)), acc, INTERPRETED)
    if biases is not None:
        bias = tl.load(picked(biases, sibling) + columns, mask=inside, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    to = picked(ys, sibling) + rows[:, None] * out + columns[None, :]
    tl.store(to, rounded(acc, dtype, INTERPRETED), mask=here[:, None] & inside[None, :])


def key(x: Tensor, weights: Sequence[Tensor], lora_As: Sequence[Tensor]) -> str:
    """The name under which :mod:`aletheia_kernels.triton.tuned` keeps the choice for such a call.

    Tokens count up to the next power of two: batches of nearly one size share a measurement.
    """
    outs = "+".join(str(weight.shape[0]) for weight in weights)
    ranks = "+".join(str(a.shape[0]) for a in lora_As)
    tokens = triton.next_power_of_2(max(x.shape[0], 1))
    return f"lora_linear_fused {str(x.dtype).removeprefix('torch.')} {tokens}x{x.shape[1]} to {outs} ranks {ranks}"


def candidates(card: Card, dtype: torch.dtype) -> list[dict[str, int]]:
    """The choices worth measuring: the block sizes that vendor libraries use too, and that the card can hold."""
    if dtype == torch.float32:
        return []
    sizes = (
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 64, 64, 4, 3),
        (64, 64, 32, 4, 2),
    )
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
        for m, n, k, warps, stages in sizes
        if stages * (m + n) * k * dtype.itemsize <= card.shared_memory
    ]


def choice(x: Tensor, weights: Sequence[Tensor], lora_As: Sequence[Tensor]) -> dict[str, Any] | None:
    """The block sizes to serve this call with; None where it is not to be served: not measured, or measured slower."""
    if not all(weight.stride(1) == 1 for weight in weights):
        return None
    found = tuned.choice(tuned.card_name(x.device), key(x, weights, lora_As))
    # A file of another version of this package, or of anybody's, names no other block sizes than were checked.
    return found if found and found in candidates(card_for(x), x.dtype) else None


def fused_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    h: Tensor,
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    blocks: dict[str, int],
) -> list[Tensor]:
    """The outputs y_i [T, out_i] in x's dtype.

    Args:
        x: [T, in], unit columns.
        weights: per projection [out_i, in] in x's dtype, unit columns.
        biases: per projection [out_i] in x's dtype, or None.
        h: [T, Σ r_i], float32.
        lora_Bs: per projection [out_i, r_i], x's dtype or wider.
        scalings: per projection s_i.
        blocks: one of :func:`candidates`.
    """
    tokens, features = x.shape
    lora_Bs = adapters(lora_Bs, x.dtype)
    outs, ranks = tuple(b.shape[0] for b in lora_Bs), tuple(b.shape[1] for b in lora_Bs)
    ys = [x.new_empty(tokens, out) for out in outs]
    with_biases = None
    if any(bias is not None for bias in biases):
        with_biases = tuple(
            x.new_zeros(out) if bias is None else bias for bias, out in zip(biases, outs, strict=True)
        )
    row_blocks = triton.cdiv(tokens, blocks["BLOCK_M"])
    column_blocks = sum(triton.cdiv(out, blocks["BLOCK_N"]) for out in outs)
    passes = triton.cdiv(row_blocks, GROUP) if bytes_of(*weights) > CACHE else 1
    launch(
        lora_linear_fused,
        (row_blocks * column_blocks,),
        {
            "x": x,
            "weights": tuple(weights),
            "biases": with_biases,
            "h": h,
            "lora_Bs": lora_Bs,
            "ys": tuple(ys),
            "tokens": tokens,
            "features": features,
            "x_row": x.stride(0),
            "w_rows": rows_of(weights),
            "b_rows": rows_of(lora_Bs),
            "outs": outs,
            "ranks": ranks,
            "total_rank": h.shape[1],
            "scalings": tuple(scalings),
        },
        {
            **{name: blocks[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
            "BLOCK_R": min(max(triton.next_power_of_2(max(ranks)), 16), 32),
            "GROUP": GROUP,
            "UNIT": unit_of_adapters(lora_Bs),
            "INTERPRETED": interpreted(),
        },
        Options(blocks["num_warps"], blocks["num_stages"]),
        Traffic(
            read=bytes_of(x, h) + passes * bytes_of(*weights, *lora_Bs, *(with_biases or ())),
            written=bytes_of(*ys),
            flops=2 * tokens * sum(out * (features + rank) for out, rank in zip(outs, ranks, strict=True)),
        ),
    )
    return ys
