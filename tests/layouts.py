"""The same matrix with other strides."""

from __future__ import annotations

import torch
from torch import Tensor


def every_other_column(t: Tensor) -> Tensor:
    """A [rows, columns] matrix with neither stride 1; between its columns is NaN."""
    holder = torch.full((t.shape[0], 2 * t.shape[1]), float("nan"), dtype=t.dtype)
    holder[:, ::2] = t
    return holder[:, ::2]


def transposed(t: Tensor) -> Tensor:
    """A matrix whose columns are contiguous."""
    return t.T.contiguous().T
