"""Modules that are trained in full beside the adapters: in float32, whatever the dtype of the model.

An update of AdamW is about the learning rate in size. bfloat16 keeps 8 significant bits, so from a weight of 0.02 an
update of 1e-5, less than half of its last bit, rounds away. While it is trained, the weight is therefore kept in
float32, and each forward pass computes with its rounding to the input's dtype: what the model will be once it is saved
in that dtype is what is trained and evaluated. The gradient is that of the rounded weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aletheia_tune.layers import full_modules, is_linear


class _RoundedForward:
    """The forward of a linear with float32 weights: that of the frozen twin beside it, with those weights rounded."""

    def __init__(self, trained: nn.Module, frozen: nn.Module) -> None:
        self.trained = trained
        self.frozen = frozen

    def __call__(self, x: Tensor) -> Any:
        rounded = {name: parameter.to(x.dtype) for name, parameter in self.trained.named_parameters()}
        return functional_call(self.frozen, rounded, (x,))


@contextmanager
def float32_weights(model: nn.Module) -> Iterator[None]:
    """Linears that PEFT trains in full have float32 weights while inside the context, and act rounded.

    Parameters stay the objects they are, so an optimizer may be made before. On exit the weights are rounded to the
    dtype they had, gradients are gone and the forwards are PEFT's own: what is saved then is what stock PEFT loads,
    and computes the same. Where the model is in float32 or float64 nothing changes at all.

    Args:
        model: a PEFT model, on the device that it is trained on.
    """
    taken: dict[Any, torch.dtype] = {}
    for wrapper in full_modules(model).values():
        trained: Any
        for trained in wrapper.modules_to_save.values():
            if is_linear(trained) and torch.finfo(trained.weight.dtype).bits < 32:
                taken[trained] = trained.weight.dtype
                trained.forward = _RoundedForward(trained, wrapper.original_module)
                _cast(trained, torch.float32)
    try:
        yield
    finally:
        for trained, dtype in taken.items():
            del trained.forward
            _cast(trained, dtype)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Gives the module's parameters another dtype and no gradient; they stay the objects they are."""
    for parameter in module.parameters():
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)
