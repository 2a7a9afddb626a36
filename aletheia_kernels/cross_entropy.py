"""Linear + cross entropy over given rows, never all logits at once: schema, checks, fake, autograd.

The mathematics stands in :mod:`aletheia_kernels.reference.cross_entropy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aletheia_kernels.autocast import outside_autocast
from aletheia_kernels.backends import implementation
from aletheia_kernels.dtypes import accumulation_dtype
from aletheia_kernels.eager import first_derivative


def _check(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float, label_smoothing: float
) -> None:
    torch._check(
        h.dim() == 2 and weight.dim() == 2 and h.shape[1] == weight.shape[1],
        lambda: (
            f"expected h [rows, hidden] and weight [vocabulary, hidden], got {tuple(h.shape)}, {tuple(weight.shape)}"
        ),
    )
    torch._check(
        h.dtype == weight.dtype and h.is_floating_point(),
        lambda: f"expected h and weight of one floating dtype, got {h.dtype} and {weight.dtype}",
    )
    torch._check(
        labels.shape == (h.shape[0],) and labels.dtype == torch.int64,
        lambda: f"labels: expected int64 [{h.shape[0]}], got {labels.dtype} {tuple(labels.shape)}",
    )
    torch._check(
        bias is None or (bias.shape == (weight.shape[0],) and bias.dtype == h.dtype),
        lambda: f"bias: expected [{weight.shape[0]}] {h.dtype}",
    )
    torch._check(softcap >= 0.0, lambda: f"softcap: expected a positive cap, or 0 for none, got {softcap}")
    torch._check(
        0.0 <= label_smoothing <= 1.0,
        lambda: f"label_smoothing: expected 0 <= epsilon <= 1, got {label_smoothing}",
    )
    torch._check(
        h.device == weight.device == labels.device,
        lambda: f"expected one device, got {h.device}, {weight.device} and {labels.device}",
    )


@torch.library.custom_op(
    "aletheia::linear_cross_entropy",
    mutates_args=(),
    schema=(
        "(Tensor h, Tensor weight, Tensor? bias, Tensor labels, float softcap, float label_smoothing,"
        " bool needs_dh) -> (Tensor, Tensor)"
    ),
)
def _linear_cross_entropy(h, weight, bias, labels, softcap, label_smoothing, needs_dh):
    _check(h, weight, bias, labels, softcap, label_smoothing)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < weight.shape[0]:
        raise RuntimeError(
            f"labels: expected class indices in [0, {weight.shape[0]}), got {int(labels.min())} to {int(labels.max())}"
        )
    backend = implementation("linear_cross_entropy", h.device, h.dtype)
    with outside_autocast(h):
        return backend.linear_cross_entropy_forward(
            h, weight, bias, labels, softcap, label_smoothing, needs_dh
        )


@_linear_cross_entropy.register_fake
def _(h, weight, bias, labels, softcap, label_smoothing, needs_dh):
    _check(h, weight, bias, labels, softcap, label_smoothing)
    wide = accumulation_dtype(h.dtype)
    return h.new_empty((), dtype=wide), h.new_empty(h.shape if needs_dh else (0,))


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    _loss, dh = output
    ctx.save_for_backward(dh)


@first_derivative
def _backward(ctx: Any, dloss: Tensor, _ddh: Tensor) -> tuple:
    (dh,) = ctx.saved_tensors
    # A 0-d factor does not promote: the product rounds once, to dh's dtype.
    return dh * dloss, None, None, None, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Summed cross entropy of the logits h Wᵀ + b against labels, holding one block of logits at a time.

    Args:
        h: [rows, hidden], floating: only the rows that have a label.
        weight: [vocabulary, hidden], h's dtype, frozen.
        labels: [rows] int64 in [0, vocabulary).
        bias: [vocabulary] in h's dtype, frozen, or None.
        softcap: c in c · tanh(logits / c), or None.
        label_smoothing: ε in [0, 1], as :func:`torch.nn.functional.cross_entropy` has it: the label counts 1 - ε, and
            every class ε / vocabulary besides.

    Returns:
        0-d float32 (float64 for float64 inputs): the SUM over rows; 0 for no rows. A gradient flows to h alone.

    Raises:
        RuntimeError: shapes, dtypes, devices or labels that do not fit, or a weight or bias that requires a gradient.
        BackendError: ``ALETHEIA_BACKEND`` asks for a backend that cannot serve.
    """
    torch._check(
        not torch.is_grad_enabled()
        or not (weight.requires_grad or (bias is not None and bias.requires_grad)),
        lambda: "weight: expected a frozen head; linear_cross_entropy computes no gradient for it",
    )
    needs_dh = torch.is_grad_enabled() and h.requires_grad
    loss, _ = _linear_cross_entropy(h, weight, bias, labels, softcap or 0.0, label_smoothing, needs_dh)
    return loss
