"""The dropout mask made on a tile is the reference's, wherever the tile lies."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from aletheia_kernels.reference import philox as reference
from aletheia_kernels.triton.philox import dropout_arguments, keep_tile


@triton.jit
def write_mask(
    out,
    seed,
    first_row,
    first_column,
    features,
    threshold,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    keep = keep_tile(seed, first_row + row, first_column, features, threshold, COLUMNS, ALIGNED)
    tl.store(out + row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], keep.to(tl.int8))


def _tile(
    seed: torch.Tensor, first_row: int, first_column: int, features: int, dropout_p: float, aligned: bool
):
    out = torch.empty(16, 32, dtype=torch.int8, device=seed.device)
    threshold = dropout_arguments(seed, dropout_p)["threshold"]
    write_mask[(1,)](
        out, seed, first_row, first_column, features, threshold, ROWS=16, COLUMNS=32, ALIGNED=aligned
    )
    return out.bool()


@pytest.mark.parametrize("dropout_p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize(("features", "aligned"), [(64, True), (64, False), (67, False), (66, False)])
def test_a_tile_of_the_mask_is_the_reference_s(device, features, aligned, dropout_p):
    seed = torch.tensor([-(2**62) + 12345], device=device)
    whole = reference.keep_mask(seed, (40, features), dropout_p)
    tile = _tile(seed, 20, 32, features, dropout_p, aligned)
    assert torch.equal(tile, whole[20:36, 32:64])


def _word(key: int, element: int) -> int:
    """By Python's own integers."""
    low = 0xFFFFFFFF
    counter = [element // 4 & low, element // 4 >> 32, 0, 0]
    keys = [key & low, key >> 32 & low]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ keys[0], b & low, a >> 32 ^ counter[3] ^ keys[1], a & low]
        keys = [keys[0] + 0x9E3779B9 & low, keys[1] + 0xBB67AE85 & low]
    return counter[element % 4]


@pytest.mark.parametrize(("features", "aligned"), [(1 << 20, True), ((1 << 20) + 1, False)])
def test_elements_beyond_32_bits_have_words_of_their_own(device, features, aligned):
    """Row 2^17 of a million columns is element 2^37, whose block's counter has a high word."""
    seed, first_row = torch.tensor([7], device=device), 1 << 17
    tile = _tile(seed, first_row, 64, features, 0.5, aligned)
    expected = [
        [_word(7, row * features + column) >= 1 << 31 for column in range(64, 96)]
        for row in range(first_row, first_row + 16)
    ]
    assert torch.equal(tile.cpu(), torch.tensor(expected))
