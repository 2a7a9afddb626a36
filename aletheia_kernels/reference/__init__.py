"""The definition of every operator in eager torch, in any floating dtype up to float64.

Every other backend is held to these functions. They also serve wherever no compiled backend does.
"""

from aletheia_kernels.reference.attention import attention_backward, attention_forward
from aletheia_kernels.reference.cross_entropy import linear_cross_entropy_forward
from aletheia_kernels.reference.experts import lora_experts_backward, lora_experts_forward
from aletheia_kernels.reference.gated_mlp import lora_gated_mlp_backward, lora_gated_mlp_forward
from aletheia_kernels.reference.grad_norm import (
    bias_grad_norm_sq,
    embedding_grad_norm_sq,
    weight_grad_norm_sq,
    weight_grad_norm_sq_per_example,
    weight_grad_norm_sq_sketch,
    weight_grad_norms_sq,
)
from aletheia_kernels.reference.lora import lora_group_backward, lora_group_forward
from aletheia_kernels.reference.rms_norm import rms_norm_backward, rms_norm_forward
from aletheia_kernels.reference.rotary import rotary_backward, rotary_forward

__all__ = [
    "attention_backward",
    "attention_forward",
    "bias_grad_norm_sq",
    "embedding_grad_norm_sq",
    "linear_cross_entropy_forward",
    "lora_experts_backward",
    "lora_experts_forward",
    "lora_gated_mlp_backward",
    "lora_gated_mlp_forward",
    "lora_group_backward",
    "lora_group_forward",
    "rms_norm_backward",
    "rms_norm_forward",
    "rotary_backward",
    "rotary_forward",
    "weight_grad_norm_sq",
    "weight_grad_norm_sq_per_example",
    "weight_grad_norm_sq_sketch",
    "weight_grad_norms_sq",
]
