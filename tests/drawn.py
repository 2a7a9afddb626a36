"""Random operands, and the dtypes that they come in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


def normals(dtype: torch.dtype, seed: int) -> Callable[..., Tensor]:
    """A function of a shape, and of what the variance is divided by; its values are drawn in float64 and rounded."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, over: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) / over**0.5).to(dtype)

    return normal
