"""The compiled CPU operators: finds the extension, says what the processor offers, passes calls on."""

from __future__ import annotations

import importlib.machinery
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

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


def lora_group_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    return torch.ops.aletheia_cpu.lora_group_forward(
        x, weights, biases, lora_As, lora_Bs, scalings, dropout_p, seed
    )


def lora_group_backward(
    dys: Sequence[Tensor],
    x: Tensor,
    h: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    dropout_p: float,
    seed: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    return torch.ops.aletheia_cpu.lora_group_backward(
        dys, x, h, weights, lora_As, lora_Bs, scalings, dropout_p, seed, needs_dx
    )


def weight_grad_norm_sq(x: Tensor, dy: Tensor, method: str) -> Tensor:
    return torch.ops.aletheia_cpu.weight_grad_norm_sq(x, dy, method)


def weight_grad_norm_sq_sketch(x: Tensor, dy: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.aletheia_cpu.weight_grad_norm_sq_sketch(x, dy, omega)


def embedding_grad_norm_sq(indices: Tensor, dy: Tensor) -> Tensor:
    return torch.ops.aletheia_cpu.embedding_grad_norm_sq(indices, dy)


def bias_grad_norm_sq(dy: Tensor) -> Tensor:
    return torch.ops.aletheia_cpu.bias_grad_norm_sq(dy)


def linear_cross_entropy_forward(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float, needs_dh: bool
) -> tuple[Tensor, Tensor]:
    return torch.ops.aletheia_cpu.linear_cross_entropy_forward(h, weight, bias, labels, softcap, needs_dh)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.ops.aletheia_cpu.attention_forward(q, k, v, first, last, scale)


def attention_backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aletheia_cpu.attention_backward(grad_o, q, k, v, lse, first, last, scale)
