"""Tensors of any leading dimensions as rows of features."""

from __future__ import annotations

from torch import Tensor


def rows_of(name: str, tensor: Tensor) -> Tensor:
    """[..., features] as [rows, features], whichever of its dimensions is empty.

    Raises:
        RuntimeError: it has no dimension.
    """
    if tensor.dim() == 0:
        raise RuntimeError(f"{name}: expected [..., features], got a tensor without dimensions")
    return tensor[None] if tensor.dim() == 1 else tensor.flatten(0, -2)
