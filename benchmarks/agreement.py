"""No speed of a wrong operator: what is timed must first agree with what it is timed against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Two bfloat16 computations of one thing in other orders.
ALLOWED = 3e-2


def assert_agree(given: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Relative RMS difference of every tensor; none of them zero or not finite."""
    for one, two in zip(given, other, strict=True):
        scale = two.double().norm()
        assert torch.isfinite(scale)
        assert scale > 0
        assert (one.double() - two.double()).norm() <= ALLOWED * scale
