"""What the kernels need to know of a card: its target, and the limits that block sizes have to respect."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Card:
    """A compilation target and its limits.

    Attributes:
        name: as Triton and the compilers name the target, ``sm_90`` or ``gfx942``.
        backend: ``cuda`` or ``hip``.
        arch: 90, or ``gfx942``.
        warp_size: 32, or 64 on gfx9.
        shared_memory: bytes that one program may hold.
        multiprocessors: how many programs of a full register file run at once.
        l2_cache: bytes of the last cache before device memory (AMD's MI300: the Infinity Cache).
        max_warps: warps that one program may have (1,024 threads).
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int
    multiprocessors: int = 96
    l2_cache: int = 32 << 20

    @property
    def max_warps(self) -> int:
        return 1024 // self.warp_size

    @staticmethod
    def of(device: torch.device) -> Card:
        """The card behind a device; for the interpreter, which has no limits of its own, the smallest of CUDA's."""
        if device.type != "cuda":
            return CARDS["sm_120"]
        return _of_index(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _of_index(index: int) -> Card:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return CARDS.get(name) or Card(
            name,
            "hip",
            name,
            properties.warp_size,
            65_536,
            properties.multi_processor_count,
            properties.L2_cache_size,
        )
    arch = properties.major * 10 + properties.minor
    limit = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return CARDS.get(f"sm_{arch}") or Card(
        f"sm_{arch}", "cuda", arch, 32, limit, properties.multi_processor_count, properties.L2_cache_size
    )


CARDS = {
    card.name: card
    for card in (
        Card("sm_80", "cuda", 80, 32, 166_912, 108, 40 << 20),
        Card("sm_90", "cuda", 90, 32, 232_448, 132, 50 << 20),
        Card("sm_100", "cuda", 100, 32, 232_448, 148, 126 << 20),
        Card("sm_120", "cuda", 120, 32, 101_376, 170, 96 << 20),
        Card("gfx942", "hip", "gfx942", 64, 65_536, 304, 256 << 20),
        Card("gfx950", "hip", "gfx950", 64, 163_840, 256, 256 << 20),
        Card("gfx1100", "hip", "gfx1100", 32, 65_536, 96, 96 << 20),
    )
}
