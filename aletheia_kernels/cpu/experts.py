"""One LoRA projection of every expert of a mixture: the compiled LoRA operator on the rows of each that has any.

The mathematics stands in :mod:`aletheia_kernels.reference.experts`. Everything wide happens inside that operator, which
reads W_e once for the rows of e and adds the low-rank part to the same sums; a call costs some tens of microseconds
beside it. An expert without rows costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aletheia_kernels.dtypes import accumulation_dtype
from aletheia_kernels.reference.experts import each_expert


def _dense(factor: Tensor) -> Tensor:
    """A factor [experts, m, n] with every expert's part contiguous; itself where it is so already.

    PEFT's B lies with the expert as its last axis. As one matrix it is a transposed one, which torch copies in blocks;
    taken apart by expert, every cache line would be read again for each of the experts that share it.
    """
    return factor.flatten(1).contiguous().view(factor.shape)


def _laid_as(factor: Tensor, gradient: Tensor) -> Tensor:
    """A dense gradient in the strides of its factor."""
    if gradient.stride() == factor.stride():
        return gradient
    transposed = gradient.flatten(1).T.contiguous().T.view(factor.shape)
    if transposed.stride() == factor.stride():
        return transposed
    return torch.empty_like(factor).copy_(gradient)


def lora_experts_forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    offs: Tensor,
    ranks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As :func:`aletheia_kernels.reference.lora_experts_forward`."""
    forward = torch.ops.aletheia_cpu.lora_group_forward
    lora_A, lora_B, scales = _dense(lora_A), _dense(lora_B), scalings.tolist()
    y = x.new_empty(x.shape[0], weight.shape[1])
    h = x.new_zeros(x.shape[0], lora_A.shape[1])
    for expert, rows, rank in each_expert(x.shape[0], lora_A, offs, ranks):
        if rows.start < rows.stop:
            factors = [lora_A[expert, :rank]], [lora_B[expert, :, :rank]]
            (y[rows],), h[rows, :rank] = forward(
                x[rows], [weight[expert]], [None], *factors, [scales[expert]], 0.0, None
            )
    y[int(offs[-1]) :].zero_()
    return y, h


def lora_experts_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scalings: Tensor,
    offs: Tensor,
    ranks: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`aletheia_kernels.reference.lora_experts_backward`."""
    backward = torch.ops.aletheia_cpu.lora_group_backward
    dense_A, dense_B, scales = _dense(lora_A), _dense(lora_B), scalings.tolist()
    sums = accumulation_dtype(x.dtype)
    dx = x.new_empty(x.shape if needs_dx else (0,))
    dA = dense_A.new_zeros(dense_A.shape)
    dB = dense_B.new_zeros(dense_B.shape)
    for expert, rows, rank in each_expert(x.shape[0], lora_A, offs, ranks):
        if rows.start < rows.stop:
            factors = [dense_A[expert, :rank]], [dense_B[expert, :, :rank]]
            own, (dA[expert, :rank],), (dB[expert, :, :rank],) = backward(
                [dy[rows]], x[rows], h[rows, :rank].to(sums), [weight[expert]], *factors, [scales[expert]], 0.0, None,
                needs_dx,
            )  # fmt: skip
            if needs_dx:
                dx[rows] = own
    if needs_dx:
        dx[int(offs[-1]) :].zero_()
    return dx, _laid_as(lora_A, dA), _laid_as(lora_B, dB)
