"""A gated MLP with everything rounded to one dtype, and what plain torch makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from aletheia_kernels import lora_gated_mlp
from tests.drawn import normals


@dataclass
class Case:
    """Hidden, width and out of ``sizes``; a rank for each of gate, up and down, 0 for none."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    scalings: list[float]
    activation: str
    dy: Tensor

    @staticmethod
    def draw(
        tokens: int,
        sizes: tuple[int, int, int],
        ranks: tuple[int, int, int],
        dtype: torch.dtype,
        activation: str = "silu",
        bias: bool = False,
        seed: int = 0,
    ) -> Case:
        normal = normals(dtype, seed)
        hidden, width, out = sizes
        shapes = [(width, hidden), (width, hidden), (out, width)]
        return Case(
            x=normal(tokens, hidden),
            weights=[normal(*shape, over=shape[1]) for shape in shapes],
            biases=[normal(shape[0]) if bias else None for shape in shapes],
            lora_As=[normal(r, shape[1], over=shape[1]) for r, shape in zip(ranks, shapes, strict=True)],
            lora_Bs=[normal(shape[0], r, over=max(r, 1)) for r, shape in zip(ranks, shapes, strict=True)],
            scalings=[0.5, 1.25, 2.0],
            activation=activation,
            dy=normal(tokens, out),
        )

    def leaves(self, dtype: torch.dtype, adapters: torch.dtype | None = None) -> list[Tensor]:
        parts = [self.x.to(dtype, copy=True)]
        parts += [t.to(adapters or dtype, copy=True) for t in (*self.lora_As, *self.lora_Bs)]
        return [part.requires_grad_() for part in parts]

    def results(self, y: Tensor, leaves: list[Tensor]) -> dict[str, Tensor]:
        grads = torch.autograd.grad(y, leaves, self.dy.to(y))
        names = ["dx", *(f"dA[{i}]" for i in range(3)), *(f"dB[{i}]" for i in range(3))]
        return {"y": y.detach()} | dict(zip(names, grads, strict=True))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The definition by plain torch and its autograd, in one dtype throughout."""
        leaves = self.leaves(dtype)

        def project(i: int, z: Tensor) -> Tensor:
            bias = self.biases[i]
            base = linear(z, self.weights[i].to(dtype), None if bias is None else bias.to(dtype))
            return base + self.scalings[i] * linear(linear(z, leaves[1 + i]), leaves[4 + i])

        gate, up = project(0, leaves[0]), project(1, leaves[0])
        active = silu(gate) if self.activation == "silu" else gelu(gate, approximate="tanh")
        return self.results(project(2, active * up), leaves)

    def call(self, leaves: list[Tensor], place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> Tensor:
        return lora_gated_mlp(
            leaves[0],
            [place(weight) for weight in self.weights],
            [None if bias is None else place(bias) for bias in self.biases],
            leaves[1:4],
            leaves[4:],
            self.scalings,
            activation=self.activation,
        )

    def ours(
        self,
        place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        adapters: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """By the operator, every operand put where ``place`` puts it."""
        leaves = [place(leaf).detach().requires_grad_() for leaf in self.leaves(self.x.dtype, adapters)]
        return self.results(self.call(leaves, place), leaves)
