"""What Triton would compile for a launch, made by Triton's own binder and without a card."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile, make_backend
from triton.runtime.jit import create_function_from_signature

from aletheia_kernels.triton.cards import Card
from aletheia_kernels.triton.launch import Launch, Recording


@dataclass(frozen=True)
class Specialisation:
    """A kernel as compiled once: equal ones share their machine code.

    Attributes:
        card: what it is compiled for.
        module, kernel: where the ``@triton.jit`` function is found.
        configuration: types, block sizes, options and what is not divisible by 16, in one line.
        aligned: whether every pointer and every integer that Triton specialises on is divisible by 16.
        signature, constexprs, attributes, options: as ``ASTSource`` and ``triton.compile`` take them.
    """

    card: Card
    module: str
    kernel: str
    configuration: str
    aligned: bool
    signature: tuple[tuple[str, Any], ...]
    constexprs: tuple[tuple[Any, Any], ...]
    attributes: tuple[tuple[Any, Any], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kernel, self.configuration, self.card.name

    def compile(self) -> CompiledKernel:
        function = getattr(importlib.import_module(self.module), self.kernel)
        attributes = {path: [list(pair) for pair in pairs] for path, pairs in self.attributes}
        source = ASTSource(function, dict(self.signature), dict(self.constexprs), attributes)
        return compile(source, target=_target(self.card), options=dict(self.options))


def _target(card: Card) -> GPUTarget:
    return GPUTarget(card.backend, card.arch, card.warp_size)


class _Pointer:
    """A tensor as the binder asks for it. Allocators align, so a tensor's address is what its offset leaves of that."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.dtype = tensor.dtype

    def data_ptr(self) -> int:
        return self._tensor.storage_offset() * self._tensor.element_size()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._tensor.untyped_storage()


def specialise(launch: Launch, card: Card) -> Specialisation:
    """What the first such launch on the card would compile."""
    kernel, backend = launch.kernel, make_backend(_target(card))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments = {name: _pointers(value) for name, value in launch.arguments.items()}
    options = launch.options.for_triton()
    bound, specialisation, _ = binder(**arguments, **launch.constants, **options)
    compiled, signature, constexprs, attributes = kernel._pack_args(
        backend, dict(options), bound, specialisation, options
    )
    types, sizes, odd = [], [], []
    for parameter, (kind, key) in zip(kernel.params, specialisation, strict=True):
        if kind == "constexpr":
            if parameter.name != "INTERPRETED":
                sizes.append(f"{parameter.name}={getattr(key, 'value', key)}")
            continue
        if _text(kind) != "i32":
            types.append(f"{parameter.name}:{_text(kind)}")
        # Triton specialises on what a tuple holds, whatever the kernel asks for.
        if (isinstance(kind, tuple) or not parameter.do_not_specialize) and _is_odd(kind, key):
            odd.append(parameter.name)
    parts = [
        " ".join(types),
        " ".join(sizes),
        f"{launch.options.num_warps} warps, {launch.options.num_stages} stages",
    ]
    if odd:
        parts.append(f"not divisible: {' '.join(odd)}")
    return Specialisation(
        card=card,
        module=kernel.fn.__module__,
        kernel=kernel.fn.__name__,
        configuration="; ".join(part for part in parts if part),
        # Of what a table in device memory holds, a kernel is told in a constant.
        aligned=not odd and dict(launch.constants).get("ALIGNED", True),
        signature=tuple(signature.items()),
        constexprs=tuple(constexprs.items()),
        attributes=tuple((path, tuple(tuple(pair) for pair in pairs)) for path, pairs in attributes.items()),
        options=tuple(compiled.__dict__.items()),
    )


def _pointers(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_pointers(one) for one in value)
    return _Pointer(value) if isinstance(value, Tensor) else value


def _text(kind: Any) -> str:
    """``bf16`` of a pointer to it, ``3×bf16`` of three in a tuple."""
    if not isinstance(kind, tuple):
        return kind.removeprefix("*")
    texts = [_text(one) for one in kind]
    return f"{len(texts)}×{texts[0]}" if len(set(texts)) == 1 else f"({','.join(texts)})"


def _is_odd(kind: Any, key: Any) -> bool:
    """Whether this is a pointer or an integer, or holds one, of which Triton cannot say that 16 divides it."""
    if isinstance(kind, tuple):
        return any(_is_odd(*pair) for pair in zip(kind, key, strict=True))
    if kind == "constexpr":  # within a tuple a constant is a 1: Triton has a kernel of its own for it
        return getattr(key, "value", key) == 1
    return (kind.startswith("*") or kind in ("i32", "i64")) and "D" not in (key or "")


def specialisations(recordings: Iterable[Recording]) -> list[Specialisation]:
    """The distinct ones of every launch recorded, in order."""
    found = {}
    for kept in recordings:
        for launch in kept.launches:
            specialisation = specialise(launch, kept.card)
            found.setdefault(specialisation.key, specialisation)
    return list(found.values())
