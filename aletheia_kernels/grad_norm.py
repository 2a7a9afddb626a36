"""Squared norms of weight gradients without the weight gradients: schemas, checks, fakes.

These operators read tensors that a backward pass already has; they are measurements and carry no gradient themselves.
The mathematics stands in :mod:`aletheia_kernels.reference.grad_norm`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aletheia_kernels.autocast import outside_autocast
from aletheia_kernels.backends import implementation
from aletheia_kernels.dtypes import accumulation_dtype

METHODS = ("auto", "tiles", "gram")


def _check_pair(x: Tensor, dy: Tensor) -> None:
    torch._check(
        x.dim() == 2 and dy.dim() == 2 and x.shape[0] == dy.shape[0],
        lambda: f"expected x [tokens, in] and dy [tokens, out], got {tuple(x.shape)} and {tuple(dy.shape)}",
    )
    torch._check(
        x.dtype == dy.dtype and x.is_floating_point(),
        lambda: f"expected x and dy of one floating dtype, got {x.dtype} and {dy.dtype}",
    )
    torch._check(x.device == dy.device, lambda: f"expected one device, got {x.device} and {dy.device}")


@torch.library.custom_op("aletheia::weight_grad_norm_sq", mutates_args=())
def _weight_grad_norm_sq(x: Tensor, dy: Tensor, method: str) -> Tensor:
    _check_pair(x, dy)
    torch._check(method in METHODS, lambda: f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    with outside_autocast(x):
        return implementation("weight_grad_norm_sq", x.device.type, x.dtype).weight_grad_norm_sq(
            x, dy, method
        )


@_weight_grad_norm_sq.register_fake
def _(x: Tensor, dy: Tensor, method: str) -> Tensor:
    _check_pair(x, dy)
    return x.new_empty((), dtype=accumulation_dtype(x.dtype))


@torch.library.custom_op("aletheia::weight_grad_norm_sq_sketch", mutates_args=())
def _weight_grad_norm_sq_sketch(x: Tensor, dy: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    _check_pair(x, dy)
    torch._check(
        omega.dim() == 2 and omega.shape[0] == x.shape[1] and omega.shape[1] >= 2,
        lambda: f"omega: expected [{x.shape[1]}, at least 2], got {tuple(omega.shape)}",
    )
    with outside_autocast(x):
        return implementation(
            "weight_grad_norm_sq_sketch", x.device.type, x.dtype
        ).weight_grad_norm_sq_sketch(x, dy, omega)


@_weight_grad_norm_sq_sketch.register_fake
def _(x: Tensor, dy: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    _check_pair(x, dy)
    return x.new_empty((), dtype=accumulation_dtype(x.dtype)), x.new_empty(
        (), dtype=accumulation_dtype(x.dtype)
    )


@torch.library.custom_op("aletheia::embedding_grad_norm_sq", mutates_args=())
def _embedding_grad_norm_sq(indices: Tensor, dy: Tensor) -> Tensor:
    torch._check(
        indices.dim() == 1 and dy.dim() == 2 and indices.shape[0] == dy.shape[0],
        lambda: f"expected indices [tokens], dy [tokens, dim], got {tuple(indices.shape)}, {tuple(dy.shape)}",
    )
    return implementation("embedding_grad_norm_sq", dy.device.type, dy.dtype).embedding_grad_norm_sq(
        indices, dy
    )


@_embedding_grad_norm_sq.register_fake
def _(indices: Tensor, dy: Tensor) -> Tensor:
    return dy.new_empty((), dtype=accumulation_dtype(dy.dtype))


@torch.library.custom_op("aletheia::bias_grad_norm_sq", mutates_args=())
def _bias_grad_norm_sq(dy: Tensor) -> Tensor:
    torch._check(dy.dim() == 2, lambda: f"dy: expected [tokens, out], got {tuple(dy.shape)}")
    return implementation("bias_grad_norm_sq", dy.device.type, dy.dtype).bias_grad_norm_sq(dy)


@_bias_grad_norm_sq.register_fake
def _(dy: Tensor) -> Tensor:
    return dy.new_empty((), dtype=accumulation_dtype(dy.dtype))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1])


def weight_grad_norm_sq(x: Tensor, dy: Tensor, *, method: str = "auto") -> Tensor:
    """‖dyᵀ x‖²_F, the squared norm of the weight gradient of y = x Wᵀ, without holding that gradient.

    Args:
        x: [..., in], floating.
        dy: [..., out], same leading dimensions, dtype and device.
        method: ``tiles`` (one block of gradient rows at a time), ``gram`` (through the tokens' Gram matrices, cheaper
            when tokens are few) or ``auto`` (by cost).

    Returns:
        0-d float32 (float64 for float64 inputs).

    Raises:
        RuntimeError: shapes, dtypes, devices or a method that do not fit.
        BackendError: ``ALETHEIA_BACKEND`` asks for a backend that cannot serve.
    """
    return _weight_grad_norm_sq(_flat(x), _flat(dy), method)


def weight_grad_norm_sq_sketch(x: Tensor, dy: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """An unbiased estimate of ‖dyᵀ x‖²_F and its standard error, at the cost of two skinny products.

    Args:
        x: [..., in], floating. dy: [..., out], same leading dimensions, dtype and device.
        omega: [in, m], independent standard normals, m ≥ 2. The relative standard error is at most √(2 / m).

    Returns:
        (estimate, standard error), each 0-d float32 (float64 for float64 inputs).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
    """
    return _weight_grad_norm_sq_sketch(_flat(x), _flat(dy), omega.detach())


def embedding_grad_norm_sq(indices: Tensor, dy: Tensor) -> Tensor:
    """Squared norm of an embedding's weight gradient, from indices [...] (integer) and dy [..., dim]; 0-d float32."""
    return _embedding_grad_norm_sq(indices.reshape(-1), _flat(dy))


def bias_grad_norm_sq(dy: Tensor) -> Tensor:
    """Squared norm of a bias gradient, ‖Σ dy‖² over all leading dimensions of dy [..., out]; 0-d float32."""
    return _bias_grad_norm_sq(_flat(dy))
