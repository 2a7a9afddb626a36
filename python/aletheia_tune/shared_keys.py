"""Attention's keys and values in a packed row whose examples have their beginning in common, once.

Such a row is the beginning and then what follows it in each example: beginning, rest of 1, rest of 2, and so on. In a
causal model the states of the beginning depend on nothing that follows, so they are those of every example, and their
gradient is the sum of the examples'. A query of a rest sees two ranges of keys, the beginning's and its own rest's up
to itself. Where the beginning is repeated before each rest, the two are one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aletheia_kernels.dtypes import accumulation_dtype


def shared_mask(common: int, starts: Tensor, length: int) -> Tensor:
    """True where a query sees a key, [1, 1, length, length] boolean.

    Args:
        common: tokens of the beginning.
        starts: int64, in ascending order: where the second rest begins, the third, and so on.
        length: of the row.
    """
    position = torch.arange(length, device=starts.device)
    example = torch.searchsorted(starts, position, right=True)
    seen = example[:, None] == example
    seen[:, :common] = True
    return seen.tril_()[None, None]


@dataclass(frozen=True)
class SharedBeginning:
    """The keys of a row with the beginning before each rest, as places in a longer one.

    Attributes:
        keys: [places] int64, the row's key that stands in a place.
        rests: [length] int64, the place of each of the row's keys, of the beginning's the first.
        copies: [examples, common] int64, all places of the beginning's keys.
        first: [1, length] int32, the first place that a query sees.
        last: likewise, the place after the last one.
    """

    keys: Tensor
    rests: Tensor
    copies: Tensor
    first: Tensor
    last: Tensor

    def repeated(self, x: Tensor) -> Tensor:
        """Keys or values of rows [batch, heads, length, dim] in their places [batch, heads, places, dim]."""
        repeated: Tensor = _Repeated.apply(x, self)
        return repeated


class _Repeated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shared: SharedBeginning) -> Tensor:
        ctx.shared = shared
        return _taken(x, shared.keys)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        shared = ctx.shared
        examples, common = shared.copies.shape
        total = _taken(grad, shared.rests)
        copies = _taken(grad, shared.copies.flatten()).unflatten(2, (examples, common))
        total[:, :, :common] = copies.sum(2, dtype=accumulation_dtype(grad.dtype))
        return total, None


def _taken(x: Tensor, places: Tensor) -> Tensor:
    # Attention modules make [batch, length, heads, dim] and transpose it: there a place is one stretch of memory.
    return x.transpose(1, 2).index_select(1, places).transpose(1, 2)


def shared_beginning(mask: Tensor) -> SharedBeginning | None:
    """What a mask [1, 1, length, length] says of the row's examples; None if it is none that `shared_mask` makes."""
    if (
        mask.dtype != torch.bool
        or mask.dim() != 4
        or mask.shape[:2] != (1, 1)
        or mask.shape[2] != mask.shape[3]
    ):
        return None
    seen = mask[0, 0]
    length = len(seen)
    # Where an example begins, its first token does not see the one before it.
    starts = (~seen.diagonal(-1)).nonzero().flatten() + 1
    if len(starts) == 0:
        return None
    common = int(seen[starts[0]].int().argmin())
    if common == 0 or not torch.equal(shared_mask(common, starts, length), mask):
        return None
    position = torch.arange(length, device=mask.device)
    beginning = position[:common]
    example = torch.searchsorted(starts, position, right=True)
    rests = position + common * example
    begins = torch.cat([starts.new_zeros(1), rests[starts] - common])
    copies = begins[:, None] + beginning
    keys = position.new_empty(length + common * len(starts))
    keys[rests] = position
    keys[copies] = beginning.expand_as(copies)
    return SharedBeginning(keys, rests, copies, begins[example][None].int(), rests[None].int() + 1)
