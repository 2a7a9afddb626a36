"""The dtype that sums are carried in."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for every floating dtype but float64, which stays itself."""
    return torch.float64 if dtype == torch.float64 else torch.float32
