"""One LoRA projection of every expert of a mixture, over tokens sorted by expert.

For the rows of expert e (:mod:`aletheia_kernels.reference.experts` has the whole of it):

    forward    h = x Aᵀ         y = x Wᵀ + s h Bᵀ
    backward   g = dy B         dx = dy W + s g A        dA = s gᵀ x       dB = s dyᵀ h

Three kernels make all of it, since every line is one of three products, and a fourth prepares A and B for them:

    grouped_product    out_e = left_e right_eᵀ           h, g, and the base product that the vendor library lacks
    grouped_expand     out_e += s_e narrow_e factor_eᵀ   into the fresh base product: y, dx
    grouped_gradient   out_e = s_e wide_eᵀ narrow_e      dA (transposed by its strides), dB
    grouped_copy       A and B in x's dtype, rows dense, zero from each expert's rank on

Unequal ranks. Products skip what lies past an expert's rank in steps of 16, a tensor core's least. What is left within
a step is zero since the copies are, so no load needs a mask that would break it into single elements.

Work list. How many rows an expert has is known to the device alone. Rows are cut into tiles that hold one expert each;
there are at most ⌊tokens / BLOCK_M⌋ + experts + 1 of them, and each program finds its own in a running sum over the
experts' tile counts. The rows of no expert, past the last offset, are one more expert of rank 0.

What it costs. x, y, dy and dx are as wide as the model and everything else is as wide as the rank: a launch takes as
long as its one wide tensor takes to move. So a rank block is as wide as the rank, up to 128, and x is read once: at 128
columns a tile does 128 multiply-adds an element, below what a card needs to be bound by arithmetic (an H100: 798
TFLOP/s over 3.0 TB/s is 266 a 2-byte element), and masked columns cost no bytes. A and B, at most a few MB, stay in the
second-level cache, as do h and g. grouped_gradient needs no split of the rows and no second stage: in / BLOCK_W times
experts programs fill a card (Mixtral's down projection: 112 · 8), each sums its rows in order, and a run repeats to the
bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aletheia_kernels.triton import interpreted
from aletheia_kernels.triton.cards import Card
from aletheia_kernels.triton.dot import rounded, tile_dot
from aletheia_kernels.triton.launch import Options, Traffic, card_for, launch


def _widths(size: int) -> tuple[int, int]:
    """The widest block of columns, and of what is summed over, for elements of this many bytes.

    IEEE float32 has no tensor cores: its multiply-adds hold their operands in registers, where narrow tiles spill none.
    """
    return (128, 64) if size == 2 else (64, 16)


@triton.jit
def _row_tile(offs, tile, rows, experts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a tile, its first row and the row where the expert ends; no rows where there is no such tile."""
    index = tl.arange(0, BLOCK_E)
    end = tl.load(offs + index, mask=index < experts, other=0)
    end = tl.where(index < experts, end, rows)
    begin = tl.load(offs + index - 1, mask=(index > 0) & (index <= experts), other=0)
    begin = tl.where(index <= experts, begin, rows)
    tiles = (end - begin + BLOCK_M - 1) // BLOCK_M
    through = tl.cumsum(tiles, 0)
    expert = tl.sum((through <= tile).to(tl.int32), 0)
    own = index == expert
    first = tl.sum(tl.where(own, begin + (tile - through + tiles) * BLOCK_M, 0), 0)
    last = tl.sum(tl.where(own, end, 0), 0)
    return expert, first, last


@triton.jit
def _rank_limit(ranks, expert, experts, rank, HAS_RANKS: tl.constexpr):
    """How far the products of an expert go: its rank in whole steps of 16, zero for no expert."""
    limit = rank
    if HAS_RANKS:
        limit = tl.minimum((tl.load(ranks + tl.minimum(expert, experts - 1)) + 15) // 16 * 16, rank)
    return tl.where(expert < experts, limit, 0)


@triton.jit
def grouped_copy(
    factor,
    out,
    ranks,
    rank,
    width,
    factor_expert,
    factor_rank,
    factor_column,
    out_expert,
    out_rank,
    out_column,
    HAS_RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[e] = factor[e] [rank, width] in out's dtype, rows from e's rank on zero whatever the factor holds there."""
    expert = tl.program_id(1)
    own = rank
    if HAS_RANKS:
        own = tl.load(ranks + expert)
    limit = _rank_limit(ranks, expert, tl.num_programs(1), rank, HAS_RANKS)
    r = (tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = (tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    factor_at = factor + expert.to(tl.int64) * factor_expert + r.to(tl.int64) * factor_rank
    out_at = (
        out + expert.to(tl.int64) * out_expert + r.to(tl.int64) * out_rank + column.to(tl.int64) * out_column
    )
    factor_at += column.to(tl.int64) * factor_column
    read = tl.load(factor_at, mask=(r < limit) & (column < width), other=0.0)
    kept = rounded(tl.where(r < own, read.to(tl.float32), 0.0), out.dtype.element_ty, INTERPRETED)
    tl.store(out_at, kept, mask=(r < rank) & (column < width))


@triton.jit(do_not_specialize=["rows", "experts"])
def grouped_product(
    left,
    right,
    out,
    offs,
    ranks,
    rows,
    experts,
    columns,
    inner,
    left_row,
    left_inner,
    right_expert,
    right_column,
    right_inner,
    out_row,
    HAS_RANKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[rows of e] = left[rows of e] right[e]ᵀ, columns from e's rank on zero; zero rows for no expert."""
    blocks = tl.cdiv(columns, BLOCK_N)
    expert, first, last = _row_tile(offs, tl.program_id(0) // blocks, rows, experts, BLOCK_E, BLOCK_M)
    if first >= last:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    limit = _rank_limit(ranks, expert, experts, columns, HAS_RANKS)
    steps = tl.where((tl.program_id(0) % blocks) * BLOCK_N < limit, inner, 0)

    k = tl.arange(0, BLOCK_K)
    left_at = left + row.to(tl.int64)[:, None] * left_row + k[None, :] * left_inner
    right_at = right + expert.to(tl.int64) * right_expert + column.to(tl.int64)[None, :] * right_column
    right_at += k[:, None] * right_inner
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, steps, BLOCK_K):
        within = start + k < inner
        a = tl.load(left_at, mask=(row < last)[:, None] & within[None, :], other=0.0)
        b = tl.load(right_at, mask=within[:, None] & (column < limit)[None, :], other=0.0)
        acc = tile_dot(a, b, acc, INTERPRETED)
        left_at += BLOCK_K * left_inner
        right_at += BLOCK_K * right_inner
    out_at = out + row.to(tl.int64)[:, None] * out_row + column[None, :]
    sums = rounded(acc, out.dtype.element_ty, INTERPRETED)
    tl.store(out_at, sums, mask=(row < last)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["rows", "experts"])
def grouped_expand(
    narrow,
    factor,
    out,
    scalings,
    offs,
    ranks,
    rows,
    experts,
    columns,
    rank,
    narrow_row,
    factor_expert,
    factor_column,
    factor_rank,
    out_row,
    HAS_RANKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[rows of e] += s[e] narrow[rows of e] factor[e]ᵀ over e's rank; rows of no expert become zero."""
    blocks = tl.cdiv(columns, BLOCK_N)
    expert, first, last = _row_tile(offs, tl.program_id(0) // blocks, rows, experts, BLOCK_E, BLOCK_M)
    if first >= last:
        return
    row = first + tl.arange(0, BLOCK_M)
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    limit = _rank_limit(ranks, expert, experts, rank, HAS_RANKS)
    scaling = tl.load(scalings + tl.minimum(expert, experts - 1))

    r = tl.arange(0, BLOCK_R)
    narrow_at = narrow + row.to(tl.int64)[:, None] * narrow_row + r[None, :]
    factor_at = factor + expert.to(tl.int64) * factor_expert + column.to(tl.int64)[None, :] * factor_column
    factor_at += r[:, None] * factor_rank
    out_at = out + row.to(tl.int64)[:, None] * out_row + column[None, :]
    # Loaded first, so that it is under way while the factors multiply. What the vendor library leaves in rows of no
    # expert is not defined.
    defined = row < tl.where(expert < experts, last, 0)
    held = tl.load(out_at, mask=defined[:, None] & (column < columns)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, limit, BLOCK_R):
        within = start + r < limit
        a = tl.load(narrow_at, mask=(row < last)[:, None] & within[None, :], other=0.0)
        b = tl.load(factor_at, mask=within[:, None] & (column < columns)[None, :], other=0.0)
        acc = tile_dot(a, b, acc, INTERPRETED)
        narrow_at += BLOCK_R
        factor_at += BLOCK_R * factor_rank
    sums = rounded(held.to(tl.float32) + scaling * acc, out.dtype.element_ty, INTERPRETED)
    tl.store(out_at, sums, mask=(row < last)[:, None] & (column < columns)[None, :])


@triton.jit
def grouped_gradient(
    wide,
    narrow,
    out,
    scalings,
    offs,
    ranks,
    columns,
    rank,
    wide_row,
    wide_column,
    narrow_row,
    out_expert,
    out_column,
    out_rank,
    HAS_RANKS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out[e] = s[e] wide[rows of e]ᵀ narrow[rows of e], zero from e's rank on."""
    expert = tl.program_id(1)
    begin = tl.where(expert > 0, tl.load(offs + tl.maximum(expert - 1, 0)), 0)
    end = tl.load(offs + expert)
    limit = _rank_limit(ranks, expert, tl.num_programs(1), rank, HAS_RANKS)
    column = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    end = tl.where(tl.program_id(2) * BLOCK_R < limit, end, begin)

    row = begin + tl.arange(0, BLOCK_T)
    wide_at = wide + row.to(tl.int64)[None, :] * wide_row + column.to(tl.int64)[:, None] * wide_column
    narrow_at = narrow + row.to(tl.int64)[:, None] * narrow_row + r[None, :]
    acc = tl.zeros([BLOCK_W, BLOCK_R], tl.float32)
    for start in range(begin, end, BLOCK_T):
        within = start + tl.arange(0, BLOCK_T) < end
        a = tl.load(wide_at, mask=within[None, :] & (column < columns)[:, None], other=0.0)
        b = tl.load(narrow_at, mask=within[:, None] & (r < limit)[None, :], other=0.0)
        acc = tile_dot(a, b, acc, INTERPRETED)
        # A stride of 1 is a constant to the compiler, which has no method `to`.
        wide_at += BLOCK_T * tl.cast(wide_row, tl.int64)
        narrow_at += BLOCK_T * narrow_row
    out_at = out + expert.to(tl.int64) * out_expert + r.to(tl.int64)[None, :] * out_rank
    out_at += column.to(tl.int64)[:, None] * out_column
    scaled = rounded(tl.load(scalings + expert) * acc, out.dtype.element_ty, INTERPRETED)
    tl.store(out_at, scaled, mask=(column < columns)[:, None] & (r < rank)[None, :])


def _block(extent: int, largest: int) -> int:
    """The power of two that holds ``extent``, from 16 (a tensor core's least) to ``largest``."""
    return min(largest, max(16, triton.next_power_of_2(extent)))


def _warps(sums: int) -> int:
    """So many that a thread holds at most 64 sums of a tile, a quarter of its registers."""
    return 8 if sums > 64 * 64 else 4


def _stages(card: Card, bytes_a_stage: int) -> int:
    """Four tiles in flight hide a load's latency; fewer where the card's shared memory ends before."""
    return max(1, min(4, card.shared_memory // bytes_a_stage))


def _route(offs: Tensor, ranks: Tensor | None, scalings: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    return offs.contiguous(), None if ranks is None else ranks.contiguous(), scalings.contiguous()


def _tiles(rows: int, experts: int, block: int) -> int:
    """At most so many tiles of ``block`` rows: every expert, and the rows of none, ends in a partial one."""
    return rows // block + min(rows, experts + 1)


def _product(left: Tensor, right: Tensor, offs: Tensor, ranks: Tensor | None) -> Tensor:
    """left [rows, inner] times right [experts, columns, inner] of the row's expert: [rows, columns]."""
    rows, inner = left.shape
    experts, columns, _ = right.shape
    out = left.new_empty(rows, columns)
    size = left.element_size()
    widest, block_k = _widths(size)
    block_m, block_n = 64, _block(columns, widest)
    blocks = triton.cdiv(columns, block_n)
    launch(
        grouped_product,
        (_tiles(rows, experts, block_m) * blocks,),
        {
            "left": left,
            "right": right,
            "out": out,
            "offs": offs,
            "ranks": offs if ranks is None else ranks,
            "rows": rows,
            "experts": experts,
            "columns": columns,
            "inner": inner,
            "left_row": left.stride(0),
            "left_inner": left.stride(1),
            "right_expert": right.stride(0),
            "right_column": right.stride(1),
            "right_inner": right.stride(2),
            "out_row": out.stride(0),
        },
        {
            "HAS_RANKS": ranks is not None,
            "BLOCK_E": triton.next_power_of_2(experts + 1),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "INTERPRETED": interpreted(),
        },
        Options(
            num_warps=_warps(block_m * block_n),
            num_stages=_stages(card_for(left), (block_m + block_n) * block_k * size),
        ),
        Traffic(
            read=(blocks * left.numel() + right.numel()) * size,
            written=out.numel() * size,
            flops=2 * rows * inner * columns,
        ),
    )
    return out


def _expand(
    narrow: Tensor, factor: Tensor, out: Tensor, scalings: Tensor, offs: Tensor, ranks: Tensor | None
) -> None:
    """Adds s times narrow [rows, rank] times factor [experts, columns, rank] of the row's expert to out, ours alone."""
    rows, columns = out.shape
    experts, _, rank = factor.shape
    size = out.element_size()
    widest, longest = _widths(size)
    block_m, block_n, block_r = 64, _block(columns, widest), _block(rank, longest)
    launch(
        grouped_expand,
        (_tiles(rows, experts, block_m) * triton.cdiv(columns, block_n),),
        {
            "narrow": narrow,
            "factor": factor,
            "out": out,
            "scalings": scalings,
            "offs": offs,
            "ranks": offs if ranks is None else ranks,
            "rows": rows,
            "experts": experts,
            "columns": columns,
            "rank": rank,
            "narrow_row": narrow.stride(0),
            "factor_expert": factor.stride(0),
            "factor_column": factor.stride(1),
            "factor_rank": factor.stride(2),
            "out_row": out.stride(0),
        },
        {
            "HAS_RANKS": ranks is not None,
            "BLOCK_E": triton.next_power_of_2(experts + 1),
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_R": block_r,
            "INTERPRETED": interpreted(),
        },
        # The loop over the rank is short: shared memory is better spent on more programs, whose loads of out overlap.
        Options(num_warps=8, num_stages=2),
        Traffic(
            read=(out.numel() + narrow.numel() + factor.numel()) * size,
            written=out.numel() * size,
            flops=2 * rows * columns * rank,
        ),
    )


def _gradient(
    wide: Tensor, narrow: Tensor, out: Tensor, scalings: Tensor, offs: Tensor, ranks: Tensor | None
) -> None:
    """Writes s times wide [rows, columns], transposed, times narrow [rows, rank] to out [experts, columns, rank]."""
    rows, columns = wide.shape
    experts, _, rank = out.shape
    size = wide.element_size()
    widest, block_t = _widths(size)
    block_r = _block(rank, widest)
    block_w = _block(columns, min(widest, 8192 // block_r))
    rank_blocks = triton.cdiv(rank, block_r)
    launch(
        grouped_gradient,
        (triton.cdiv(columns, block_w), experts, rank_blocks),
        {
            "wide": wide,
            "narrow": narrow,
            "out": out,
            "scalings": scalings,
            "offs": offs,
            "ranks": offs if ranks is None else ranks,
            "columns": columns,
            "rank": rank,
            "wide_row": wide.stride(0),
            "wide_column": wide.stride(1),
            "narrow_row": narrow.stride(0),
            "out_expert": out.stride(0),
            "out_column": out.stride(1),
            "out_rank": out.stride(2),
        },
        {
            "HAS_RANKS": ranks is not None,
            "BLOCK_T": block_t,
            "BLOCK_W": block_w,
            "BLOCK_R": block_r,
            "INTERPRETED": interpreted(),
        },
        Options(
            num_warps=_warps(block_w * block_r),
            num_stages=_stages(card_for(wide), (block_w + block_r) * block_t * size),
        ),
        Traffic(
            read=(rank_blocks * wide.numel() + narrow.numel()) * size,
            written=out.numel() * out.element_size(),
            flops=2 * rows * columns * rank,
        ),
    )


def _grouped_mm_takes(*tensors: Tensor) -> bool:
    """Whether torch.nn.functional.grouped_mm has these operands: bfloat16, dense rows or columns of whole 16 bytes."""
    for tensor in tensors:
        *_, row, column = tensor.stride()
        lead = row if column == 1 else column
        dense = (column == 1 and row >= tensor.shape[-1]) or (row == 1 and column >= tensor.shape[-2])
        if tensor.dtype != torch.bfloat16 or not dense or lead % 8 or tensor.data_ptr() % 16:
            return False
    return hasattr(torch.nn.functional, "grouped_mm")


def _base_product(left: Tensor, right: Tensor, offs: Tensor) -> Tensor:
    """left [rows, inner] times right [experts, columns, inner] of the row's expert, by the vendor library if it can."""
    if left.shape[0] > 0 and _grouped_mm_takes(left, right):
        return torch.nn.functional.grouped_mm(left, right.transpose(1, 2), offs=offs)
    return _product(left, right, offs, None)


def _compute_copy(factor: Tensor, ranks: Tensor | None, dtype: torch.dtype, rank_dim: int) -> Tensor:
    """A factor in the dtype of the products, contiguous, zero past the ranks; itself where it is that already.

    These few MB spare every tile strided, wide or broken loads.
    """
    if ranks is None and factor.dtype == dtype and factor.is_contiguous():
        return factor
    copy = torch.empty(factor.shape, dtype=dtype, device=factor.device)
    source, out = factor.movedim(rank_dim, 1), copy.movedim(rank_dim, 1)
    experts, rank, width = source.shape
    block_r, block_w = _block(rank, 32), _block(width, 128)
    launch(
        grouped_copy,
        (triton.cdiv(width, block_w), experts, triton.cdiv(rank, block_r)),
        {
            "factor": source,
            "out": out,
            "ranks": source if ranks is None else ranks,
            "rank": rank,
            "width": width,
            "factor_expert": source.stride(0),
            "factor_rank": source.stride(1),
            "factor_column": source.stride(2),
            "out_expert": out.stride(0),
            "out_rank": out.stride(1),
            "out_column": out.stride(2),
        },
        {
            "HAS_RANKS": ranks is not None,
            "BLOCK_R": block_r,
            "BLOCK_W": block_w,
            "INTERPRETED": interpreted(),
        },
        Options(num_warps=4, num_stages=1),
        Traffic(
            read=factor.numel() * factor.element_size(), written=copy.numel() * copy.element_size(), flops=0
        ),
    )
    return copy


def lora_experts_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    offs: Tensor,
    ranks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`aletheia_kernels.reference.lora_experts_forward`."""
    offs, ranks, scalings = _route(offs, ranks, scalings)
    h = _product(x, _compute_copy(lora_A, ranks, x.dtype, rank_dim=1), offs, ranks)
    y = _base_product(x, weight, offs)
    _expand(h, _compute_copy(lora_B, ranks, x.dtype, rank_dim=2), y, scalings, offs, ranks)
    return y, h


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
    """As :func:`aletheia_kernels.reference.lora_experts_backward`."""
    offs, ranks, scalings = _route(offs, ranks, scalings)
    dA, dB = torch.empty_like(lora_A), torch.empty_like(lora_B)
    g = _product(dy, _compute_copy(lora_B, ranks, x.dtype, rank_dim=2).transpose(1, 2), offs, ranks)
    _gradient(dy, h, dB, scalings, offs, ranks)
    _gradient(x, g, dA.transpose(1, 2), scalings, offs, ranks)
    if not needs_dx:
        return x.new_empty(0), dA, dB
    dx = _base_product(dy, weight.transpose(1, 2), offs)
    _expand(g, _compute_copy(lora_A, ranks, x.dtype, rank_dim=1).transpose(1, 2), dx, scalings, offs, ranks)
    return dx, dA, dB
