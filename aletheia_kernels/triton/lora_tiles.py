"""Block sizes for the LoRA kernels, by how a card's matrix units take what they multiply.

sm_90 and sm_100 read it from shared memory; those before, and sm_120, hold it in registers, and so do AMD's, with warps
of 64 or of 32 threads. The sizes are the largest that spill no register there, which the ahead-of-time tests hold them
to, and stages and ranks are fewer where a card's shared memory is too small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from aletheia_kernels.triton.cards import Card
from aletheia_kernels.triton.launch import Options


class Tile(NamedTuple):
    """``m`` tokens by ``n`` columns by up to ``r`` ranks, with ``stages`` steps of a loop under way at once."""

    m: int
    n: int
    r: int
    stages: int


_TILES: dict[str, dict[str, tuple[Tile, ...]]] = {
    # 64 tokens, so that 4096 alone make programs for half a large card, by all ranks up to 256, so that x is read once.
    "shrink": {
        "shared memory": (Tile(64, 64, 64, 4), Tile(64, 32, 256, 4)),
        "registers": (Tile(64, 64, 64, 4), Tile(64, 32, 128, 4), Tile(64, 32, 256, 2)),
        "warps of 64": (Tile(64, 64, 64, 3), Tile(64, 32, 256, 3)),
        "warps of 32": (Tile(64, 32, 256, 3),),
        "odd": (Tile(64, 32, 128, 3),),
    },
    # Two steps take the ranks of most adapters, so nothing is kept under way; another program on the same
    # multiprocessor covers for it.
    "expand": {
        "shared memory": (Tile(64, 128, 32, 1),),
        "registers": (Tile(64, 128, 32, 1),),
        "warps of 64": (Tile(64, 128, 32, 1),),
        "warps of 32": (Tile(64, 128, 32, 1),),
        "odd": (Tile(64, 64, 16, 1),),
    },
    # The wider the strip, the fewer the parts of g; its dB, [n, r] in float32, fills a quarter of the registers.
    "dy": {
        "shared memory": (Tile(64, 256, 64, 3), Tile(64, 128, 128, 3)),
        "registers": (Tile(64, 256, 32, 3), Tile(64, 128, 64, 3), Tile(32, 64, 128, 3)),
        "warps of 64": (Tile(64, 128, 64, 2),),
        "warps of 32": (Tile(32, 64, 64, 2),),
        "odd": (Tile(64, 64, 32, 2),),
    },
    # dA and dx together. 64 columns, so that 4096 features alone make programs for half a large card.
    "dx": {
        "shared memory": (Tile(64, 64, 128, 3), Tile(64, 32, 256, 3)),
        "registers": (Tile(64, 64, 64, 3),),
        "warps of 64": (Tile(64, 64, 64, 2),),
        "warps of 32": (Tile(32, 64, 64, 2),),
        "odd": (Tile(32, 64, 32, 2),),
    },
    # More ranks than those: dA, and dx with every tile of A loaded anew for every block of tokens.
    "dA alone": {
        "shared memory": (Tile(64, 64, 256, 3),),
        "registers": (Tile(32, 64, 128, 3),),
        "warps of 64": (Tile(64, 64, 64, 2),),
        "warps of 32": (Tile(32, 64, 64, 2),),
        "odd": (Tile(32, 64, 32, 2),),
    },
    "dx alone": {
        "shared memory": (Tile(64, 64, 64, 3),),
        "registers": (Tile(64, 64, 64, 2),),
        "warps of 64": (Tile(64, 64, 64, 2),),
        "warps of 32": (Tile(32, 64, 32, 2),),
        "odd": (Tile(64, 64, 16, 2),),
    },
}
# Float32 is multiplied in full, outside the tensor cores of CUDA cards, and so in registers everywhere.
_SINGLE = {
    "shrink": Tile(32, 32, 64, 2),
    "expand": Tile(32, 64, 32, 1),
    "dy": Tile(32, 32, 32, 2),
    "dx": Tile(32, 32, 32, 2),
    "dA alone": Tile(32, 32, 32, 2),
    "dx alone": Tile(32, 32, 32, 2),
}
# What the compiler adds for changes of layout.
_SCRATCH = 8192


def _family(card: Card) -> str:
    if card.backend == "hip":
        return f"warps of {card.warp_size}"
    return "shared memory" if 90 <= int(card.arch) < 120 else "registers"


def _shared(kernel: str, tile: Tile, family: str, size: int, master: int) -> int:
    """Bytes of shared memory at most, for elements of ``size`` bytes and adapters of ``master``."""
    m, n, r, stages = tile
    loaded, operands = {
        "shrink": (n * (m * size + r * master), n * r * size),
        "expand": (0, (m + n) * r * size),
        "dy": (m * (n * size + r * 4), (n + m) * r * size),
        "dx": (m * (n + r) * size, n * r * size),
        "dA alone": (m * (n + r) * size, 0),
        "dx alone": (r * (m * size + n * master), n * r * size),
    }[kernel]
    # A matrix unit that reads from shared memory is done with a stage one step later.
    held = loaded + operands if family == "shared memory" else 0
    return (stages - 1) * loaded + held + _SCRATCH


def choose(
    kernel: str, card: Card, dtype: torch.dtype, master: torch.dtype, rank: int, *, odd: bool, unit: int = 16
) -> tuple[Tile, Options]:
    """The tile of a kernel, by its name in _TILES, for ``rank`` ranks, and the options that go with it.

    Its r is the power of two that the ranks take, from 16 (a tensor core multiplies no fewer), or the most there is:
    then the kernel takes them in several steps. ``odd`` says that something cannot be loaded 16 bytes at a time: every
    element of it takes an address of its own; ``unit``, how many ranks certainly can be.
    """
    block_r = max(1 << (rank - 1).bit_length(), 16)
    if dtype == torch.float32:
        tile = _SINGLE[kernel]
        return tile._replace(r=min(tile.r, block_r)), Options(256 // card.warp_size, tile.stages)
    family = _family(card)
    odd = odd or unit < (8 if card.backend == "hip" else 4)
    tiles = _TILES[kernel]["odd" if odd else family]
    tile = next((tile for tile in tiles if tile.r >= block_r), tiles[-1])
    tile = tile._replace(r=min(tile.r, block_r))
    while _shared(kernel, tile, family, dtype.itemsize, master.itemsize) > card.shared_memory:
        tile = tile._replace(stages=tile.stages - 1) if tile.stages > 2 else tile._replace(r=tile.r // 2)
    return tile, Options(num_warps=8, num_stages=tile.stages)
