"""Kernels with a fault each, or none, for the tests of what finds the fault. They are compiled and never run."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def product(
    x, w, y, rows, inner, columns, x_row, w_row, y_row, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):
    """y = x wᵀ with rows widened before they are multiplied."""
    row = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, inner, K):
        k = start + tl.arange(0, K)
        a = tl.load(
            x + row[:, None] * x_row + k[None, :],
            mask=(row < rows)[:, None] & (k < inner)[None, :],
            other=0.0,
        )
        b_at = w + column.to(tl.int64)[None, :] * w_row + k[:, None]
        b = tl.load(b_at, mask=(column < columns)[None, :] & (k < inner)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    y_at = y + row[:, None] * y_row + column[None, :]
    tl.store(y_at, acc.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit(do_not_specialize=["rows"])
def copy_in_32_bits(x, y, rows, columns, x_row, y_row, M: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.arange(0, N)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = row[:, None] * x_row + column[None, :]
    tl.store(
        y + row.to(tl.int64)[:, None] * y_row + column[None, :], tl.load(x + offset, mask=mask), mask=mask
    )


@triton.jit(do_not_specialize=["rows"])
def copy_widened_too_late(x, y, rows, columns, x_row, y_row, M: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0) * M + tl.arange(0, M)
    column = tl.arange(0, N)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    offset = (row * x_row).to(tl.int64)[:, None] + column[None, :]
    tl.store(
        y + row.to(tl.int64)[:, None] * y_row + column[None, :], tl.load(x + offset, mask=mask), mask=mask
    )


@triton.jit(do_not_specialize=["rows"])
def sum_rows_by_a_running_offset(x, y, rows, columns, x_row, N: tl.constexpr):
    column = tl.arange(0, N)
    acc = tl.zeros([N], tl.float32)
    offset = tl.program_id(0) * 0
    for row in range(rows):
        acc += tl.load(x + offset + column, mask=column < columns, other=0.0)
        offset += row * x_row
    tl.store(y + column, acc, mask=column < columns)


@triton.jit(do_not_specialize=["rows"])
def copy_by_tile(x, y, rows, columns, x_row, y_row, M: tl.constexpr, N: tl.constexpr):
    """The programs' numbers are products of run-time numbers too; quotients and remainders of them are indices."""
    across = tl.cdiv(columns, N)
    tile = tl.program_id(0) % (across * tl.cdiv(rows, M))
    row = ((tile // across) * M + tl.arange(0, M)).to(tl.int64)
    column = (tile % across) * N + tl.arange(0, N)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(
        y + row[:, None] * y_row + column[None, :],
        tl.load(x + row[:, None] * x_row + column[None, :], mask=mask),
        mask=mask,
    )
