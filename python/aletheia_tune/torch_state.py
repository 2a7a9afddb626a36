"""What PyTorch keeps beside a module and a tensor: who listens to its calls, and how often it was written to."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook wants to see the module's calls."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def counts_writes(tensor: Tensor) -> bool:
    """Whether PyTorch counts what is written to a tensor in place, as for all but those of inference mode."""
    # A compiler cannot trace the question, and traces no tensor of inference mode.
    return torch.compiler.is_compiling() or not tensor.is_inference()


def version_of(tensor: Tensor) -> int:
    """How often it was written to in place; 0 always where that is not counted."""
    return tensor._version if counts_writes(tensor) else 0
