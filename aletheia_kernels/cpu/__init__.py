"""The compiled CPU operators: finds the extension and says what it and the processor offer."""

from __future__ import annotations

import importlib.machinery
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    reason = unavailable_reason()
    if reason is None and operator == "range_attention":
        if dtype != torch.bfloat16:
            return f"its attention has no {dtype}"
        if not features()["avx512_bf16"]:
            return "its attention needs a processor with AVX512-BF16"
    return reason


def features() -> dict[str, bool]:
    """Instruction sets that this processor offers and the operators know of."""
    if unavailable_reason() is not None:
        return {
            "avx512": torch.cpu._is_avx512_supported(),
            "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        }
    names = ("avx2", "avx512f", "avx512_bf16")
    bits = torch.ops.aletheia_cpu.features()
    return {name: bool(bits >> i & 1) for i, name in enumerate(names)}


def operators() -> Any:
    """The compiled operators, under the names and with the signatures of :mod:`aletheia_kernels.reference`."""
    return torch.ops.aletheia_cpu
