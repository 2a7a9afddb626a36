"""Operators for LoRA fine-tuning that trains only what the task needs. Depends on torch alone."""

from aletheia_kernels import backends
from aletheia_kernels.allocator import tune_allocator
from aletheia_kernels.attention import range_attention
from aletheia_kernels.cross_entropy import linear_cross_entropy
from aletheia_kernels.experts import lora_experts
from aletheia_kernels.gated_mlp import lora_gated_mlp
from aletheia_kernels.grad_norm import (
    bias_grad_norm_sq,
    embedding_grad_norm_sq,
    weight_grad_norm_sq,
    weight_grad_norm_sq_per_example,
    weight_grad_norm_sq_sketch,
    weight_grad_norms_sq,
)
from aletheia_kernels.lora import lora_group
from aletheia_kernels.rms_norm import rms_norm
from aletheia_kernels.rotary import rotary

__all__ = [
    "backends",
    "bias_grad_norm_sq",
    "embedding_grad_norm_sq",
    "linear_cross_entropy",
    "lora_experts",
    "lora_gated_mlp",
    "lora_group",
    "range_attention",
    "rms_norm",
    "rotary",
    "tune_allocator",
    "weight_grad_norm_sq",
    "weight_grad_norm_sq_per_example",
    "weight_grad_norm_sq_sketch",
    "weight_grad_norms_sq",
]
