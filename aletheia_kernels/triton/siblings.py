"""Several tensors in one launch, as if they were one: what the kernels over sibling projections share.

A launch takes them as a tuple, one pointer each: nothing is copied together, and no table of pointers has to reach the
card first. Ranks of all siblings are counted through, packed: a tile of ranks runs over the boundary between two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from aletheia_kernels.triton.dot import rounded

# What is re-read within so many bytes of other accesses is counted once: the second-level cache of every card served
# exceeds it severalfold (an H100 has 50 MB; gfx942 has 256 MB behind 4 MB a chiplet).
CACHE = 8 << 20


@triton.jit
def picked(values, i):
    """values[i] of a tuple, for an i known at run time; what the compiler knows of all values it knows of this."""
    value = values[0]
    for n in tl.static_range(1, len(values)):
        value = tl.where(i == n, values[n], value)
    return value


@triton.jit
def multiple(value, UNIT: tl.constexpr):
    """``value``, of which the caller knows that UNIT divides it: now the compiler does."""
    return value // UNIT * UNIT


@triton.jit
def before(values, i):
    """Σ values[:i]."""
    total = 0
    for n in tl.static_range(len(values)):
        total += tl.where(n < i, values[n], 0)
    return total


@triton.jit
def located(index, sizes, BLOCK: tl.constexpr):
    """The sibling and the block within it, of block ``index`` over siblings of cdiv(sizes[i], BLOCK) blocks each."""
    sibling = 0
    first = 0
    passed = 0
    for n in tl.static_range(len(sizes)):
        sibling = tl.where(index >= passed, n, sibling)
        first = tl.where(index >= passed, passed, first)
        passed += tl.cdiv(sizes[n], BLOCK)
    return sibling, index - first


@triton.jit
def packed_pointers(tensors, ranks, row_strides, packed, columns):
    """Pointers to ``columns`` of the rows that ranks ``packed`` of all siblings have in tensors [r_i, ...].

    Both come with two dimensions, and the pointers are chosen when they have both: of rows alone that may be another
    sibling's, the compiler would not know that 16 bytes can be loaded at a time.
    """
    packed = packed.to(tl.int64)
    pointers = tensors[0] + packed * row_strides[0] + columns
    first = ranks[0]
    for n in tl.static_range(1, len(tensors)):
        own = tensors[n] + (packed - first) * row_strides[n] + columns
        pointers = tl.where(packed >= first, own, pointers)
        first += ranks[n]
    return pointers


@triton.jit
def packed_tile(
    tensors, ranks, row_strides, packed, columns, inside, dtype: tl.constexpr, INTERPRETED: tl.constexpr
):
    """``columns`` of the rows that ranks ``packed`` have, zero beyond the last rank, in ``dtype``.

    Loaded sibling by sibling: outside a loop, pointers into all of them at once would fill the registers.
    """
    tile = tl.zeros((packed.shape[0], columns.shape[0]), tensors[0].dtype.element_ty)
    first = 0
    for n in tl.static_range(len(tensors)):
        own = (packed >= first) & (packed < first + ranks[n])
        rows = tensors[n] + (packed - first).to(tl.int64) * row_strides[n]
        mask = own[:, None] & inside[None, :]
        tile = tl.load(rows[:, None] + columns[None, :], mask=mask, other=tile)
        first += ranks[n]
    return rounded(tile, dtype, INTERPRETED)


def with_unit_columns(t: Tensor) -> Tensor:
    """t, or a copy of it if its columns lie apart. No layer hands such a tensor over; the vendor library copies too."""
    return t if t.stride(1) == 1 else t.contiguous()


def adapters(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The masters as the kernels take them: unit columns, and one dtype of at most 32 bits, else x's."""
    if tensors[0].dtype == torch.float64 or any(t.dtype != tensors[0].dtype for t in tensors):
        tensors = [t.to(dtype) for t in tensors]
    return tuple(with_unit_columns(t) for t in tensors)


def bytes_of(*tensors: Tensor) -> int:
    """Bytes that the tensors have."""
    return sum(t.numel() * t.element_size() for t in tensors)


def unit_of(*numbers: int) -> int:
    """The largest power of two up to 16 that divides every number; Triton by itself sees 16 alone."""
    return math.gcd(16, *numbers)


def unit_of_adapters(lora_Bs: Sequence[Tensor]) -> int:
    """:func:`unit_of` every rank and row stride of B; of rank 0 nothing is read, whatever its stride."""
    return unit_of(*(number for b in lora_Bs if b.shape[1] for number in (b.shape[1], b.stride(0))))


def rows_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The row stride of every tensor, in elements."""
    return tuple(t.stride(0) for t in tensors)
