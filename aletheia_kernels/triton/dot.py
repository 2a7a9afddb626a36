"""Rounding a tile and multiplying two, so that both mean the same on a card and under the interpreter."""

import triton
import triton.language as tl


@triton.jit
def rounded(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """``value``, of 32 bits or fewer, in ``dtype``, to nearest with ties to even.

    The interpreter cuts off the lower half of a float32 that becomes bfloat16 (and its rounding mode drops a carry),
    so there the bits are rounded before they are cut. A card rounds by itself.
    """
    if INTERPRETED and dtype == tl.bfloat16 and value.dtype != tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        value = (bits & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
    return value.to(dtype)


@triton.jit
def tile_dot(a, b, acc, INTERPRETED: tl.constexpr):
    """acc + a b in float32. ``a`` [M, K] and ``b`` [K, N] share a dtype; M, N and K are powers of two from 16.

    The interpreter keeps bfloat16 as bit patterns and would multiply those, so there the tiles are widened first,
    which is exact. A card multiplies them as they are, on its tensor cores, and float32 in full rather than as TF32.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
