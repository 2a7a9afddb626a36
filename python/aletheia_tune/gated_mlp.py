"""Gated MLPs of a model on one operator: found by their parts, believed after a numerical check."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import aletheia_kernels
from aletheia_kernels.gated_mlp import ACTIVATIONS
from aletheia_tune.dora import is_dora
from aletheia_tune.layers import linear_shape
from aletheia_tune.lora_layers import (
    Replacement,
    active_adapter,
    adapters_of,
    base_of,
    dropout_p,
    is_lora_linear,
    serves,
    structural_reason,
    undisturbed,
)
from aletheia_tune.quantised import bias_of, product_dtype, scheme_of, unknown_quantisation, weight_of
from aletheia_tune.torch_state import is_hooked

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
    adapted = is_lora_linear(layer)
    if adapted and (structural_reason(layer) is not None or layer.lora_variant):
        return False
    base = base_of(layer)
    if not isinstance(base, nn.Module):
        return False
    return scheme_of(base) is not None or (type(base) is nn.Linear and unknown_quantisation(base) is None)


def _input_dtype(projection: Any) -> torch.dtype | None:
    """A dtype that a projection may be tried in; None of one that has yet to see what it will compute in."""
    if scheme_of(projection) is None or projection.weight.is_floating_point():
        return projection.weight.dtype
    return getattr(projection, "compute_dtype", torch.float32)


def activation_of(module: nn.Module) -> str | None:
    """The activation of a gated MLP that the operator computes; None for any other module.

    A module counts when it holds the parts under their names, and its own forward gives, bit for bit, what the parts
    composed give on a random input, in evaluation and in training: some drop out of their output.
    """
    parts: list[Any] = [getattr(module, name, None) for name in PARTS]
    act = getattr(module, ACTIVATION, None)
    if not callable(act) or not all(_is_projection(part) for part in parts):
        return None
    gate, up = (base_of(part) for part in parts[:2])
    dtype = _input_dtype(gate)
    if linear_shape(gate) != linear_shape(up) or gate.weight.device.type == "meta" or dtype is None:
        return None
    activation = _activation(act)
    if activation is None or isinstance(module.__dict__.get("forward"), Replacement):
        return activation
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, gate.in_features, generator=generator).to(gate.weight.device, dtype)
    try:
        with undisturbed(module):
            for training in (False, True):
                module.train(training)
                torch.manual_seed(0)  # for the dropout of adapters, which both apply
                composed = parts[2](act(parts[0](x)) * parts[1](x))
                torch.manual_seed(0)
                if not torch.equal(module(x), composed):
                    return None
    except (TypeError, RuntimeError, ValueError):  # its forward wants other arguments
        return None
    return activation


class GatedMlpForward(Replacement):
    """The forward that replaces a gated MLP's own; whatever the operator does not compute runs the original."""

    def __init__(self, module: nn.Module, activation: str) -> None:
        super().__init__(module)
        self.activation = activation
        self.act = getattr(module, ACTIVATION)
        parts = (getattr(module, name) for name in PARTS)
        self.quantised = any(scheme_of(base_of(part)) is not None for part in parts)

    def _projection(self, layer: Any, x: Tensor) -> tuple[Any, ...] | None:
        """dtype, weight and bias of a projection that the operator may compute; None when it may not."""
        if is_hooked(layer):
            return None
        forward = layer.__dict__.get("forward")
        if forward is not None and not isinstance(forward, Replacement):
            return None
        if is_lora_linear(layer):
            if not serves(layer, x) or dropout_p(layer) > 0.0:
                return None
            if is_dora(layer, active_adapter(layer)):
                return None
        elif torch.is_autocast_enabled(x.device.type):
            return None
        base = base_of(layer)
        dtype = product_dtype(base, x)
        # Between quantised projections the activations are in x's dtype: a product in another is left to them.
        if dtype is None or (dtype != x.dtype and scheme_of(base) is not None):
            return None
        if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            return None
        return dtype, weight_of(base, dtype), bias_of(base, dtype)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # A compiled graph would keep the dequantised weight for its backward pass.
        left = self.quantised and torch.compiler.is_compiling()
        act = getattr(self.module, ACTIVATION)
        changed = act is not self.act or (isinstance(act, nn.Module) and is_hooked(act))
        layers = [] if args or kwargs or left or changed else [getattr(self.module, name) for name in PARTS]
        parts = [self._projection(layer, x) for layer in layers]
        known = [part for part in parts if part is not None]
        if len(known) < len(PARTS):
            return self.original(x, *args, **kwargs)
        dtypes, weights, biases = (list(column) for column in zip(*known, strict=True))
        return aletheia_kernels.lora_gated_mlp(
            x.to(dtypes[0]), weights, biases, *adapters_of(layers, x), activation=self.activation
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
