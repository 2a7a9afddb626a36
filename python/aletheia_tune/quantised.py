"""Frozen weights kept in few bits: which linears hold one, what they multiply by, and where their bytes are.

A linear counts when its own product is that of its input with the dequantised weight:

* bitsandbytes' Linear4bit (NF4 or FP4, statistics quantised again or not), in its compute dtype;
* bitsandbytes' Linear8bitLt on a CPU and in training; elsewhere it rounds its input to 8 bits as well;
* torchao's weight-only Int8Tensor and IntxUnpackedToInt8Tensor (1 to 8 bits), in the dtype they were made from.

Neither library is imported here: where there is one of its weights, it has been.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_LIBRARIES = ("bitsandbytes", "torchao")
# bitsandbytes' name for whether a 4-bit linear may lay its weight out anew.
_MAY_PACK = "support_avx512bf16_for_cpu"


@contextmanager
def kept_layout(model: nn.Module) -> Iterator[None]:
    """bitsandbytes leaves 4-bit weights as they are, whatever mode the model runs in.

    On a processor with AVX512-BF16 the first forward pass in evaluation mode on an input without a gradient would lay
    them out anew in place, for a kernel of its own: scales rounded to bfloat16, and no gradient of the input from then
    on, in training neither.
    """
    packing = [module for module in model.modules() if module.__dict__.get(_MAY_PACK)]
    for module in packing:
        setattr(module, _MAY_PACK, False)
    try:
        yield
    finally:
        for module in packing:
            setattr(module, _MAY_PACK, True)


class Scheme(ABC):
    """How one kind of quantised linear is read.

    Attributes:
        mixes_rows: whether a row of its output depends on the other rows outside training.
    """

    mixes_rows = False

    @abstractmethod
    def knows(self, base: Any) -> bool:
        """Whether this linear's own product is with the dequantised weight and nothing else."""

    @abstractmethod
    def product_dtype(self, base: Any, x: Tensor) -> torch.dtype | None:
        """The dtype in which the linear, as it is set now, multiplies x; None where it computes something else."""

    @abstractmethod
    def dequantised(self, base: Any, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] that x is multiplied by, made anew in bfloat16, float16 or float32."""

    @abstractmethod
    def parts(self, base: Any) -> dict[str, Tensor]:
        """The tensors that the weight is kept as."""


class _FourBit(Scheme):
    def knows(self, base: Any) -> bool:
        state = base.weight.quant_state
        return (
            isinstance(base, nn.Linear)
            and type(base).__module__.startswith("bitsandbytes.")
            and state is not None
            and tuple(state.shape) == (base.out_features, base.in_features)
        )

    def product_dtype(self, base: Any, x: Tensor) -> torch.dtype | None:
        if getattr(base.weight.quant_state, "packing_format_for_cpu", False):
            return None  # laid out anew for bitsandbytes' own inference
        # Unless a dtype was set, that of the first input is taken for good.
        dtype = (base.compute_dtype if base.compute_type_is_set else None) or x.dtype
        return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else None

    def dequantised(self, base: Any, dtype: torch.dtype) -> Tensor:
        state, operators = base.weight.quant_state, torch.ops.bitsandbytes
        absmax = state.absmax
        if state.nested:
            again = state.state2
            absmax = operators.dequantize_blockwise(
                absmax, again.absmax, again.code, again.blocksize, torch.float32
            )
            absmax = absmax + state.offset
        codes = base.weight.detach().as_subclass(Tensor).reshape(-1, 1)
        return operators.dequantize_4bit(
            codes, absmax, state.blocksize, state.quant_type, list(state.shape), dtype
        )

    def parts(self, base: Any) -> dict[str, Tensor]:
        state = base.weight.quant_state
        parts = {
            "weight": base.weight.detach().as_subclass(Tensor),
            "absmax": state.absmax,
            "code": state.code,
        }
        if state.nested:
            parts.update(
                offset=state.offset, nested_absmax=state.state2.absmax, nested_code=state.state2.code
            )
        return parts


class _EightBit(Scheme):
    mixes_rows = True  # outliers are looked for by column

    def knows(self, base: Any) -> bool:
        return (
            isinstance(base, nn.Linear)
            and type(base).__module__.startswith("bitsandbytes.")
            and base.weight.dtype == torch.int8
        )

    def product_dtype(self, base: Any, x: Tensor) -> torch.dtype | None:
        return x.dtype if base.training and x.device.type == "cpu" else None

    def dequantised(self, base: Any, dtype: torch.dtype) -> Tensor:
        codes, absmax = self.parts(base).values()
        return codes.to(dtype, copy=True).mul_(absmax.unsqueeze(1).mul(1.0 / 127.0))

    def parts(self, base: Any) -> dict[str, Tensor]:
        # The first forward pass takes them from the parameter to the layer's state.
        absmax = base.weight.SCB if base.state.SCB is None else base.state.SCB
        return {"weight": base.weight.detach().as_subclass(Tensor), "absmax": absmax}


class _TorchAO(Scheme):
    # What else the product does: round or scale its input.
    _INPUT_SETTINGS = ("act_quant_kwargs", "activation_quantization", "act_quant_scale", "act_pre_scale")

    def knows(self, base: Any) -> bool:
        return type(base) is nn.Linear and all(
            getattr(base.weight, name, None) is None for name in self._INPUT_SETTINGS
        )

    def product_dtype(self, base: Any, x: Tensor) -> torch.dtype | None:
        return x.dtype if x.dtype == base.weight.dtype else None

    def dequantised(self, base: Any, dtype: torch.dtype) -> Tensor:
        made: Tensor = base.weight.dequantize()
        return made.to(dtype)

    def parts(self, base: Any) -> dict[str, Tensor]:
        names, _ = base.weight.__tensor_flatten__()
        return {name: getattr(base.weight, name) for name in names}


_SCHEMES: dict[tuple[str, str], Scheme] = {
    ("bitsandbytes", "Params4bit"): _FourBit(),
    ("bitsandbytes", "Int8Params"): _EightBit(),
    ("torchao", "Int8Tensor"): _TorchAO(),
    ("torchao", "IntxUnpackedToInt8Tensor"): _TorchAO(),
}


def _origin(weight: Any) -> tuple[str, str]:
    return type(weight).__module__.partition(".")[0], type(weight).__name__


def scheme_of(base: nn.Module) -> Scheme | None:
    """How a quantised linear is read; None for any other module, and for a quantised one that is not known here."""
    weight = base._parameters.get("weight")
    if weight is None or type(weight) is nn.Parameter:
        return None
    scheme = _SCHEMES.get(_origin(weight))
    return scheme if scheme is not None and scheme.knows(base) else None


def unknown_quantisation(base: nn.Module) -> str | None:
    """What a weight is, for a linear that is quantised in a way that is not known here; None for all others."""
    weight = base._parameters.get("weight")
    library, name = _origin(weight)
    unknown = library in _LIBRARIES and scheme_of(base) is None
    return f"{library} {name}" if unknown else None


def product_dtype(base: Any, x: Tensor) -> torch.dtype | None:
    """The dtype in which an operator multiplies x by a linear's weight; None where it must be left to the linear.

    A plain weight multiplies x of its own dtype, or x that autocast casts to that. A quantised one is left alone under
    autocast.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    scheme = scheme_of(base)
    if scheme is not None:
        return None if autocast else scheme.product_dtype(base, x)
    own: torch.dtype = base.weight.dtype
    return own if own == (torch.get_autocast_dtype(x.device.type) if autocast else x.dtype) else None


def weight_of(base: Any, dtype: torch.dtype) -> Tensor | Callable[[], Tensor]:
    """The weight [out, in] of a linear as `aletheia_kernels.lora_group` takes it: a quantised one as what makes it."""
    scheme = scheme_of(base)
    if scheme is not None:
        return partial(scheme.dequantised, base, dtype)
    weight: Tensor = base.weight
    return weight.T if isinstance(base, Conv1D) else weight


def bias_of(base: Any, dtype: torch.dtype) -> Tensor | None:
    """The bias of a linear; where the weight is quantised, cast to the product's dtype."""
    bias: Tensor | None = base.bias
    return bias if bias is None or scheme_of(base) is None else bias.to(dtype)


def stored_parameters(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters by name, a quantised weight as the tensors that it is kept as."""
    found: dict[str, Tensor] = {name: p for name, p in module._parameters.items() if p is not None}
    scheme = scheme_of(module)
    if scheme is not None:
        del found["weight"]
        found.update({f"weight.{name}": part for name, part in scheme.parts(module).items()})
    return found


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, each once, quantised ones as they are kept."""
    tensors = {
        id(tensor): tensor for module in model.modules() for tensor in stored_parameters(module).values()
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
