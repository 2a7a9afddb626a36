"""DoRA's rescaling of a LoRA projection, from the factors, without ever making W + s B A.

DoRA (arXiv 2402.09353) computes y = m / ‖W + s B A‖ ⊙ (x Wᵀ + s x Aᵀ Bᵀ) + b, the norms by row of W [out, in], with no
gradient through them (its section 4.3). Each norm is a sum of three terms,

    ‖W_i + s (B A)_i‖² = ‖W_i‖² + 2 s B_i · (W Aᵀ)_i + s² B_i (A Aᵀ) B_iᵀ,

the first of which changes only with W, the others made of products with r columns: 2 · out · in · r multiply-adds in
place of the out · in · r and the passes over [out, in] that W + s B A takes.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D

from aletheia_tune.quantised import scheme_of
from aletheia_tune.torch_state import version_of

# ‖W_i‖² by row of weights and the contents they are of. Keyed by the tensor object, which holds no reference to it.
_row_norms_sq_of: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_dora(layer: Any, adapter_name: str) -> bool:
    """Whether an adapter of a LoRA layer is a DoRA."""
    return type(layer.lora_variant.get(adapter_name)) is DoraLinearVariant


def dora_reason(layer: Any, adapter_name: str) -> str | None:
    """Why a DoRA is not computed here; None when it is."""
    if isinstance(layer.get_base_layer(), Conv1D):
        return "the adapter is a DoRA on a Conv1D"
    if scheme_of(layer.get_base_layer()) is not None:
        return "the adapter is a DoRA on a quantised weight"
    dropout = layer.lora_dropout[adapter_name]
    if isinstance(dropout, nn.Dropout) and dropout.p > 0.0:
        return "the adapter is a DoRA with dropout, which adds two different inputs' products"
    return None


def _row_norms_sq(weight: Tensor) -> Tensor:
    # `weight.data = other` changes the contents and no version.
    contents = version_of(weight), weight.data_ptr()
    known, norms = _row_norms_sq_of.get(weight, (None, None))
    if norms is None or known != contents or norms.device != weight.device:
        norms = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32).square()
        _row_norms_sq_of[weight] = (contents, norms)
    return norms


def magnitude_over_norm(layer: Any, adapter_name: str) -> Tensor:
    """m / ‖W + s B A‖ [out] in float32, with a gradient for m alone."""
    weight = layer.get_base_layer().weight
    scaling = float(layer.scaling[adapter_name])
    with torch.no_grad():
        lora_A, lora_B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight.float()
        # In W's dtype, for the product's speed: the term is small beside ‖W_i‖².
        crossed = (weight @ lora_A.to(weight.dtype).T).float()
        gram = lora_A.float() @ lora_A.float().T
        norms_sq = (
            _row_norms_sq(weight)
            + 2 * scaling * (lora_B * crossed).sum(1)
            + scaling**2 * ((lora_B @ gram) * lora_B).sum(1)
        )
        norms = norms_sq.clamp_min_(0).sqrt_()
    return layer.lora_magnitude_vector[adapter_name].weight.float() / norms


class _Rescale(torch.autograd.Function):
    """y + y ⊙ e [out]: a pass over y forward, and one over dy backward beside the gradient of e."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, beyond_one: Tensor) -> Tensor:
        ctx.save_for_backward(y, beyond_one)
        return torch.addcmul(y, y, beyond_one)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        y, beyond_one = ctx.saved_tensors
        return torch.addcmul(dy, dy, beyond_one), (dy * y).sum(tuple(range(dy.dim() - 1)))


def rescaled_by(y: Tensor, ratio: Tensor) -> Tensor:
    """y [.., out] ⊙ ratio [out], in y's dtype.

    The ratio of magnitude and norm is near 1, and bfloat16 holds its distance from 1 far better than the ratio itself.
    """
    rescaled: Tensor = _Rescale.apply(y, (ratio - 1).to(y.dtype))
    return rescaled
