"""The LoRA group in Triton: the vendor library's base products, and four kernels around them.

With x [T, in], A_i [r_i, in], B_i [out_i, r_i], R = Σ r_i, and A the A_i stacked:

    lora_shrink   h = x̂ Aᵀ                                          x̂ = dropout(x), made on the tile
    lora_expand   y_i += s_i h_i B_iᵀ                                every sibling in one launch
    lora_dy       g_i = s_i dy_i B_i,   dB_i = s_i dy_iᵀ h_i         both from one loaded tile of dy_i
    lora_dx       dA = gᵀ x̂,   dx += mask ⊙ (g A) / (1 - p)          both from one loaded tile of x and g
    lora_sum      the sums of what the others left in parts

The masters A_i and B_i are read where they lie, in their own dtype, and rounded to x's on the tile: a compute copy
would cost a launch and three times the bytes. Ranks lie packed: a tile of ranks runs over the boundary between two
siblings, and no tensor is as wide as the largest rank for all. Products are summed in float32; h and g are rounded to
x's dtype where a tensor core takes them, as the reference does.

Sums over what several programs share are made in two stages, in one order: each program writes its own part, lora_sum
adds the parts. Parts are kept few, for they are traffic. lora_shrink and lora_dx split their long dimension only as
far as it takes to have MANY programs. lora_dy walks a strip of BLOCK_N columns of dy_i, so that its part of dB_i stays
in registers, and g_i comes in out_i / BLOCK_N parts, kept in x's dtype: each is rounded once, and the roundings of the
parts of a sum add up to about one rounding of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from aletheia_kernels.triton import interpreted, lora_fused
from aletheia_kernels.triton.dot import rounded, tile_dot
from aletheia_kernels.triton.launch import Options, Traffic, card_for, launch
from aletheia_kernels.triton.lora_tiles import Tile, choose
from aletheia_kernels.triton.philox import dropout_arguments, keep_tile
from aletheia_kernels.triton.siblings import (
    CACHE,
    adapters,
    before,
    bytes_of,
    located,
    multiple,
    packed_pointers,
    packed_tile,
    picked,
    rows_of,
    unit_of,
    unit_of_adapters,
    with_unit_columns,
)

# Programs that a launch is split into at least, where its rows and columns alone give fewer: about one for every second
# multiprocessor of an H100, which together draw its memory bandwidth; more would cost more in parts than they bring.
MANY = 64


@triton.jit(do_not_specialize=["tokens", "threshold"])
def lora_shrink(
    x,
    seed,
    lora_As,
    h,
    tokens,
    features,
    columns_each,
    x_row,
    a_rows,
    ranks,
    total_rank,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    packed = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(2)
    total_rank = multiple(total_rank, UNIT)
    here, used = rows < tokens, packed < total_rank
    x_rows = x + rows.to(tl.int64) * x_row
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first = part * columns_each
    for start in range(first, tl.minimum(first + columns_each, features), BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside, used = columns < features, packed < total_rank
        tile = tl.load(x_rows[:, None] + columns[None, :], mask=here[:, None] & inside[None, :], other=0.0)
        if seed is not None:
            keep = keep_tile(seed, rows, start, features, threshold, BLOCK_N, ALIGNED)
            tile = tl.where(keep, tile, 0.0)
        lora_A = tl.load(
            packed_pointers(lora_As, ranks, a_rows, packed[:, None], columns[None, :]),
            mask=used[:, None] & inside[None, :],
            other=0.0,
        )
        lora_A = rounded(lora_A, x.dtype.element_ty, INTERPRETED)
        acc = tile_dot(tile, tl.trans(lora_A), acc, INTERPRETED)
    to = h + (part.to(tl.int64) * tokens + rows)[:, None] * total_rank + packed[None, :]
    tl.store(to, acc * keep_scale, mask=here[:, None] & used[None, :])


@triton.jit(do_not_specialize=["tokens", "group"])
def lora_expand(
    h,
    lora_Bs,
    ys,
    tokens,
    group,
    b_rows,
    y_rows,
    outs,
    ranks,
    total_rank,
    scalings,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    # Within a group of row blocks, rows come first: a tile of B serves the whole group while it is in the cache, and
    # the group's h, small enough for that, serves every column.
    column_blocks = 0
    for n in tl.static_range(len(outs)):
        column_blocks += tl.cdiv(outs[n], BLOCK_N)
    first_row_block = (tl.program_id(0) // (group * column_blocks)).to(tl.int64) * group
    in_group = tl.minimum(group, tl.cdiv(tokens, BLOCK_M) - first_row_block)
    within = tl.program_id(0) % (group * column_blocks)
    sibling, column_block = located(within // in_group, outs, BLOCK_N)

    rows = (first_row_block + within % in_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    here, inside = rows < tokens, columns < picked(outs, sibling)
    y = picked(ys, sibling)
    to = y + rows.to(tl.int64)[:, None] * picked(y_rows, sibling) + columns[None, :]
    mask = here[:, None] & inside[None, :]
    base = tl.load(to, mask=mask, other=0.0).to(tl.float32)

    rank = multiple(picked(ranks, sibling), UNIT)
    h_rows = h + rows.to(tl.int64) * multiple(total_rank, UNIT) + multiple(before(ranks, sibling), UNIT)
    b_row = multiple(picked(b_rows, sibling), UNIT)
    lora_B_rows = picked(lora_Bs, sibling) + columns.to(tl.int64) * b_row
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        h_tile = tl.load(h_rows[:, None] + r[None, :], mask=here[:, None] & (r < rank)[None, :], other=0.0)
        lora_B = tl.load(
            lora_B_rows[:, None] + r[None, :], mask=inside[:, None] & (r < rank)[None, :], other=0.0
        )
        h_tile = rounded(h_tile, y.dtype.element_ty, INTERPRETED)
        lora_B = rounded(lora_B, y.dtype.element_ty, INTERPRETED)
        acc = tile_dot(h_tile, tl.trans(lora_B), acc, INTERPRETED)
    total = base + picked(scalings, sibling) * acc
    tl.store(to, rounded(total, y.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit(do_not_specialize=["tokens", "rows_each"])
def lora_dy(
    dys,
    lora_Bs,
    h,
    g_parts,
    dB_parts,
    tokens,
    rows_each,
    dy_rows,
    b_rows,
    outs,
    ranks,
    total_rank,
    scalings,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UNIT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    sibling, strip = located(tl.program_id(0), outs, BLOCK_N)
    part = tl.program_id(1)
    rank = multiple(picked(ranks, sibling), UNIT)
    if tl.program_id(2) * BLOCK_R >= rank:
        return
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    out = picked(outs, sibling)
    columns = strip * BLOCK_N + tl.arange(0, BLOCK_N)
    used, inside = r < rank, columns < out
    dy, g_part, dB_part = picked(dys, sibling), picked(g_parts, sibling), picked(dB_parts, sibling)
    dy_row, scaling = picked(dy_rows, sibling), picked(scalings, sibling)
    h_columns, h_row = h + multiple(before(ranks, sibling), UNIT) + r, multiple(total_rank, UNIT)

    b_row = multiple(picked(b_rows, sibling), UNIT)
    lora_B_rows = picked(lora_Bs, sibling) + columns.to(tl.int64) * b_row
    adapter = inside[:, None] & used[None, :]
    lora_B = tl.load(lora_B_rows[:, None] + r[None, :], mask=adapter, other=0.0)
    lora_B = rounded(lora_B, dy.dtype.element_ty, INTERPRETED)
    dB = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    first = part * rows_each
    for start in range(first, tl.minimum(first + rows_each, tokens), BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        wide_rows, here = rows.to(tl.int64), rows < tokens
        low_rank = here[:, None] & used[None, :]
        tile = tl.load(
            dy + wide_rows[:, None] * dy_row + columns[None, :],
            mask=here[:, None] & inside[None, :],
            other=0.0,
        )
        h_tile = tl.load(h_columns[None, :] + wide_rows[:, None] * h_row, mask=low_rank, other=0.0)
        g = tile_dot(tile, lora_B, tl.zeros((BLOCK_M, BLOCK_R), tl.float32), INTERPRETED)
        to = g_part + (strip.to(tl.int64) * tokens + wide_rows)[:, None] * rank + r[None, :]
        tl.store(to, rounded(scaling * g, g_part.dtype.element_ty, INTERPRETED), mask=low_rank)
        dB = tile_dot(tl.trans(tile), rounded(h_tile, dy.dtype.element_ty, INTERPRETED), dB, INTERPRETED)
    to = dB_part + (part.to(tl.int64) * out + columns)[:, None] * rank + r[None, :]
    tl.store(to, rounded(scaling * dB, dB_part.dtype.element_ty, INTERPRETED), mask=adapter)


@triton.jit(do_not_specialize=["tokens", "rows_each", "threshold"])
def lora_dx(
    x,
    seed,
    g,
    lora_As,
    dA_parts,
    dx,
    tokens,
    rows_each,
    features,
    x_row,
    g_row,
    a_rows,
    ranks,
    first_rank,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WHOLE: tl.constexpr,
    ALIGNED: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    first_column = tl.program_id(0) * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    packed = first_rank + tl.arange(0, BLOCK_R)
    inside = columns < features
    dtype = g.dtype.element_ty
    if dx is not None and WHOLE:
        lora_A = packed_tile(lora_As, ranks, a_rows, packed, columns, inside, dtype, INTERPRETED)
    dA = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    begin = part * rows_each
    end = tl.minimum(begin + rows_each, tokens)
    if dx is not None:
        # No dot takes dx, so the compiler would load each tile of it when it is needed: here, a step ahead.
        rows = begin + tl.arange(0, BLOCK_M)
        to = dx + rows.to(tl.int64)[:, None] * features + columns[None, :]
        base = tl.load(to, mask=(rows < end)[:, None] & inside[None, :], other=0.0)
    for start in range(begin, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        wide_rows, here = rows.to(tl.int64), rows < end
        mask = here[:, None] & inside[None, :]
        if dx is not None:
            to = dx + wide_rows[:, None] * features + columns[None, :]
            next_mask = (rows + BLOCK_M < end)[:, None] & inside[None, :]
            next_base = tl.load(to + tl.cast(features, tl.int64) * BLOCK_M, mask=next_mask, other=0.0)
        g_rows = g + wide_rows[:, None] * g_row
        if seed is not None:
            keep = keep_tile(seed, rows, first_column, features, threshold, BLOCK_N, ALIGNED)
        if dA_parts is not None:
            tile = tl.load(x + wide_rows[:, None] * x_row + columns[None, :], mask=mask, other=0.0)
            g_mask = here[:, None] & (packed < g_row)[None, :]
            g_tile = tl.load(g_rows + packed[None, :], mask=g_mask, other=0.0)
            if seed is not None:
                tile = tl.where(keep, tile, 0.0)
            dA = tile_dot(tl.trans(tile), g_tile, dA, INTERPRETED)
        if dx is not None:
            low_rank = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if WHOLE:
                low_rank = tile_dot(g_tile, lora_A, low_rank, INTERPRETED)
            else:
                for first in range(0, g_row, BLOCK_R):
                    r = first + tl.arange(0, BLOCK_R)
                    g_tile = tl.load(
                        g_rows + r[None, :], mask=here[:, None] & (r < g_row)[None, :], other=0.0
                    )
                    lora_A = packed_tile(lora_As, ranks, a_rows, r, columns, inside, dtype, INTERPRETED)
                    low_rank = tile_dot(g_tile, lora_A, low_rank, INTERPRETED)
            if seed is not None:
                low_rank = tl.where(keep, low_rank * keep_scale, 0.0)
            total = base.to(tl.float32) + low_rank
            tl.store(to, rounded(total, dx.dtype.element_ty, INTERPRETED), mask=mask)
            base = next_base
    if dA_parts is not None:
        dA = rounded(dA * keep_scale, dA_parts[0].dtype.element_ty, INTERPRETED)
        first = 0
        for n in tl.static_range(len(dA_parts)):
            own = (packed >= first) & (packed < first + ranks[n])
            dA_rows = dA_parts[n] + (packed - first + part.to(tl.int64) * ranks[n]) * features
            tl.store(dA_rows[None, :] + columns[:, None], dA, mask=inside[:, None] & own[None, :])
            first += ranks[n]


# Parts that one step of lora_sum loads before it adds, so that their latencies overlap.
_AHEAD = tl.constexpr(8)


@triton.jit(do_not_specialize=["rows"])
def lora_sum(
    parts,
    counts,
    rows,
    columns,
    sums,
    sum_rows,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """sums[i] [rows, columns[i]] = Σ of the counts[i] parts, in order, in float32."""
    i, column_block = located(tl.program_id(1), columns, BLOCK_N)
    source, count, width = picked(parts, i), picked(counts, i), picked(columns, i)
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    source_rows = source + row[:, None] * width + column[None, :]
    size = rows.to(tl.int64) * width
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, count, _AHEAD):
        for ahead in tl.static_range(_AHEAD):
            # A mask with as many columns as there are, or with none, for a part that there is or is not.
            inside = column < tl.where(count - start > ahead, width, 0)
            mask = (row < rows)[:, None] & inside[None, :]
            part = tl.load(source_rows + (start + ahead) * size, mask=mask, other=0.0)
            total += part.to(tl.float32)
    target = picked(sums, i)
    to = target + row[:, None] * picked(sum_rows, i) + column[None, :]
    mask = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(to, rounded(total, target.dtype.element_ty, INTERPRETED), mask=mask)


def _split(extent: int, block: int, programs: int, least: int) -> tuple[int, int]:
    """Into how many parts to split ``extent``, and how long each is (a multiple of ``block``).

    So many that ``programs`` a part make MANY; but no part is shorter than ``least``, which bounds the bytes of parts,
    and there are fewer than 16, since Triton compiles a kernel apart for counts that 16 divides.
    """
    wanted = min(triton.cdiv(MANY, max(programs, 1)), max(extent // least, 1), 15)
    each = max(triton.cdiv(triton.cdiv(extent, wanted), block), 1) * block
    return max(triton.cdiv(extent, each), 1), each


def _blocks(tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_R": tile.r}


def _odd(*numbers: int) -> bool:
    """Whether Triton cannot say that 16 divides every number: it looks at nothing else."""
    return any(number % 16 for number in numbers)


def shrink(x: Tensor, lora_As: Sequence[Tensor], dropout_p: float, seed: Tensor | None) -> Tensor:
    """h [T, R] in float32 = dropout(x) Aᵀ, for x [T, in] with unit columns and A the lora_As [r_i, in] stacked."""
    tokens, features = x.shape
    lora_As = adapters(lora_As, x.dtype)
    ranks = tuple(a.shape[0] for a in lora_As)
    odd = _odd(features, x.stride(0), *rows_of(lora_As))
    tile, options = choose("shrink", card_for(x), x.dtype, lora_As[0].dtype, sum(ranks), odd=odd)
    row_blocks, passes = triton.cdiv(tokens, tile.m), triton.cdiv(sum(ranks), tile.r)
    parts, each = _split(features, tile.n, row_blocks * passes, least=1024)
    h_parts = x.new_empty(parts, tokens, sum(ranks), dtype=torch.float32)
    launch(
        lora_shrink,
        (row_blocks, passes, parts),
        {
            "x": x,
            "lora_As": lora_As,
            "h": h_parts,
            "tokens": tokens,
            "features": features,
            "columns_each": each,
            "x_row": x.stride(0),
            "a_rows": rows_of(lora_As),
            "ranks": ranks,
            "total_rank": sum(ranks),
            **dropout_arguments(seed, dropout_p),
        },
        {
            **_blocks(tile),
            "UNIT": unit_of(*ranks),
            "ALIGNED": features % 4 == 0,
            "INTERPRETED": interpreted(),
        },
        options,
        Traffic(
            read=passes * bytes_of(x) + _read_by(row_blocks, lora_As),
            written=bytes_of(h_parts),
            flops=2 * tokens * features * sum(ranks),
        ),
    )
    if parts == 1:
        return h_parts[0]
    h = h_parts.new_empty(tokens, sum(ranks))
    _summed([h_parts], [h])
    return h


def _read_by(passes: int, tensors: Sequence[Tensor]) -> int:
    """Bytes read of adapters that ``passes`` programs, one after the other, each read in full."""
    return bytes_of(*tensors) * (1 if bytes_of(*tensors) <= CACHE else passes)


def _summed(parts: Sequence[Tensor], sums: Sequence[Tensor]) -> None:
    """Fills sums[i] [rows, columns_i], of unit columns, with Σ parts[i] [count_i, rows, columns_i]."""
    rows, columns = sums[0].shape[0], tuple(target.shape[1] for target in sums)
    n = min(max(triton.next_power_of_2(max(columns)), 16), 2048)
    m = 2048 // n
    launch(
        lora_sum,
        (triton.cdiv(rows, m), sum(triton.cdiv(width, n) for width in columns)),
        {
            "parts": tuple(parts),
            "counts": tuple(part.shape[0] for part in parts),
            "rows": rows,
            "columns": columns,
            "sums": tuple(sums),
            "sum_rows": rows_of(sums),
        },
        {"BLOCK_M": m, "BLOCK_N": n, "INTERPRETED": interpreted()},
        Options(num_warps=4),
        Traffic(read=bytes_of(*parts), written=bytes_of(*sums), flops=sum(part.numel() for part in parts)),
    )


def expand(h: Tensor, lora_Bs: Sequence[Tensor], scalings: Sequence[float], ys: Sequence[Tensor]) -> None:
    """y_i += s_i h_i B_iᵀ, for fresh y_i [T, out_i] with unit columns."""
    tokens = h.shape[0]
    if h.shape[1] == 0:
        return
    lora_Bs = adapters(lora_Bs, ys[0].dtype)
    outs, ranks = tuple(b.shape[0] for b in lora_Bs), tuple(b.shape[1] for b in lora_Bs)
    unit = unit_of_adapters(lora_Bs)
    tile, options = choose(
        "expand",
        card_for(h),
        ys[0].dtype,
        lora_Bs[0].dtype,
        max(ranks),
        odd=_odd(*outs, *rows_of(ys)),
        unit=unit,
    )
    row_blocks = triton.cdiv(tokens, tile.m)
    group = min(max(CACHE // 2 // (tile.m * h.shape[1] * 4), 1), max(row_blocks, 1))
    launch(
        lora_expand,
        (row_blocks * sum(triton.cdiv(out, tile.n) for out in outs),),
        {
            "h": h,
            "lora_Bs": lora_Bs,
            "ys": tuple(ys),
            "tokens": tokens,
            "group": group,
            "b_rows": rows_of(lora_Bs),
            "y_rows": rows_of(ys),
            "outs": outs,
            "ranks": ranks,
            "total_rank": h.shape[1],
            "scalings": tuple(scalings),
        },
        {**_blocks(tile), "UNIT": unit, "INTERPRETED": interpreted()},
        options,
        Traffic(
            read=bytes_of(h, *ys) + triton.cdiv(row_blocks, group) * bytes_of(*lora_Bs),
            written=bytes_of(*ys),
            flops=2 * tokens * sum(out * rank for out, rank in zip(outs, ranks, strict=True)),
        ),
    )


def _dy_pass(
    dys: Sequence[Tensor],
    h: Tensor,
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dBs: Sequence[Tensor],
) -> tuple[Tensor, Sequence[Tensor]]:
    """g [T, R or more] in dy's dtype; dB_i [parts, out_i, r_i], ``dBs`` themselves where there is one part."""
    tokens = h.shape[0]
    lora_Bs = adapters(lora_Bs, dys[0].dtype)
    outs, ranks = tuple(b.shape[0] for b in lora_Bs), tuple(b.shape[1] for b in lora_Bs)
    unit = unit_of_adapters(lora_Bs)
    tile, options = choose(
        "dy",
        card_for(h),
        dys[0].dtype,
        lora_Bs[0].dtype,
        max(ranks),
        odd=_odd(*outs, *rows_of(dys)),
        unit=unit,
    )
    strips = [triton.cdiv(out, tile.n) for out in outs]
    passes = [triton.cdiv(rank, tile.r) for rank in ranks]
    programs = sum(strip * times for strip, times in zip(strips, passes, strict=True))
    parts, each = _split(tokens, tile.m, programs, least=512)
    g_parts = [dys[0].new_empty(count, tokens, rank) for count, rank in zip(strips, ranks, strict=True)]
    dB_parts = [b[None] if parts == 1 else h.new_empty(parts, *b.shape) for b in dBs]
    launch(
        lora_dy,
        (sum(strips), parts, max(passes)),
        {
            "dys": tuple(dys),
            "lora_Bs": lora_Bs,
            "h": h,
            "g_parts": tuple(g_parts),
            "dB_parts": tuple(dB_parts),
            "tokens": tokens,
            "rows_each": each,
            "dy_rows": rows_of(dys),
            "b_rows": rows_of(lora_Bs),
            "outs": outs,
            "ranks": ranks,
            "total_rank": h.shape[1],
            "scalings": tuple(scalings),
        },
        {**_blocks(tile), "UNIT": unit, "INTERPRETED": interpreted()},
        options,
        Traffic(
            read=sum(times * bytes_of(dy) for dy, times in zip(dys, passes, strict=True))
            + bytes_of(h)
            + _read_by(parts, lora_Bs),
            written=bytes_of(*g_parts, *dB_parts),
            flops=4 * tokens * sum(out * rank for out, rank in zip(outs, ranks, strict=True)),
        ),
    )
    # Rows of a multiple of 16 columns, so that lora_dx loads 16 bytes at a time. Beyond R it multiplies by zero.
    g = dys[0].new_empty(tokens, triton.cdiv(h.shape[1], 16) * 16)
    g[:, h.shape[1] :].zero_()
    _summed(g_parts, g[:, : h.shape[1]].split(ranks, dim=1))
    return g, dB_parts


def _dx_pass(
    x: Tensor,
    g: Tensor,
    lora_As: Sequence[Tensor],
    dropout_p: float,
    seed: Tensor | None,
    dAs: Sequence[Tensor],
    dx: Tensor | None,
) -> Sequence[Tensor]:
    """Adds the low-rank part to dx; dA_i [parts, r_i, in], ``dAs`` themselves where there is one part."""
    tokens, features = x.shape
    lora_As = adapters(lora_As, x.dtype)
    ranks = tuple(a.shape[0] for a in lora_As)
    total_rank = sum(ranks)
    card, master = card_for(x), lora_As[0].dtype
    odd = _odd(features, x.stride(0), *rows_of(lora_As))
    tile, options = choose("dx", card, x.dtype, master, total_rank, odd=odd)
    whole = total_rank <= tile.r
    if not whole:
        tile, options = choose("dA alone", card, x.dtype, master, total_rank, odd=odd)
    parts, each = _split(tokens, tile.m, triton.cdiv(features, tile.n), least=1024)
    dA_parts = [a[None] if parts == 1 else x.new_empty(parts, *a.shape, dtype=torch.float32) for a in dAs]
    operands = (x, g, lora_As, dropout_arguments(seed, dropout_p))
    if whole:
        _launch_dx(*operands, tile, options, parts, each, dA_parts=tuple(dA_parts), dx=dx)
        return dA_parts
    # More ranks than a program holds for both. dA takes a launch for each tile of them, dx takes them in steps of one
    # launch, so that it is rounded once.
    for first_rank in range(0, total_rank, tile.r):
        _launch_dx(*operands, tile, options, parts, each, first_rank, dA_parts=tuple(dA_parts))
    if dx is not None:
        tile, options = choose("dx alone", card, x.dtype, master, total_rank, odd=odd)
        split = _split(tokens, tile.m, triton.cdiv(features, tile.n), least=tile.m)
        _launch_dx(*operands, tile, options, *split, dx=dx)
    return dA_parts


def _launch_dx(
    x: Tensor,
    g: Tensor,
    lora_As: tuple[Tensor, ...],
    dropout: dict[str, Any],
    tile: Tile,
    options: Options,
    parts: int,
    each: int,
    first_rank: int = 0,
    *,
    dA_parts: tuple[Tensor, ...] | None = None,
    dx: Tensor | None = None,
) -> None:
    tokens, features = x.shape
    ranks = tuple(a.shape[0] for a in lora_As)
    total_rank = sum(ranks)
    whole = dx is None or dA_parts is not None
    own = min(tile.r, total_rank - first_rank)
    read = bytes_of(g) if dx is not None else bytes_of(g) * own // total_rank
    written = flops = 0
    if dA_parts is not None:
        read += bytes_of(x)
        written += bytes_of(*dA_parts) * own // total_rank
        flops += 2 * tokens * features * own
    if dx is not None:
        read += bytes_of(dx) + _read_by(parts if whole else triton.cdiv(tokens, tile.m), lora_As)
        written += bytes_of(dx)
        flops += 2 * tokens * features * total_rank
    launch(
        lora_dx,
        (triton.cdiv(features, tile.n), parts),
        {
            "x": x,
            "g": g,
            "lora_As": lora_As,
            "dA_parts": dA_parts,
            "dx": dx,
            "tokens": tokens,
            "rows_each": each,
            "features": features,
            "x_row": x.stride(0),
            "g_row": g.stride(0),
            "a_rows": rows_of(lora_As),
            "ranks": ranks,
            "first_rank": first_rank,
            **dropout,
        },
        {**_blocks(tile), "WHOLE": whole, "ALIGNED": features % 4 == 0, "INTERPRETED": interpreted()},
        options,
        Traffic(read, written, flops),
    )


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
    """:func:`aletheia_kernels.reference.lora.lora_group_forward` for bfloat16, float16 and float32."""
    x = with_unit_columns(x)
    blocks = lora_fused.choice(x, weights, lora_As)
    if blocks:
        h = shrink(x, lora_As, dropout_p, seed)
        return lora_fused.fused_forward(x, weights, biases, h, lora_Bs, scalings, blocks), h
    ys = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    h = shrink(x, lora_As, dropout_p, seed)
    expand(h, lora_Bs, scalings, ys)
    return ys, h


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
    """:func:`aletheia_kernels.reference.lora.lora_group_backward` for bfloat16, float16 and float32."""
    x, dys = with_unit_columns(x), [with_unit_columns(dy) for dy in dys]
    # A launch writes tensors of one dtype. Masters may differ, as where one stands in for an adapter that is not there:
    # then gradients are rounded afterwards.
    dtypes = {t.dtype for t in (*lora_As, *lora_Bs)}
    common = dtypes.pop() if len(dtypes) == 1 else torch.float32
    dAs = [a.new_empty(a.shape, dtype=common) for a in lora_As]
    dBs = [b.new_empty(b.shape, dtype=common) for b in lora_Bs]
    dx = None
    if needs_dx:
        dx = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
    if h.shape[1] == 0:
        return x.new_empty(0) if dx is None else dx, _as_masters(dAs, lora_As), _as_masters(dBs, lora_Bs)
    g, dB_parts = _dy_pass(dys, h, lora_Bs, scalings, dBs)
    dA_parts = _dx_pass(x, g, lora_As, dropout_p, seed, dAs, dx)
    # Each lies in one piece, so a row of what is summed is all of it.
    unsummed = [
        (part.view(part.shape[0], 1, -1), target.view(1, -1))
        for part, target in zip([*dA_parts, *dB_parts], [*dAs, *dBs], strict=True)
        if part.shape[0] > 1
    ]
    if unsummed:
        _summed(*zip(*unsummed, strict=True))
    return x.new_empty(0) if dx is None else dx, _as_masters(dAs, lora_As), _as_masters(dBs, lora_Bs)


def _as_masters(gradients: Sequence[Tensor], masters: Sequence[Tensor]) -> list[Tensor]:
    return [gradient.to(master.dtype) for gradient, master in zip(gradients, masters, strict=True)]
