"""The one way to launch a kernel: on the device, under the interpreter, or onto a list that nobody runs.

What a launch moves and multiplies is stated where it is launched, and kept when somebody records. Recording on meta
tensors runs nothing: that is how launches are counted, and compiled for cards that are not there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from aletheia_kernels.triton.cards import Card


@dataclass(frozen=True)
class Traffic:
    """What one launch costs: ``read`` and ``written`` bytes of device memory, and ``flops`` (a multiply-add is two).

    A tensor counts once for every pass that the grid makes over it, less what a card's second-level cache is sure to
    hold: the operator's file says which that is.
    """

    read: int
    written: int
    flops: int


@dataclass(frozen=True)
class Options:
    """How a kernel is compiled besides its block sizes."""

    num_warps: int = 4
    num_stages: int = 2

    def for_triton(self) -> dict[str, Any]:
        """The options under Triton's names; multiply-adds are fused, as not every version of Triton does unasked."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class Launch:
    """One launch: the ``@triton.jit`` function, grid, run-time arguments, constexprs, options, and what it costs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Options
    traffic: Traffic

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


@dataclass
class Recording:
    """Launches in order; ``card`` is the one that launchers shall choose their block sizes for."""

    card: Card
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recording(card: Card) -> Iterator[Recording]:
    """Keeps every launch of the block, as launched for ``card``."""
    kept = Recording(card)
    token = _recording.set(kept)
    try:
        yield kept
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether launches are being kept, so that operators may be called on meta tensors."""
    return _recording.get() is not None


def card_for(tensor: Tensor) -> Card:
    """The card whose limits a launch over this tensor has to respect."""
    kept = _recording.get()
    if kept is not None:
        return kept.card
    return Card.of(tensor.device)


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments, those in tuples too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


def launch(
    kernel: Any,
    grid: Sequence[int],
    arguments: Mapping[str, Any],
    constants: Mapping[str, Any],
    options: Options,
    traffic: Traffic,
) -> None:
    """Launches ``kernel[grid]``, unless the grid is empty; tensors on the meta device are recorded and not run."""
    grid = tuple(int(extent) for extent in grid)
    if 0 in grid:
        return
    kept = _recording.get()
    if kept is not None:
        kept.launches.append(Launch(kernel, grid, dict(arguments), dict(constants), options, traffic))
    tensors = list(_tensors(arguments.values()))
    if any(tensor.is_meta for tensor in tensors):
        return
    with torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else nullcontext():
        kernel[grid](**arguments, **constants, **options.for_triton())
