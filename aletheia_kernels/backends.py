"""Which implementation serves a call, and why.

``ALETHEIA_BACKEND=reference|cpu|triton`` forces one for every call; where it cannot serve, the call raises
:class:`BackendError` with the reason rather than fall back.
``ALETHEIA_CPU_ISA=default|avx2|avx512|avx512_vnni|avx512_bf16|amx_bf16`` forces the instruction set of the compiled CPU
operators likewise; it is read once, when their extension is loaded.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from aletheia_kernels import cpu, reference, triton

OPERATORS = (
    "lora_group",
    "lora_gated_mlp",
    "lora_experts",
    "weight_grad_norm_sq",
    "weight_grad_norms_sq",
    "weight_grad_norm_sq_per_example",
    "weight_grad_norm_sq_sketch",
    "embedding_grad_norm_sq",
    "bias_grad_norm_sq",
    "linear_cross_entropy",
    "range_attention",
    "rms_norm",
    "rotary",
)
NAMES = ("reference", "cpu", "triton")


class BackendError(RuntimeError):
    """What ``ALETHEIA_BACKEND`` or ``ALETHEIA_CPU_ISA`` asks for cannot serve this call."""


@dataclass(frozen=True)
class Choice:
    """The backend that serves an operator, and the reason in words."""

    backend: str
    reason: str


def _refusal(name: str, operator: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend ``name`` cannot serve the operator on tensors of this device and dtype; None when it can.

    Raises:
        BackendError: an unmet wish for an instruction set.
    """
    if name == "reference":
        return None
    if name == "cpu":
        if device.type != "cpu":
            return f"it serves CPU tensors, not {device.type}"
        wrong = cpu.wrong_wish()
        if wrong:
            raise BackendError(wrong)
        return cpu.refusal(operator, dtype)
    return triton.refusal(operator, device, dtype)


def choose(operator: str, device: torch.device | str, dtype: torch.dtype) -> Choice:
    """The backend that serves the operator on tensors of this device and dtype.

    The first call for an operator in a dtype on a card runs its self-test there, some milliseconds once its kernels are
    compiled; where that fails, the Triton operator does not serve it (:mod:`aletheia_kernels.triton.first_use`).

    Raises:
        BackendError: ``ALETHEIA_BACKEND`` names no backend, or one that cannot serve; ``ALETHEIA_CPU_ISA`` names no
            instruction set, or one that this processor lacks.
    """
    device = torch.device(device)
    wish = os.environ.get("ALETHEIA_BACKEND", "")
    if wish:
        if wish not in NAMES:
            raise BackendError(f"ALETHEIA_BACKEND={wish!r} names no backend: use one of {', '.join(NAMES)}")
        refusal = _refusal(wish, operator, device, dtype)
        if refusal:
            raise BackendError(f"ALETHEIA_BACKEND={wish} cannot serve {operator}: {refusal}")
        return Choice(wish, "forced by ALETHEIA_BACKEND")
    refusals = []
    for name in ("triton", "cpu"):
        refusal = _refusal(name, operator, device, dtype)
        if refusal is None:
            return Choice(name, f"compiled operators for {device.type} tensors")
        refusals.append(f"{name}: {refusal}")
    return Choice("reference", "; ".join(refusals))


def implementation(operator: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The namespace whose functions serve the operator here (same names and signatures in every backend)."""
    backend = choose(operator, device, dtype).backend
    return {"cpu": cpu.operators, "triton": triton.operators, "reference": lambda: reference}[backend]()


def explain(device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16) -> dict[str, Choice]:
    """For every operator, the backend that would serve tensors of this device and dtype, and why."""
    return {operator: choose(operator, device, dtype) for operator in OPERATORS}
