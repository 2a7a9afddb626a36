"""What PyTorch keeps beside a module and a tensor: who listens to its calls, and how often it was written to."""

from __future__ import annotations

from torch import Tensor, nn


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook wants to see the module's calls."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def version_of(tensor: Tensor) -> int:
    """How often it was written to in place. PyTorch does not count for a tensor of inference mode: 0 always."""
    return 0 if tensor.is_inference() else tensor._version
