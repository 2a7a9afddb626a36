"""Operators compute in the dtypes they are given: autocast, which would re-cast inner products, stays outside."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def outside_autocast(tensor: Tensor) -> AbstractContextManager:
    """A context with autocast off for the device of ``tensor``; free where it is off already."""
    device_type = tensor.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
