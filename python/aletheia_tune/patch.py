"""Makes a PEFT LoRA model fast in place: LoRA linears run on the operator, siblings as one call; restore undoes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

import aletheia_kernels
from aletheia_kernels import backends
from aletheia_kernels.dtypes import has_vendor_products
from aletheia_tune.classification import full_beside_head
from aletheia_tune.dora import is_dora, magnitude_over_norm, rescaled_by
from aletheia_tune.errors import UserError
from aletheia_tune.experts import (
    ExpertsForward,
    experts_state_reason,
    experts_structural_reason,
    find_experts,
)
from aletheia_tune.gated_mlp import PARTS, apply_gated_mlps
from aletheia_tune.lora_layers import (
    Replacement,
    active_adapter,
    adapters_of,
    base_of,
    dropout_p,
    has_dropout,
    serves,
    state_reason,
    structural_reason,
    undisturbed,
)
from aletheia_tune.quantised import bias_of, product_dtype, scheme_of, weight_of
from aletheia_tune.sharding import require_whole
from aletheia_tune.torch_state import version_of


@dataclass(frozen=True)
class PatchEntry:
    """One adapted module: the path its forward takes ("kernel" or "peft"), why, and who shares its call."""

    module: str
    path: str
    reason: str
    siblings: tuple[str, ...] = ()


@dataclass(frozen=True)
class PatchReport:
    """Every module of a model that is adapted or trained in full and the path it takes; ``str()`` sums it up."""

    entries: tuple[PatchEntry, ...]
    notes: tuple[str, ...] = ()

    @property
    def fast(self) -> tuple[PatchEntry, ...]:
        """The entries whose forward runs on the operator."""
        return tuple(entry for entry in self.entries if entry.path == "kernel")

    def __str__(self) -> str:
        lines = [f"{len(self.fast)} of {len(self.entries)} adapted modules run on the kernels"]
        calls = len({entry.siblings or entry.module for entry in self.fast})
        if self.fast:
            lines[0] += f", in {calls} calls a forward pass"
        slow = Counter(entry.reason for entry in self.entries if entry.path != "kernel")
        lines += [f"  {count} on PEFT's own path: {reason}" for reason, count in slow.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _compute(layers: list[Any], x: Tensor) -> list[Tensor]:
    bases = [base_of(layer) for layer in layers]
    probability = dropout_p(layers[0])
    seed = None
    if probability > 0.0:
        # Drawn from the default generator, as dropout itself would: checkpointing that restores it repeats the mask.
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device)
    rescaled = [isinstance(layer, LoraLayer) and is_dora(layer, active_adapter(layer)) for layer in layers]
    dtype = product_dtype(bases[0], x)
    assert dtype is not None
    outputs = aletheia_kernels.lora_group(
        x.to(dtype),
        [weight_of(base, dtype) for base in bases],
        [None if dora else bias_of(base, dtype) for base, dora in zip(bases, rescaled, strict=True)],
        *adapters_of(layers, x),
        dropout_p=probability,
        seed=seed,
    )
    for index, layer in enumerate(layers):
        if rescaled[index]:
            y = rescaled_by(outputs[index], magnitude_over_norm(layer, active_adapter(layer)))
            outputs[index] = y if bases[index].bias is None else y + bases[index].bias
    # A quantised weight may be multiplied in another dtype than its input's, in which its output goes on.
    return outputs if scheme_of(bases[0]) is None else [y.to(x.dtype) for y in outputs]


@dataclass(frozen=True)
class _Kept:
    """Outputs by layer of one tensor, and its version and grad mode when they were computed."""

    source: Tensor
    key: tuple[int, bool]
    outputs: dict[int, Tensor]


@dataclass
class _Siblings:
    """Layers that read one tensor. The first to be called computes for all; the others find their output here.

    An output is handed on only for the very tensor object, unmodified, in the grad mode it was computed for; in every
    other case the caller computes afresh, so a wrong guess about who are siblings costs time and never correctness.
    Nor does a call from another thread: what is kept is one record, read once and replaced as a whole.
    """

    layers: list[Any]
    kept: _Kept | None = None

    def run(self, layer: Any, x: Tensor) -> Tensor:
        key = version_of(x), torch.is_grad_enabled()
        kept = self.kept
        if kept is not None and x is kept.source and key == kept.key:
            output = kept.outputs.pop(id(layer), None)
            if not kept.outputs:
                self.kept = None
            if output is None:  # left out, or here again: what is kept is the others'
                return _compute([layer], x)[0]
            return output
        probability, dtype = dropout_p(layer), product_dtype(base_of(layer), x)
        members = [
            other
            for other in self.layers
            if other is layer
            or (
                serves(other, x)
                and dropout_p(other) == probability
                and product_dtype(base_of(other), x) == dtype
            )
        ]
        outputs = {id(member): y for member, y in zip(members, _compute(members, x), strict=True)}
        mine = outputs.pop(id(layer))
        self.kept = _Kept(x, key, outputs) if outputs else None
        return mine


class _KernelForward(Replacement):
    """The forward that replaces that of a LoRA linear, or of a linear without an adapter."""

    def __init__(self, layer: Any, siblings: _Siblings | None) -> None:
        super().__init__(layer)
        self.layer = layer
        self.siblings = siblings
        self.quantised = scheme_of(base_of(layer)) is not None

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.layer
        # A compiled graph would keep the dequantised weight for its backward pass.
        left = self.quantised and torch.compiler.is_compiling()
        if args or kwargs or left or not serves(layer, x):
            return self.original(x, *args, **kwargs)
        # A compiler sees the whole graph and would trip over outputs kept aside between calls.
        if self.siblings is None or torch.compiler.is_compiling():
            return _compute([layer], x)[0]
        return self.siblings.run(layer, x)


def _observe_siblings(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """Runs one forward and groups the layers of one parent module that received the same unmodified tensor."""
    seen: dict[tuple[str, int, int], list[str]] = {}
    alive: list[Tensor] = []  # a tensor's id means it only while it lives

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                alive.append(args[0])
                parent = name.rpartition(".")[0]
                names = seen.setdefault((parent, id(args[0]), version_of(args[0])), [])
                if name not in names:
                    names.append(name)

        return hook

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        with undisturbed(model):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[str, ...]] = []
    taken: set[str] = set()
    for names in seen.values():
        if len(names) > 1 and taken.isdisjoint(names):
            groups.append(tuple(names))
            taken.update(names)
    return groups


def _example_inputs(model: nn.Module) -> dict[str, Any] | None:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = getattr(inner, "dummy_inputs", None)
    device = next(model.parameters()).device
    return None if inputs is None else {name: value.to(device) for name, value in inputs.items()}


def _slow_linears(model: nn.Module, adapted: Collection[str]) -> dict[str, nn.Linear]:
    """The frozen linears beside the adapted modules in whose dtype this processor has no products, by name."""
    inside = tuple(f"{name}." for name in adapted)
    found = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or name.startswith(inside) or "forward" in module.__dict__:
            continue
        weight = module.weight
        if type(weight) is not nn.Parameter:  # quantised: what it multiplies by is its own affair
            continue
        if weight.requires_grad or weight.device.type != "cpu" or has_vendor_products(weight.dtype):
            continue
        if backends.choose("lora_group", weight.device, weight.dtype).backend != "reference":
            found[name] = module
    return found


def apply_kernels(
    model: nn.Module, *, example_inputs: Mapping[str, Any] | None = None, strict: bool = False
) -> PatchReport:
    """Swaps the forward of a PEFT model's LoRA linears and experts for the operators, in place.

    Siblings (q, k, v; gate, up) are found by observing one small forward pass: layers of one parent module that
    receive the same tensor become one call. A gated MLP is one call from end to end, with adapters or without. Of
    stacked experts (`target_parameters`) each computes its own tokens, one call a projection. On a processor that has
    no products in the dtype of the weights, linears without adapters run on the operator as well, with their siblings
    if those are adapted. PEFT keeps its
    parameters, so saving, loading, merging and switching adapters are untouched; a state that the operator does not
    compute (several active adapters, adapters disabled or merged, variants other than DoRA, hooks on the base layer, a
    weight in another dtype than its input) runs PEFT's own forward. Calling it again on a patched model patches it
    afresh.

    Args:
        model: a PEFT model with LoRA adapters, or any module that contains LoRA layers.
        example_inputs: keyword arguments of one small forward pass; by default transformers' ``dummy_inputs``.
        strict: raise when any adapted module stays on PEFT's path.

    Returns:
        A report with the path of every adapted module and the reason for it. A module that PEFT trains in full stands
        there too, on PEFT's path; it keeps no sibling from the operator, but a gated MLP is then no call of its own.

    Raises:
        UserError: the model has no LoRA layer, or is sharded already; with ``strict``, a module that the operator does
            not serve.
    """
    require_whole(model)
    restore(model)
    adapted: dict[str, Any] = {
        n: module for n, module in model.named_modules() if isinstance(module, LoraLayer)
    }
    if not adapted:
        raise UserError("apply_kernels: the model has no LoRA layer; wrap it with peft.get_peft_model first")
    reasons = {name: structural_reason(layer) or state_reason(layer) for name, layer in adapted.items()}
    experts = []
    for named in find_experts(model):
        wrappers = list(named.values())
        reason = experts_structural_reason(wrappers)
        if reason is None:
            experts.append(wrappers)
        reasons.update(dict.fromkeys(named, reason or experts_state_reason(wrappers)))
    if strict and (slow := [f"{name}: {reason}" for name, reason in reasons.items() if reason]):
        raise UserError(
            f"apply_kernels(strict=True): {len(slow)} adapted modules stay on PEFT's path, the first {slow[0]}"
        )
    slow_linears = _slow_linears(model, adapted)
    layers: dict[str, Any] = {
        **{name: layer for name, layer in adapted.items() if structural_reason(layer) is None},
        **slow_linears,
    }

    notes: list[str] = []
    groups: list[tuple[str, ...]] = []
    inputs = example_inputs if example_inputs is not None else _example_inputs(model)
    if inputs is None:
        notes.append("siblings not looked for: give example_inputs, the model offers none of its own")
    else:
        try:
            groups = _observe_siblings(model, layers, inputs)
        except Exception as error:
            # Finding no siblings costs speed alone, and the model may well refuse inputs that are not its user's.
            if example_inputs is not None:
                raise
            notes.append(
                f"siblings not looked for: the model refused its dummy inputs ({error}); give example_inputs"
            )

    siblings_of: dict[str, tuple[str, ...]] = {name: group for group in groups for name in group}
    shared = {group: _Siblings([layers[name] for name in group]) for group in groups}
    for name, layer in layers.items():
        group = siblings_of.get(name)
        layer.forward = _KernelForward(layer, shared[group] if group else None)
    for wrappers in experts:
        outermost: Any = wrappers[0]
        outermost.forward = ExpertsForward(wrappers)
    mlps = apply_gated_mlps(model)
    dropped = 0
    for mlp in mlps:
        names = [f"{mlp}.{part}" for part in PARTS]
        parts = tuple(name for name in names if name in reasons and name in layers and not reasons[name])
        if any(has_dropout(layers[name]) for name in parts):
            dropped += 1
        else:
            siblings_of.update(dict.fromkeys(parts, parts))
    if dropped:
        notes.append(f"{dropped} gated MLPs are one call in evaluation alone: their adapters have dropout")
    bare = sum(not any(f"{mlp}.{part}" in adapted for part in PARTS) for mlp in mlps)
    if bare:
        notes.append(f"{bare} gated MLPs without adapters run on the operator as well")
    in_mlps = {f"{mlp}.{part}" for mlp in mlps for part in PARTS}
    if alone := [linear.weight.dtype for name, linear in slow_linears.items() if name not in in_mlps]:
        notes.append(
            f"{len(alone)} linears without adapters run on the operator as well: this processor has no products in "
            f"{', '.join(sorted({str(dtype).removeprefix('torch.') for dtype in alone}))}"
        )
    entries = [
        PatchEntry(
            name,
            "peft" if reasons[name] else "kernel",
            reasons[name]
            or (
                "one call with its siblings" if len(siblings_of.get(name, ())) > 1 else "one call of its own"
            ),
            siblings_of.get(name, ()),
        )
        for name in adapted
    ]
    entries += [PatchEntry(name, "peft", "it is trained in full") for name in full_beside_head(model)]
    return PatchReport(tuple(entries), tuple(notes))


def restore(model: nn.Module) -> int:
    """Undoes :func:`apply_kernels`; behaviour is again PEFT's own, bit for bit. Returns how many modules it undid."""
    count = 0
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Replacement):
            forward.restore()
            count += 1
    return count
