"""Dropout masks from a seed: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).

Element i of a logically contiguous tensor takes word i % 4 of the block with counter (i // 4) and key = seed, so any
tile of the mask can be made again anywhere, in any order, without the mask ever being stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUND = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _mul_hi_lo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # int64 products wrap modulo 2^64 to the bits of the unsigned product, so shift-and-mask reads the high word.
    product = b * a
    return (product >> 32) & _LOW, product & _LOW


def philox_words(seed: Tensor, count: int) -> Tensor:
    """The first ``count`` 32-bit words of the stream, as int64 in [0, 2^32).

    Args:
        seed: int64, one element; its 64 bits are the key.
        count: how many words.
    """
    blocks = (count + 3) // 4
    counter = torch.arange(blocks, dtype=torch.int64, device=seed.device)
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0 = seed.reshape(()) & _LOW
    k1 = (seed.reshape(()) >> 32) & _LOW
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(_ROUND[0], c0)
        hi1, lo1 = _mul_hi_lo(_ROUND[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=1).reshape(-1)[:count]


def drop_threshold(dropout_p: float) -> int:
    """A word below this drops its element: P(drop) = threshold / 2^32."""
    return int(dropout_p * 2.0**32)


def keep_mask(seed: Tensor, shape: tuple[int, ...] | torch.Size, dropout_p: float) -> Tensor:
    """Boolean keep mask of ``shape`` for dropout probability ``dropout_p``."""
    count = 1
    for extent in shape:
        count *= extent
    return (philox_words(seed, count) >= drop_threshold(dropout_p)).reshape(shape)


def dropout(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """x with elements dropped with probability ``dropout_p`` and the kept ones scaled by 1 / (1 - p)."""
    if dropout_p == 0.0 or seed is None:
        return x
    return torch.where(keep_mask(seed, x.shape, dropout_p), x * (1.0 / (1.0 - dropout_p)), x.new_zeros(()))
