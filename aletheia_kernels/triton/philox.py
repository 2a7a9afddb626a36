"""Tiles of the dropout mask of :mod:`aletheia_kernels.reference.philox`, made again wherever they are needed.

Element i of x [tokens, features], i = row · features + column, is kept if word i % 4 of the Philox4x32-10 block with
counter i // 4 and the seed as key is at least the threshold, 2^32 · p.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from aletheia_kernels.reference.philox import drop_threshold


def dropout_arguments(seed: Tensor | None, dropout_p: float) -> dict[str, Any]:
    """The run-time arguments ``seed``, ``threshold`` and ``keep_scale`` of a kernel; without dropout seed is None.

    The threshold's 32 bits are passed as an int32's, so that no probability makes a kernel of its own.
    """
    if dropout_p == 0.0:
        return {"seed": None, "threshold": 0, "keep_scale": 1.0}
    threshold = drop_threshold(dropout_p)
    return {
        "seed": seed,
        "threshold": threshold - (1 << 32 if threshold >> 31 else 0),
        "keep_scale": 1.0 / (1.0 - dropout_p),
    }


@triton.jit
def _words(key, blocks):
    zero = tl.zeros(blocks.shape, tl.uint32)
    return tl.philox(key, (blocks & 0xFFFFFFFF).to(tl.uint32), (blocks >> 32).to(tl.uint32), zero, zero)


@triton.jit
def keep_tile(seed, rows, first_column, features, threshold, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr):
    """Whether each element of the tile ``rows`` × [first_column, first_column + COLUMNS) is kept.

    ``ALIGNED`` says that features is a multiple of 4: then every row starts a block, first_column being a multiple of
    4, and one block serves four neighbours. Otherwise each element makes its block for itself.
    """
    key = tl.load(seed)
    if ALIGNED:
        quads = (first_column // 4) + tl.arange(0, COLUMNS // 4)
        w0, w1, w2, w3 = _words(key, rows.to(tl.int64)[:, None] * (features // 4) + quads[None, :])
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(rows.shape[0], COLUMNS)
    else:
        columns = first_column + tl.arange(0, COLUMNS)
        elements = rows.to(tl.int64)[:, None] * features + columns[None, :]
        w0, w1, w2, w3 = _words(key, elements >> 2)
        word = elements & 3
        words = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    return words >= threshold.to(tl.uint32, bitcast=True)
