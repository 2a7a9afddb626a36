"""Adapters on stacked experts (PEFT's ``target_parameters``) as LoRA of each expert's tokens.

PEFT adds s B_e A_e to the weight W_e [out, in] of every expert anew in each forward pass, whether tokens reach it or
not, and takes the gradients of A_e and B_e from one of the whole weight. Here tokens are sorted by expert, and each
expert's pass through W_e and beside it through A_e and B_e (:mod:`aletheia_kernels.reference.experts`): neither the sum
nor a gradient of its size is ever made, nor is the sum rounded to the weight's dtype.

PEFT wraps a module once for each of its parameters, one wrapper in another. The outermost is what the model calls, and
its forward is the one replaced. Between the projections the module's own activation and biases are used, as in
transformers' grouped experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

import aletheia_kernels
from aletheia_kernels.backends import BackendError
from aletheia_tune.lora_layers import Replacement, active_adapter
from aletheia_tune.torch_state import is_hooked

# What a module of transformers' experts interface says of itself.
FACTS = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "config")
# Ways to compute the same. Others are someone's own, or for hardware of their own.
IMPLEMENTATIONS = (None, "eager", "grouped_mm", "batched_mm")


def find_experts(model: nn.Module) -> list[dict[str, ParamWrapper]]:
    """For every module with adapters on its parameters the wrappers around it by name, from the outermost in."""
    found: list[dict[str, ParamWrapper]] = []
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and not any(name in wrappers for wrappers in found):
            wrappers = {}
            while isinstance(module, ParamWrapper):
                wrappers[name] = module
                name, module = f"{name}.base_layer".removeprefix("."), module.base_layer
            found.append(wrappers)
    return found


def _projections(experts: Any) -> tuple[str, str]:
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def _other_implementation(experts: Any) -> str | None:
    implementation = experts.config._experts_implementation
    return None if implementation in IMPLEMENTATIONS else f"its experts run on {implementation!r}"


def experts_structural_reason(wrappers: Sequence[ParamWrapper]) -> str | None:
    """Why experts can never run on the operator while they are built as they are; None when they can."""
    experts: Any = wrappers[-1].base_layer
    kind = type(experts).__name__
    if not all(hasattr(experts, fact) for fact in FACTS):
        return f"{kind} is no module of transformers' experts interface"
    names = _projections(experts)
    for wrapper in wrappers:
        if wrapper.parameter_name not in names:
            return f"{wrapper.parameter_name} is not one of {kind}'s projections {' and '.join(names)}"
    for name in names:
        weight = getattr(experts, name, None)
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
            return f"the weights of {kind} are quantised, sharded or not there"
    reason = _other_implementation(experts)
    if reason is None and not _computes_as_expected(experts):
        reason = f"{kind} computes something of its own"
    return reason


def experts_state_reason(wrappers: Sequence[ParamWrapper]) -> str | None:
    """Why their present state needs PEFT's own forward; None when the operator computes the same."""
    experts: Any = wrappers[-1].base_layer
    for wrapper in wrappers:
        if wrapper.disable_adapters:
            return "adapters are disabled"
        if wrapper.merged:
            return "adapters are merged into the weight"
        active = sum(name in wrapper.lora_A for name in wrapper.active_adapters)
        if active != 1:
            return f"{active} adapters are active on it"
    for module in (*wrappers[1:], experts):
        if is_hooked(module):
            return "a hook is registered on its experts"
        if "forward" in module.__dict__:
            return "the forward of its experts is replaced"
    if any(getattr(experts, name).requires_grad for name in _projections(experts)):
        return "its base weight is trained"
    if getattr(experts, "_is_expert_parallel", False):
        return "its experts are spread over processes"
    return _other_implementation(experts)


def _factors(wrappers: Sequence[ParamWrapper], name: str, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """A [experts, rank, in], B [experts, out, rank] and s for a weight [experts, out, in]; rank 0 without adapter."""
    experts, out, width = weight.shape
    for wrapper in wrappers:
        if wrapper.parameter_name == name:
            adapter = active_adapter(wrapper)
            lora_A: Any = wrapper.lora_A[adapter].weight
            lora_B: Any = wrapper.lora_B[adapter].weight
            return (
                lora_A.view(experts, -1, width),
                lora_B.view(out, -1, experts).permute(2, 0, 1),
                float(wrapper.scaling[adapter]),
            )
    return weight.new_empty(experts, 0, width), weight.new_empty(experts, out, 0), 0.0


def _project(
    experts: Any, wrappers: Sequence[ParamWrapper], name: str, x: Tensor, numbers: Tensor, offs: Tensor
) -> Tensor:
    """The named projection of x [rows, in], the row's expert in ``numbers`` [rows]."""
    weight = getattr(experts, name)
    if experts.is_transposed:
        weight = weight.transpose(1, 2)
    lora_A, lora_B, scaling = _factors(wrappers, name, weight)
    scalings = torch.full((weight.shape[0],), scaling, dtype=torch.float32, device=x.device)
    y = aletheia_kernels.lora_experts(x, weight, lora_A, lora_B, scalings, offs)
    return y + getattr(experts, f"{name}_bias")[numbers] if experts.has_bias else y


def _compute(
    experts: Any, wrappers: Sequence[ParamWrapper], hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What the module computes of hidden [tokens, in] with adapters added, each token's experts [tokens, k] and their
    weights given."""
    into, out_of = _projections(experts)
    tokens, width = hidden.shape
    each = top_k_index.shape[1]
    numbers, order = torch.sort(top_k_index.reshape(-1), stable=True)
    count = getattr(experts, out_of).shape[0]
    every = torch.arange(count, dtype=numbers.dtype, device=numbers.device)
    offs = torch.searchsorted(numbers, every, right=True, out_int32=True)
    # A copy of each token for each of its experts, then the order: backward then sums the copies' gradients at once,
    # where taking a row several times would add one after another and round between.
    copies = hidden.to(getattr(experts, out_of).dtype).unsqueeze(1).expand(-1, each, -1)
    x = copies.reshape(tokens * each, width).index_select(0, order)
    middle = _project(experts, wrappers, into, x, numbers, offs)
    middle = experts._apply_gate(middle) if experts.has_gate else experts.act_fn(middle)
    y = _project(experts, wrappers, out_of, middle, numbers, offs)
    weighted = y * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    return weighted.index_select(0, order.argsort()).view(tokens, each, y.shape[1]).sum(1).to(hidden.dtype)


def _computes_as_expected(experts: Any) -> bool:
    """Whether the module without adapters gives for a few numbers what is computed here."""
    into, out_of = (getattr(experts, name) for name in _projections(experts))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, into.shape[1 if experts.is_transposed else 2], generator=generator).to(into)
    index = torch.randint(into.shape[0], (4, 2), generator=generator).to(into.device)
    routing = index, torch.rand(4, 2, generator=generator).to(into)
    try:
        with torch.no_grad():
            got: Tensor = type(experts).forward(experts, x, *routing)
            expected = _compute(experts, (), x, *routing)
    except BackendError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    # Of two products one after the other, rounded between.
    precision = 16 * torch.finfo(out_of.dtype).eps
    return torch.allclose(
        got.double(), expected.double(), rtol=precision, atol=precision * float(expected.abs().max())
    )


class ExpertsForward(Replacement):
    """The forward that replaces the outermost wrapper's; whatever the operator does not compute runs the original."""

    def __init__(self, wrappers: Sequence[ParamWrapper]) -> None:
        super().__init__(wrappers[0])
        self.wrappers = wrappers

    def _serves(self, hidden: Tensor) -> bool:
        if experts_state_reason(self.wrappers) is not None:
            return False
        dtype = self.wrappers[0].get_param().dtype
        if torch.is_autocast_enabled(hidden.device.type):
            return dtype == torch.get_autocast_dtype(hidden.device.type)
        return dtype == hidden.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if kwargs or len(args) != 3 or args[0].dim() != 2 or not self._serves(args[0]):
            return self.original(*args, **kwargs)
        return _compute(self.wrappers[-1].base_layer, self.wrappers, *args)
