"""Gated MLPs of a model on one operator: found by their parts, believed after a numerical check."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

import aletheia_kernels
from aletheia_kernels.gated_mlp import ACTIVATIONS
from aletheia_tune.dora import is_dora
from aletheia_tune.lora_layers import (
    Replacement,
    active_adapter,
    dropout_p,
    is_hooked,
    serves,
    structural_reason,
)

# The names under which transformers' models keep down(act(gate(x)) ⊙ up(x)).
PARTS = ("gate_proj", "up_proj", "down_proj")
ACTIVATION = "act_fn"


def _activation(act: Any) -> str | None:
    """Which of the operator's activations ``act`` is; None for another."""
    grid = torch.linspace(-8, 8, 257)
    exact = (torch.nn.functional.silu(grid), torch.nn.functional.gelu(grid, approximate="tanh"))
    with torch.no_grad():
        given = act(grid)
    for name, values in zip(ACTIVATIONS, exact, strict=True):
        if torch.allclose(given, values, rtol=1e-5, atol=1e-6):
            return name
    return None


def _is_projection(layer: Any) -> bool:
    return type(layer) is nn.Linear or (
        type(layer) is LoraLinear
        and type(layer.base_layer) is nn.Linear
        and structural_reason(layer) is None
        and not layer.lora_variant
    )


def activation_of(module: nn.Module) -> str | None:
    """The activation of a gated MLP that the operator computes; None for any other module.

    A module counts when it holds the parts under their names, and its own forward gives, bit for bit, what the parts
    composed give on a random input.
    """
    parts: list[Any] = [getattr(module, name, None) for name in PARTS]
    act = getattr(module, ACTIVATION, None)
    if not callable(act) or not all(_is_projection(part) for part in parts):
        return None
    gate, up = (getattr(part, "base_layer", part) for part in parts[:2])
    if gate.weight.shape != up.weight.shape or gate.weight.device.type == "meta":
        return None
    activation = _activation(act)
    if activation is None or isinstance(module.__dict__.get("forward"), Replacement):
        return activation
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, gate.weight.shape[1], generator=generator).to(gate.weight)
    try:
        with torch.no_grad():
            composed = parts[2](act(parts[0](x)) * parts[1](x))
            return activation if torch.equal(module(x), composed) else None
    except (TypeError, RuntimeError, ValueError):  # its forward wants other arguments
        return None


class GatedMlpForward(Replacement):
    """The forward that replaces a gated MLP's own; whatever the operator does not compute runs the original."""

    def __init__(self, module: nn.Module, activation: str) -> None:
        super().__init__(module)
        self.activation = activation

    def _projection(self, layer: Any, x: Tensor) -> tuple[Any, ...] | None:
        """weight, bias, A, B and scaling of a projection that the operator may compute; None when it may not."""
        if is_hooked(layer):
            return None
        forward = layer.__dict__.get("forward")
        if forward is not None and not isinstance(forward, Replacement):
            return None
        if type(layer) is LoraLinear:
            if not serves(layer, x) or dropout_p(layer) > 0.0:
                return None
            base, name = layer.base_layer, active_adapter(layer)
            if is_dora(layer, name):
                return None
            adapter = layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])
        else:
            base, weight = layer, layer.weight
            if torch.is_autocast_enabled(x.device.type) or weight.dtype != x.dtype:
                return None
            adapter = weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0), 0.0
        if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            return None
        return base.weight, base.bias, *adapter

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = [] if args or kwargs else [self._projection(getattr(self.module, name), x) for name in PARTS]
        known = [part for part in parts if part is not None]
        if len(known) < len(PARTS):
            return self.original(x, *args, **kwargs)
        weights, biases, lora_As, lora_Bs, scalings = (list(column) for column in zip(*known, strict=True))
        return aletheia_kernels.lora_gated_mlp(
            x.to(weights[0].dtype), weights, biases, lora_As, lora_Bs, scalings, activation=self.activation
        )


def apply_gated_mlps(model: nn.Module) -> list[str]:
    """Puts the operator before every gated MLP's forward; undone by :func:`aletheia_tune.patch.restore`.

    Returns:
        The names of the MLPs, with and without adapters.
    """
    found = {
        name: activation
        for name, module in model.named_modules()
        if (activation := activation_of(module)) is not None
    }
    for name, activation in found.items():
        module: Any = model.get_submodule(name)
        if not isinstance(module.__dict__.get("forward"), Replacement):
            module.forward = GatedMlpForward(module, activation)
    return list(found)
