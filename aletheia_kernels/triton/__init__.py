"""The operators in Triton: for CUDA and HIP tensors, and for CPU tensors under Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch

from aletheia_kernels.triton import first_use
from aletheia_kernels.triton.launch import is_recording

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The operator (as backends.OPERATORS names it) -> the file that launches it.
SERVED: dict[str, str] = {
    "lora_group": "lora",
    "lora_gated_mlp": "gated_mlp",
    "lora_experts": "experts",
    "weight_grad_norm_sq": "grad_norm",
    "weight_grad_norms_sq": "grad_norm",
    "weight_grad_norm_sq_per_example": "grad_norm",
    "weight_grad_norm_sq_sketch": "grad_norm",
    "embedding_grad_norm_sq": "grad_norm",
    "bias_grad_norm_sq": "grad_norm",
}


@cache
def unavailable_reason() -> str | None:
    """Why Triton cannot be used; None when it can be imported."""
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refusal(operator: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton operators cannot serve this one on this device in this dtype; None when they can."""
    if device.type == "cpu" and not interpreted():
        return "it serves CUDA and HIP tensors, and CPU tensors only under TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda") and not (device.type == "meta" and is_recording()):
        return f"it serves CUDA and HIP tensors, not {device.type}"
    if operator not in SERVED:
        return f"there is no {operator} in Triton"
    if dtype not in DTYPES:
        return f"it has no {dtype}"
    return unavailable_reason() or first_use.refusal(operator, device, dtype)


class _Operators:
    """Launchers by name, imported when first asked for: Triton is optional, and takes half a second."""

    def __getattr__(self, name: str) -> Any:
        for operator, module in SERVED.items():
            if name in (operator, f"{operator}_forward", f"{operator}_backward"):
                function = getattr(importlib.import_module(f"aletheia_kernels.triton.{module}"), name)
                setattr(self, name, function)
                return function
        raise AttributeError(name)


_operators = _Operators()


def operators() -> Any:
    """The launchers, under the names and with the signatures of :mod:`aletheia_kernels.reference`."""
    return _operators
