"""Squared norms of weight gradients without the weight gradients: schemas, checks, fakes.

These operators read tensors that a backward pass already has; they are measurements and carry no gradient themselves.
The mathematics stands in :mod:`aletheia_kernels.reference.grad_norm`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from aletheia_kernels.autocast import outside_autocast
from aletheia_kernels.backends import implementation
from aletheia_kernels.dtypes import accumulation_dtype
from aletheia_kernels.rows import rows_of

METHODS = ("auto", "tiles", "gram")


def _check_pair(x: Tensor, dy: Tensor) -> None:
    torch._check(
        x.dim() == 2 and dy.dim() == 2 and x.shape[0] == dy.shape[0],
        lambda: f"expected x [tokens, in] and dy [tokens, out], got {tuple(x.shape)} and {tuple(dy.shape)}",
    )
    _check_operands(x, dy)


def _check_operands(x: Tensor, dy: Tensor) -> None:
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
        return implementation("weight_grad_norm_sq", x.device, x.dtype).weight_grad_norm_sq(x, dy, method)


@_weight_grad_norm_sq.register_fake
def _(x: Tensor, dy: Tensor, method: str) -> Tensor:
    _check_pair(x, dy)
    return x.new_empty((), dtype=accumulation_dtype(x.dtype))


def _check_pairs(xs: Sequence[Tensor], dys: Sequence[Tensor]) -> None:
    torch._check(
        len(xs) == len(dys) > 0,
        lambda: f"expected one dy for every x and at least one, got {len(xs)} and {len(dys)}",
    )
    for x, dy in zip(xs, dys, strict=True):
        _check_pair(x, dy)
        torch._check(
            x.dtype == xs[0].dtype and x.device == xs[0].device,
            lambda x=x: f"expected {xs[0].dtype} on {xs[0].device} throughout, got {x.dtype} on {x.device}",
        )


@torch.library.custom_op("aletheia::weight_grad_norms_sq", mutates_args=())
def _weight_grad_norms_sq(xs: Sequence[Tensor], dys: Sequence[Tensor]) -> Tensor:
    _check_pairs(xs, dys)
    with outside_autocast(xs[0]):
        return implementation("weight_grad_norms_sq", xs[0].device, xs[0].dtype).weight_grad_norms_sq(xs, dys)


@_weight_grad_norms_sq.register_fake
def _(xs: Sequence[Tensor], dys: Sequence[Tensor]) -> Tensor:
    _check_pairs(xs, dys)
    return xs[0].new_empty(len(xs), dtype=accumulation_dtype(xs[0].dtype))


def _check_examples(x: Tensor, dy: Tensor) -> None:
    torch._check(
        x.dim() == 3 and dy.dim() == 3 and x.shape[:2] == dy.shape[:2],
        lambda: (
            f"expected x [batch, tokens, in] and dy [batch, tokens, out], got {tuple(x.shape)} and {tuple(dy.shape)}"
        ),
    )
    _check_operands(x, dy)


@torch.library.custom_op("aletheia::weight_grad_norm_sq_per_example", mutates_args=())
def _weight_grad_norm_sq_per_example(x: Tensor, dy: Tensor) -> Tensor:
    _check_examples(x, dy)
    with outside_autocast(x):
        return implementation(
            "weight_grad_norm_sq_per_example", x.device, x.dtype
        ).weight_grad_norm_sq_per_example(x, dy)


@_weight_grad_norm_sq_per_example.register_fake
def _(x: Tensor, dy: Tensor) -> Tensor:
    _check_examples(x, dy)
    return x.new_empty(x.shape[0], dtype=accumulation_dtype(x.dtype))


@torch.library.custom_op("aletheia::weight_grad_norm_sq_sketch", mutates_args=())
def _weight_grad_norm_sq_sketch(x: Tensor, dy: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    _check_pair(x, dy)
    torch._check(
        omega.dim() == 2 and omega.shape[0] == x.shape[1] and omega.shape[1] >= 2,
        lambda: f"omega: expected [{x.shape[1]}, at least 2], got {tuple(omega.shape)}",
    )
    with outside_autocast(x):
        return implementation("weight_grad_norm_sq_sketch", x.device, x.dtype).weight_grad_norm_sq_sketch(
            x, dy, omega
        )


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
    return implementation("embedding_grad_norm_sq", dy.device, dy.dtype).embedding_grad_norm_sq(indices, dy)


@_embedding_grad_norm_sq.register_fake
def _(indices: Tensor, dy: Tensor) -> Tensor:
    return dy.new_empty((), dtype=accumulation_dtype(dy.dtype))


@torch.library.custom_op("aletheia::bias_grad_norm_sq", mutates_args=())
def _bias_grad_norm_sq(dy: Tensor) -> Tensor:
    torch._check(dy.dim() == 2, lambda: f"dy: expected [tokens, out], got {tuple(dy.shape)}")
    return implementation("bias_grad_norm_sq", dy.device, dy.dtype).bias_grad_norm_sq(dy)


@_bias_grad_norm_sq.register_fake
def _(dy: Tensor) -> Tensor:
    return dy.new_empty((), dtype=accumulation_dtype(dy.dtype))


def _by_example(tensor: Tensor) -> Tensor:
    """[batch, tokens, features]; what has no batch is left for the operator to refuse."""
    if tensor.dim() < 2:
        return tensor
    return tensor.detach().reshape(tensor.shape[0], tensor.shape[1:-1].numel(), tensor.shape[-1])


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
    return _weight_grad_norm_sq(rows_of("x", x.detach()), rows_of("dy", dy.detach()), method)


def weight_grad_norms_sq(xs: Sequence[Tensor], dys: Sequence[Tensor]) -> Tensor:
    """‖dy_iᵀ x_i‖²_F of many linears, such as all of a layer: one launch on a GPU, whatever their shapes.

    Every x_i and dy_i has to be at hand at once. Where a backward pass frees each dy as it goes, as the probe's does,
    calling :func:`weight_grad_norm_sq` for each keeps the memory at one dy, and costs a few launches more.

    Args:
        xs: of each linear [..., in_i], floating, of one dtype and device. Those that share an input may share a tensor.
        dys: of each [..., out_i], the same leading dimensions, dtype and device.

    Returns:
        float32 (float64 for float64 inputs) [number of linears], each norm by the cheaper form.

    Raises:
        RuntimeError: shapes, dtypes, devices or numbers of tensors that do not fit.
        BackendError: ``ALETHEIA_BACKEND`` asks for a backend that cannot serve.
    """
    return _weight_grad_norms_sq(
        [rows_of("x", x.detach()) for x in xs], [rows_of("dy", dy.detach()) for dy in dys]
    )


def weight_grad_norm_sq_per_example(x: Tensor, dy: Tensor) -> Tensor:
    """‖dy_bᵀ x_b‖²_F of every example of a batch: the norms of the gradients that each example has by itself.

    Args:
        x: [batch, ..., in], floating.
        dy: [batch, ..., out], the same leading dimensions, dtype and device.

    Returns:
        float32 (float64 for float64 inputs) [batch], each norm by the cheaper form (Goodfellow, arXiv 1510.01799, where
        tokens are few).

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit.
        BackendError: ``ALETHEIA_BACKEND`` asks for a backend that cannot serve.
    """
    return _weight_grad_norm_sq_per_example(_by_example(x), _by_example(dy))


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
    return _weight_grad_norm_sq_sketch(rows_of("x", x.detach()), rows_of("dy", dy.detach()), omega.detach())


def embedding_grad_norm_sq(indices: Tensor, dy: Tensor) -> Tensor:
    """Squared norm of an embedding's weight gradient, from indices [...] (integer) and dy [..., dim]; 0-d float32."""
    return _embedding_grad_norm_sq(indices.reshape(-1), rows_of("dy", dy.detach()))


def bias_grad_norm_sq(dy: Tensor) -> Tensor:
    """Squared norm of a bias gradient, ‖Σ dy‖² over all leading dimensions of dy [..., out]; 0-d float32."""
    return _bias_grad_norm_sq(rows_of("dy", dy.detach()))
