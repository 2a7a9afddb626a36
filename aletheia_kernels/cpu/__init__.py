"""The compiled CPU operators: finds the extension and says what it and the processor offer."""

from __future__ import annotations

import importlib.machinery
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from aletheia_kernels.cpu import experts

# From the compiler's baseline to the widest: a processor that offers one offers those before it.
INSTRUCTION_SETS = ("default", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ATTENTION_DTYPES = (torch.float32, torch.bfloat16)


@cache
def unavailable_reason() -> str | None:
    """Why the extension cannot be used; None when it is loaded. Says so once, in a warning."""
    package = Path(__file__).resolve().parent.parent
    candidates = [package / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    found = next((path for path in candidates if path.is_file()), None)
    reason = None
    if found is None:
        reason = "the C++ extension was not built (no compiler, or torch was not there when it was installed)"
    else:
        try:
            torch.ops.load_library(found)
        except OSError as error:
            reason = f"the C++ extension does not load with torch {torch.__version__}: {error}"
    if reason:
        warnings.warn(
            f"aletheia_kernels runs on eager torch: {reason}. "
            "`pip install --no-build-isolation --force-reinstall --no-deps aletheia-kernels` builds it.",
            RuntimeWarning,
            stacklevel=2,
        )
    return reason


def refusal(operator: str, dtype: torch.dtype) -> str | None:
    """Why the compiled operators cannot serve this one in this dtype; None when they can."""
    if dtype not in DTYPES:
        return f"it has no {dtype}"
    if operator == "range_attention" and dtype not in ATTENTION_DTYPES:
        return f"its attention has no {dtype}"
    return unavailable_reason()


@cache
def wrong_wish() -> str | None:
    """What is wrong with ``ALETHEIA_CPU_ISA``, which forces an instruction set; None when nothing is."""
    if unavailable_reason() is None:
        try:
            instruction_set()
        except RuntimeError as error:
            return str(error)
    return None


def instruction_set() -> str:
    """The instruction set that the LoRA and attention operators run on.

    That is the widest that the processor offers, or the one that ``ALETHEIA_CPU_ISA`` named when the extension was
    loaded (an empty string stands for the variable that is not set), or that of :func:`forced_instruction_set`. Base
    products in float32 belong to the vendor library, which chooses its own; those in bfloat16 are the operators' own on
    avx512_vnni, and above it but for few rows.

    Raises:
        RuntimeError: the extension cannot be used; the variable names no instruction set, or one that this processor
            lacks.
    """
    reason = unavailable_reason()
    if reason:
        raise RuntimeError(reason)
    return torch.ops.aletheia_cpu.instruction_set()


@contextmanager
def forced_instruction_set(name: str) -> Iterator[None]:
    """Runs the LoRA and attention operators on this instruction set within the block, in every thread of the process.

    Raises:
        RuntimeError: there is no such instruction set, or this processor lacks it; or what :func:`instruction_set`
            raises.
    """
    before = instruction_set()
    torch.ops.aletheia_cpu.use_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.aletheia_cpu.use_instruction_set(before)


def offered_instruction_sets() -> tuple[str, ...]:
    """The instruction sets that may be forced here, from the baseline to the widest; none without the
    extension."""
    if unavailable_reason() is not None:
        return ()
    return INSTRUCTION_SETS[: torch.ops.aletheia_cpu.features() + 1]


def features() -> dict[str, bool]:
    """Instruction sets that this processor offers and the operators know of."""
    if unavailable_reason() is not None:
        return {
            "avx512": torch.cpu._is_avx512_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
            "amx_bf16": torch.cpu._is_amx_tile_supported(),
        }
    return {name: name in offered_instruction_sets() for name in INSTRUCTION_SETS[1:]}


class _Operators:
    """The compiled operators, found when first asked for, and what is composed of them."""

    lora_experts_forward = staticmethod(experts.lora_experts_forward)
    lora_experts_backward = staticmethod(experts.lora_experts_backward)

    def __getattr__(self, name: str) -> Any:
        operator = getattr(torch.ops.aletheia_cpu, name)
        setattr(self, name, operator)
        return operator


_operators = _Operators()


def operators() -> Any:
    """The operators, under the names and with the signatures of :mod:`aletheia_kernels.reference`."""
    return _operators
