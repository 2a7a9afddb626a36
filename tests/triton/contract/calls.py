"""One call of every operator that Triton serves, on any device, fake ones included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import aletheia_kernels as ak

TOKENS = 24


@dataclass(frozen=True)
class Call:
    """The arguments of a registered operator, and the public function over its first tensors.

    Attributes:
        arguments: of ``torch.ops.aletheia.NAME``.
        public: what a user calls, of ``inputs``.
        inputs: the tensors that may need a gradient first.
        backward: the arguments of ``torch.ops.aletheia.NAME_backward`` from the forward's outputs; None without one.
    """

    arguments: tuple
    public: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    backward: Callable[[Any], tuple] | None = None


def calls(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Call]:
    """By operator; the same values for a device every time."""
    generator = None if torch._guards.detect_fake_mode() else torch.Generator(device).manual_seed(0)

    def draw(*shape: int, as_dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(as_dtype)

    x, dy = draw(TOKENS, 20), draw(TOKENS, 28)
    weights, biases = [draw(28, 20), draw(12, 20)], [None, draw(12)]
    lora_As, lora_Bs = [draw(3, 20), draw(5, 20)], [draw(28, 3), draw(12, 5)]
    scalings, seed = [0.5, 2.0], torch.ones(1, dtype=torch.int64, device=device)
    dys = [dy, draw(TOKENS, 12)]

    def group(x: Tensor, *adapters: Tensor) -> Any:
        As, Bs = list(adapters[:2]), list(adapters[2:])
        return ak.lora_group(x, weights, biases, As, Bs, scalings, dropout_p=0.25, seed=seed)

    mlp_weights = [draw(28, 20), draw(28, 20), draw(20, 28)]
    mlp_As, mlp_Bs = [draw(3, 20), draw(5, 20), draw(4, 28)], [draw(28, 3), draw(28, 5), draw(20, 4)]
    none, mlp_scalings = [None] * 3, [0.5, 2.0, 1.0]

    def mlp(x: Tensor, *adapters: Tensor) -> Any:
        return ak.lora_gated_mlp(x, mlp_weights, none, list(adapters[:3]), list(adapters[3:]), mlp_scalings)

    experts = (draw(2, 28, 20), draw(2, 4, 20), draw(2, 28, 4))
    routing = (
        draw(2, as_dtype=torch.float32),
        torch.full((2,), TOKENS // 2, dtype=torch.int32, device=device),
        torch.full((2,), 3, dtype=torch.int32, device=device),
    )
    indices, omega = torch.zeros(TOKENS, dtype=torch.int64, device=device), draw(20, 4)
    x3, dy3 = x.view(4, -1, 20), dy.view(4, -1, 28)
    return {
        "lora_group": Call(
            (x, weights, biases, lora_As, lora_Bs, scalings, 0.25, seed),
            group,
            (x, *lora_As, *lora_Bs),
            lambda out: (dys, x, out[1], weights, lora_As, lora_Bs, scalings, 0.25, seed, True),
        ),
        "lora_gated_mlp": Call(
            (x, mlp_weights, none, mlp_As, mlp_Bs, mlp_scalings, "silu"),
            mlp,
            (x, *mlp_As, *mlp_Bs),
            lambda out: (x, x, *out[1:], mlp_weights, mlp_As, mlp_Bs, mlp_scalings, "silu", True),
        ),
        "lora_experts": Call(
            (x, *experts, *routing),
            lambda x, lora_A, lora_B: ak.lora_experts(x, experts[0], lora_A, lora_B, *routing),
            (x, *experts[1:]),
            lambda out: (dy, x, out[1], *experts, *routing, True),
        ),
        "weight_grad_norm_sq": Call((x, dy, "tiles"), ak.weight_grad_norm_sq, (x, dy)),
        "weight_grad_norms_sq": Call(
            ([x, x], dys), lambda *pairs: ak.weight_grad_norms_sq(pairs[:2], pairs[2:]), (x, x + 1, *dys)
        ),
        "weight_grad_norm_sq_per_example": Call((x3, dy3), ak.weight_grad_norm_sq_per_example, (x3, dy3)),
        "weight_grad_norm_sq_sketch": Call((x, dy, omega), ak.weight_grad_norm_sq_sketch, (x, dy, omega)),
        "embedding_grad_norm_sq": Call(
            (indices, dy), lambda dy: ak.embedding_grad_norm_sq(indices, dy), (dy,)
        ),
        "bias_grad_norm_sq": Call((dy,), ak.bias_grad_norm_sq, (dy,)),
    }
