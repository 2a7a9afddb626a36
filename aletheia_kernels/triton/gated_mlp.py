"""Gated MLP with LoRA on its projections: SwiGLU and GeGLU around the LoRA group.

    product = act(gate) ⊙ up,        dgate = dproduct ⊙ up ⊙ act'(gate),     dup = dproduct ⊙ act(gate)

With σ(z) = 1 / (1 + e⁻ᶻ), both activations are act(g) = g σ(z) and act'(g) = σ(z) + g σ(z) (1 - σ(z)) z':

    silu:       z = g                                           z' = 1
    gelu_tanh:  z = 2 √(2/π) (g + 0.044715 g³)                  z' = 2 √(2/π) (1 + 3 · 0.044715 g²)

(½ (1 + tanh(z/2)) = σ(z).) All in float32, each result rounded once. The projections, with their adapters, are those of
:mod:`aletheia_kernels.triton.lora`.

Backward forms the product again before the gradient of down, whose dA reads it, and both gradients after, in one pass
over dproduct, gate and up. dup takes dproduct's memory, which nobody else has seen: at 4,096 tokens of a width of
14,336 that is 112 MiB less at the peak of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from aletheia_kernels.reference.gated_mlp import backward_of, forward_of
from aletheia_kernels.triton import interpreted
from aletheia_kernels.triton.dot import rounded
from aletheia_kernels.triton.launch import Options, Traffic, card_for, launch
from aletheia_kernels.triton.lora import lora_group_backward, lora_group_forward, with_unit_columns


@triton.jit
def _steepness(gate, GELU: tl.constexpr):
    """σ(z) and z' at float32 gates."""
    z = gate
    slope = gate * 0.0 + 1.0
    if GELU:
        twice_root = 1.5957691216057308  # 2 √(2/π)
        z = twice_root * gate * (1.0 + 0.044715 * gate * gate)
        slope = twice_root * (1.0 + 3.0 * 0.044715 * gate * gate)
    return 1.0 / (1.0 + tl.exp(-z)), slope


@triton.jit
def gated_product(
    product,
    gate,
    up,
    width,
    product_stride,
    gate_stride,
    up_stride,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A block of one row of act(gate) ⊙ up."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    sigma, _ = _steepness(g, GELU)
    value = rounded(g * sigma * u, product.dtype.element_ty, INTERPRETED)
    tl.store(product + row * product_stride + at, value, mask=inside)


@triton.jit
def gated_gradients(
    dgate,
    dproduct,
    gate,
    up,
    width,
    dgate_stride,
    dproduct_stride,
    gate_stride,
    up_stride,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A block of one row of dgate, and of dup in the place of dproduct."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    there = dproduct + row * dproduct_stride + at
    g = tl.load(gate + row * gate_stride + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(there, mask=inside, other=0.0).to(tl.float32)
    sigma, slope = _steepness(g, GELU)
    derivative = sigma + g * sigma * (1.0 - sigma) * slope
    gradient = rounded(d * u * derivative, dgate.dtype.element_ty, INTERPRETED)
    tl.store(dgate + row * dgate_stride + at, gradient, mask=inside)
    tl.store(there, rounded(d * g * sigma, dproduct.dtype.element_ty, INTERPRETED), mask=inside)


def _launch_by_rows(
    kernel: object, reads: dict[str, Tensor], writes: dict[str, Tensor], activation: str
) -> None:
    """Launches a kernel whose every operand is [tokens, width], a row in blocks of at most 1,024 elements.

    That is one 16-byte access for each of 128 threads and operand in a 2-byte dtype.
    """
    operands = writes | reads
    first = next(iter(operands.values()))
    tokens, width = first.shape
    block = min(1024, max(16, triton.next_power_of_2(width)))
    launch(
        kernel,
        (tokens, triton.cdiv(width, block)),
        {
            **operands,
            "width": width,
            **{f"{name}_stride": operand.stride(0) for name, operand in operands.items()},
        },
        {"GELU": activation == "gelu_tanh", "BLOCK": block, "INTERPRETED": interpreted()},
        Options(num_warps=128 // card_for(first).warp_size, num_stages=1),
        Traffic(
            len(reads) * tokens * width * first.element_size(),
            len(writes) * tokens * width * first.element_size(),
            16 * tokens * width,
        ),
    )


def _product(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    product = torch.empty_like(gate, memory_format=torch.contiguous_format)
    _launch_by_rows(gated_product, {"gate": gate, "up": up}, {"product": product}, activation)
    return product


def _gradients(dproduct: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """dgate, and dup in the memory of dproduct."""
    dgate = torch.empty_like(dproduct)
    _launch_by_rows(
        gated_gradients,
        {"gate": gate, "up": up, "dproduct": dproduct},
        {"dgate": dgate, "dproduct": dproduct},
        activation,
    )
    return dgate, dproduct


def lora_gated_mlp_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As :func:`aletheia_kernels.reference.lora_gated_mlp_forward`."""
    operands = x, weights, biases, lora_As, lora_Bs, scalings, activation
    return forward_of(lora_group_forward, _product, *operands)


def lora_gated_mlp_backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    h: Tensor,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    scalings: Sequence[float],
    activation: str,
    needs_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """As :func:`aletheia_kernels.reference.lora_gated_mlp_backward`."""
    gate, up = with_unit_columns(gate), with_unit_columns(up)
    operands = dy, x, gate, up, h, weights, lora_As, lora_Bs, scalings, activation, needs_dx
    return backward_of(lora_group_backward, _product, _gradients, *operands)
