"""Modules that are trained in full beside the adapters: in float32, whatever the dtype of the model.

An update of AdamW is about the learning rate in size. bfloat16 keeps 8 significant bits, so from a weight of 0.02 an
update of 1e-5, less than half of its last bit, rounds away. While it is trained, the weight is therefore kept in
float32, and each forward pass computes with its rounding to the dtype it had: what the model will be once it is saved
in that dtype is what is trained and evaluated. The gradient is that of the rounded weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aletheia_tune.layers import full_modules


class _Behind(nn.Module):
    """A module by the forward that it had: called through this one, neither its new forward nor its hooks run."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self.original = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)


class _RoundedForward:
    """The forward of a module with float32 weights: its own, with those weights rounded."""

    def __init__(self, module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
        self.module = module
        self.dtypes = dtypes
        self.behind = _Behind(module, module.forward)
        self.input_dtype = next(iter(dtypes.values()))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameters = dict(self.module.named_parameters())
        rounded = {f"module.{name}": parameters[name].to(dtype) for name, dtype in self.dtypes.items()}
        args = tuple(self._as_before(value) for value in args)
        return functional_call(
            self.behind, rounded, args, {name: self._as_before(value) for name, value in kwargs.items()}
        )

    def _as_before(self, value: Any) -> Any:
        """An input in the dtype that it has without float32 weights: T5 casts it to that of the weight it reads."""
        is_wide = isinstance(value, Tensor) and value.dtype == torch.float32
        return value.to(self.input_dtype) if is_wide else value


@contextmanager
def float32_weights(model: nn.Module) -> Iterator[None]:
    """What PEFT trains in full has float32 weights while inside the context, and acts rounded.

    Parameters stay the objects they are, so an optimizer may be made before. On exit the weights are rounded to the
    dtype they had, gradients are gone and the forwards are PEFT's own: what is saved then is what stock PEFT loads,
    and computes the same. Where the model is in float32 or float64 nothing changes at all.

    Args:
        model: a PEFT model, on the device that it is trained on.
    """
    modules = [each for wrapper in full_modules(model).values() for each in wrapper.modules_to_save.values()]
    narrow = {
        parameter: parameter.dtype
        for module in modules
        for parameter in module.parameters()
        if parameter.is_floating_point() and torch.finfo(parameter.dtype).bits < 32
    }
    forwards: dict[Any, Any] = {}
    for module in modules:
        dtypes = {name: narrow[p] for name, p in module.named_parameters() if p in narrow}
        if dtypes:
            forwards[module] = module.__dict__.get("forward")
            module.forward = _RoundedForward(module, dtypes)
    _cast(dict.fromkeys(narrow, torch.float32))
    try:
        yield
    finally:
        for module, forward in forwards.items():
            del module.forward
            if forward is not None:
                module.forward = forward
        _cast(narrow)


def _cast(dtypes: Mapping[nn.Parameter, torch.dtype]) -> None:
    """Gives parameters another dtype and no gradient; they stay the objects they are."""
    for parameter, dtype in dtypes.items():
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)
