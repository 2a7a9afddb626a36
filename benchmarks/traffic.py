"""What a piece of a training step moves and multiplies, counted from what it runs on the meta device.

Kernels of our own state their traffic where they are launched. Of everything else PyTorch's dispatcher is asked: an
operation moves its inputs and its outputs, each tensor once; views and allocations move nothing, and products are
counted as PyTorch's own FLOP formulas do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from aletheia_kernels.triton.cards import CARDS
from aletheia_kernels.triton.launch import Recording, recording

aten = torch.ops.aten

# The vendor library's products.
PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm", "baddbmm", "_grouped_mm"})
_MOVES_NOTHING = frozenset(
    {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_"}
)
# Operations that write without reading what they are given for its shape, or what they overwrite.
_ONLY_WRITES = frozenset(
    {"zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full", "full_like", "fill_", "zero_", "arange"}
)
# Operations that touch of their first tensor only what they select.
_SELECTS = frozenset({"index", "index_select", "embedding", "gather"})
_SCATTERS = frozenset({"index_put_", "_index_put_impl_", "index_add_", "scatter_"})

# A launch's share of a stream that no traffic explains: a start, a tail, and the gap to the next.
OVERHEAD_S = 3e-6


@dataclass(frozen=True)
class Cost:
    """One launch: an operation's or a kernel's name, bytes of device memory, and FLOPs (a multiply-add is two)."""

    name: str
    bytes: int
    flops: int


@dataclass(frozen=True)
class Rate:
    """What was measured on a card: bytes a second of a device copy, FLOPs a second of a large bfloat16 product."""

    card: str
    bandwidth: float
    flops: float

    def seconds(self, costs: Sequence[Cost]) -> float:
        """What the launches take one after another, each bound by memory or by arithmetic."""
        return sum(max(c.bytes / self.bandwidth, c.flops / self.flops) + OVERHEAD_S for c in costs)


RATES = (Rate("H100", 3.0e12, 798e12), Rate("H200", 4.3e12, 788e12))


def size_of(tensor: Tensor) -> int:
    """Bytes that a tensor's elements take in memory; those that an expanded dimension repeats count once."""
    count = 1
    for extent, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= extent if stride or not extent else 1
    return count * tensor.element_size()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _bytes(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    """What an operation reads and writes."""
    name = func._schema.name.removeprefix("aten::")
    read: list[Tensor] = []
    written: list[Tensor] = []
    given = list(zip(func._schema.arguments, args, strict=False))
    given += [(a, kwargs[a.name]) for a in func._schema.arguments if a.name in kwargs]
    for argument, value in given:
        tensors = _tensors(value)
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors
            if not argument.is_out and name != "copy_":
                read += tensors
        else:
            read += tensors
    if not written:
        written = _tensors(out)
    if name in _ONLY_WRITES:
        read = []
    if name in _SELECTS:
        return sum(map(size_of, read[1:])) + 2 * sum(map(size_of, written))
    if name in _SCATTERS:
        moved = read[-1]
        return sum(map(size_of, read[1:])) + 2 * size_of(moved)
    # One tensor given twice is read once.
    distinct = {(t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()): t for t in read}
    return sum(map(size_of, distinct.values())) + sum(map(size_of, written))


def _flops(func: Any, args: tuple, kwargs: dict, out: Any) -> int:
    if func._overloadpacket == aten._grouped_mm:
        (rows, inner), columns = args[0].shape, args[1].shape[-1]
        return 2 * rows * inner * columns
    out_of_place = func._schema.name.removeprefix("aten::").removesuffix("_")
    formula = flop_registry.get(getattr(aten, out_of_place, None))
    return formula(*args, **kwargs, out_val=out) if formula else 0


class _Operations(TorchDispatchMode):
    """Keeps what every operation costs."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in _MOVES_NOTHING:
            cost = Cost(name, _bytes(func, args, kwargs, out), _flops(func, args, kwargs, out))
            if cost.bytes:  # of nothing, nothing is launched
                self.costs.append(cost)
        return out


@dataclass(frozen=True)
class Counted:
    """What a block ran, as :func:`counting` keeps it."""

    operations: list[Cost]
    recorded: Recording

    @property
    def costs(self) -> list[Cost]:
        """PyTorch's operations, then our kernels."""
        return self.operations + [
            Cost(launch.name, launch.traffic.read + launch.traffic.written, launch.traffic.flops)
            for launch in self.recorded.launches
        ]


@contextmanager
def counting() -> Iterator[Counted]:
    """Counts what the block runs; our kernels choose their block sizes for an H100."""
    with recording(CARDS["sm_90"]) as recorded, _Operations() as operations:
        yield Counted(operations.costs, recorded)


def products(costs: Sequence[Cost]) -> list[Cost]:
    """The vendor library's products."""
    return [cost for cost in costs if cost.name in PRODUCTS]


def others(costs: Sequence[Cost]) -> list[Cost]:
    """Everything else."""
    return [cost for cost in costs if cost.name not in PRODUCTS]


def total_bytes(costs: Sequence[Cost]) -> int:
    return sum(cost.bytes for cost in costs)


def total_flops(costs: Sequence[Cost]) -> int:
    return sum(cost.flops for cost in costs)
