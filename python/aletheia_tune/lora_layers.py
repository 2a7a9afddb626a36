"""What a PEFT LoRA layer, built and set as it is, lets an operator compute in its stead."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from aletheia_tune.dora import dora_reason, is_dora
from aletheia_tune.quantised import kept_layout, product_dtype, scheme_of, unknown_quantisation
from aletheia_tune.sharding import is_sharded
from aletheia_tune.torch_state import is_hooked

# Of a linear with a plain weight and with a quantised one; by name, since PEFT's own modules import the libraries.
_LORA_LINEARS = ("layer.Linear", "bnb.Linear4bit", "bnb.Linear8bitLt", "torchao.TorchaoLoraLinear")

# Of fewer, as in decoding, torch reads a frozen weight once as it is, the operator rounds or widens it first. With
# AVX512-VNNI one row of 576 → 576 takes 0.07 ms against 0.23, of 576 → 49,152 4.5 against 6.1; eight rows take 0.24
# against 0.30 and 15.3 against 7.8.
_FEWEST_ROWS = 8


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients and a private random state; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        model.eval()
        with torch.no_grad(), kept_layout(model), torch.random.fork_rng(devices=list(devices)):
            yield
    finally:
        for module, training in modes:
            module.training = training


class Replacement:
    """A forward put in a module's place of its own; ``replaced`` is what stood there, or None for the class's."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.replaced = module.__dict__.get("forward")

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that this one stands before."""
        return (self.replaced or type(self.module).forward.__get__(self.module))(*args, **kwargs)

    def restore(self) -> None:
        """Puts the module back as it was found."""
        if self.replaced is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self.replaced


def _class_name(layer: object) -> str:
    return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__name__}"


def is_lora_linear(layer: object) -> bool:
    """Whether a module is PEFT's LoRA on a linear, its weight quantised or not."""
    return _class_name(layer) in [f"lora.{name}" for name in _LORA_LINEARS]


def structural_reason(layer: Any) -> str | None:
    """Why a layer can never run on the operator while it is built as it is; None when it can."""
    if not is_lora_linear(layer):
        return f"{_class_name(layer)} has no operator"
    base = layer.get_base_layer()
    if isinstance(layer.base_layer, LoraLayer):
        return f"its base layer is a {type(base).__name__}"
    if (quantised := unknown_quantisation(base)) is not None:
        return f"its base layer multiplies by more than a dequantised weight ({quantised})"
    if scheme_of(base) is None and not _computes_a_linear(base):
        return f"its base layer is a {type(base).__name__}"
    return None


def _computes_a_linear(base: nn.Module) -> bool:
    """Whether a base layer computes x Wᵀ + b, or x W + b, from its own weight and bias.

    A class of a model's own that derives from nn.Linear (Falcon's) may compute anything: it is tried on a few numbers.
    """
    if type(base) in (nn.Linear, Conv1D):
        return True
    if not isinstance(base, nn.Linear) or type(base.weight) is not nn.Parameter or is_hooked(base):
        return False
    weight = base.weight
    if not weight.is_floating_point() or weight.shape != (base.out_features, base.in_features):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, base.in_features, generator=generator).to(weight)
    try:
        with torch.no_grad():
            got, expected = base(x), nn.functional.linear(x, weight, base.bias)
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    # Of sums in another order, on inputs of order 1.
    precision = 8 * torch.finfo(weight.dtype).eps
    return torch.allclose(
        got.double(), expected.double(), rtol=precision, atol=precision * float(expected.abs().max())
    )


def state_reason(layer: Any) -> str | None:
    """Why a layer's present state needs PEFT's own forward; None when the operator computes the same."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "adapters are merged into the weight"
    # Asked at every call: a module's own look-up of its parts takes longer than all else here.
    parts = layer._modules
    base, lora_As = parts["base_layer"], parts["lora_A"]._modules
    active = [name for name in layer.active_adapters if name in lora_As]
    if len(active) != 1:
        return f"{len(active)} adapters are active on it"
    name = active[0]
    if name in layer.lora_variant:
        if not is_dora(layer, name):
            return f"the adapter is a {type(layer.lora_variant[name]).__name__}"
        if (reason := dora_reason(layer, name)) is not None:
            return reason
    lora_A, lora_B = lora_As[name], parts["lora_B"]._modules[name]
    dropout = parts["lora_dropout"]._modules[name]
    if base._parameters["weight"].requires_grad:
        return "its base weight is trained"
    if type(lora_A) is not nn.Linear or type(dropout) not in (nn.Identity, nn.Dropout):
        return f"the adapter is made of {type(lora_A).__name__} and {type(dropout).__name__}"
    if lora_B.bias is not None or lora_A.bias is not None:
        return "the adapter has a bias of its own (lora_bias)"
    for part in (base, lora_A, lora_B, dropout):
        if is_hooked(part):
            return "a hook is registered on its base layer or adapter"
        if "forward" in part.__dict__:
            return "the forward of its base layer or adapter is replaced"
    return None


def dropout_p(layer: nn.Module) -> float:
    """The dropout probability that a call would apply now; 0 of a linear without an adapter."""
    if not isinstance(layer, LoraLayer):
        return 0.0
    dropout = layer.lora_dropout[active_adapter(layer)]
    return float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0


def has_dropout(layer: LoraLinear) -> bool:
    """Whether a call would apply dropout in training."""
    dropout = layer.lora_dropout[active_adapter(layer)]
    return isinstance(dropout, nn.Dropout) and dropout.p > 0.0


def active_adapter(layer: LoraLayer) -> str:
    """The name of the first active adapter that the layer has."""
    return next(name for name in layer.active_adapters if name in layer.lora_A)


def base_of(layer: Any) -> Any:
    """The linear that holds the weight: of a LoRA layer its base, else the layer itself."""
    return layer.base_layer if isinstance(layer, LoraLayer) else layer


def adapters_of(layers: Sequence[Any], x: Tensor) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """A, B and scaling of every projection, of rank 0 where it has no adapter.

    What stands in for an adapter that is not there has the dtype of those that are: kernels take one for all.
    """
    names = [active_adapter(layer) if isinstance(layer, LoraLayer) else None for layer in layers]
    known = list(zip(layers, names, strict=True))
    dtype = next((layer.lora_A[name].weight.dtype for layer, name in known if name), x.dtype)
    lora_As, lora_Bs, scalings = [], [], []
    for layer, name in known:
        if name is None:
            lora_As.append(x.new_empty(0, layer.in_features, dtype=dtype))
            lora_Bs.append(x.new_empty(layer.out_features, 0, dtype=dtype))
            scalings.append(0.0)
        else:
            lora_As.append(layer.lora_A[name].weight)
            lora_Bs.append(layer.lora_B[name].weight)
            scalings.append(float(layer.scaling[name]))
    return lora_As, lora_Bs, scalings


def serves(layer: Any, x: Tensor) -> bool:
    """Whether the operator computes this call: the state allows it and x has, or is cast to, the product's dtype.

    Args:
        layer: a LoRA linear, or a linear without an adapter.
        x: its input.
    """
    base = base_of(layer)
    if base is layer:
        left = base.weight.requires_grad or x.numel() < _FEWEST_ROWS * x.shape[-1]
    else:
        left = state_reason(layer) is not None
    if left or not x.is_floating_point() or dropout_p(layer) >= 1.0:
        return False
    if is_sharded(base.weight):
        # A sibling that was given to fully_shard by itself: its weights are there in its own call alone.
        return False
    return product_dtype(base, x) is not None
