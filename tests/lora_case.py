"""A group of LoRA projections with everything rounded to one dtype, and what plain torch makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from aletheia_kernels import lora_group
from aletheia_kernels.reference import philox
from tests.drawn import normals


@dataclass
class Case:
    """Projections (out, rank, whether it has a bias) of one x; rank 0 is none."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    scalings: list[float]
    dropout_p: float
    seed: Tensor
    dys: list[Tensor]

    @staticmethod
    def draw(
        tokens: int,
        in_features: int,
        group: Sequence[tuple[int, int, bool]],
        dtype: torch.dtype,
        dropout_p: float = 0.0,
        seed: int = 0,
    ) -> Case:
        normal = normals(dtype, seed)
        return Case(
            x=normal(tokens, in_features),
            weights=[normal(out, in_features, over=in_features) for out, _, _ in group],
            biases=[normal(out) if bias else None for out, _, bias in group],
            lora_As=[normal(rank, in_features, over=in_features) for _, rank, _ in group],
            lora_Bs=[normal(out, rank, over=max(rank, 1)) for out, rank, _ in group],
            scalings=[0.5 + 0.75 * i for i in range(len(group))],
            dropout_p=dropout_p,
            seed=torch.tensor([seed * 7919 + 17]),
            dys=[normal(tokens, out) for out, _, _ in group],
        )

    def leaves(self, dtype: torch.dtype, adapters: torch.dtype | None = None) -> list[Tensor]:
        """x, every A and every B, copied."""
        parts = [self.x.to(dtype, copy=True)]
        parts += [t.to(adapters or dtype, copy=True) for t in (*self.lora_As, *self.lora_Bs)]
        return [part.requires_grad_() for part in parts]

    def results(
        self, ys: Sequence[Tensor], leaves: Sequence[Tensor], dys: Sequence[Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Outputs and gradients by name, from ``dys`` or, by default, the case's own."""
        if dys is None:
            dys = [dy.to(y) for dy, y in zip(self.dys, ys, strict=True)]
        grads = torch.autograd.grad(ys, leaves, dys)
        n = len(self.weights)
        names = ["dx", *(f"dA[{i}]" for i in range(n)), *(f"dB[{i}]" for i in range(n))]
        return {f"y[{i}]": y.detach() for i, y in enumerate(ys)} | dict(zip(names, grads, strict=True))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The definition by plain torch and its autograd, in one dtype throughout."""
        leaves, n = self.leaves(dtype), len(self.weights)
        x = x_hat = leaves[0]
        if self.dropout_p:
            keep = philox.keep_mask(self.seed, x.shape, self.dropout_p)
            x_hat = torch.where(keep, x / (1 - self.dropout_p), torch.zeros((), dtype=dtype))
        ys = [
            linear(x, self.weights[i].to(dtype), None if self.biases[i] is None else self.biases[i].to(dtype))
            + self.scalings[i] * linear(linear(x_hat, leaves[1 + i]), leaves[1 + n + i])
            for i in range(n)
        ]
        return self.results(ys, leaves)

    def ours(
        self,
        place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        adapters: torch.dtype | None = None,
        x: Tensor | None = None,
        dys: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """By the operator, every operand put where ``place`` puts it; ``x`` and ``dys`` as they are, if given."""
        n = len(self.weights)
        leaves = [place(leaf).detach().requires_grad_() for leaf in self.leaves(self.x.dtype, adapters)]
        if x is not None:
            leaves[0] = x.detach().requires_grad_()
        ys = lora_group(
            leaves[0],
            [place(weight) for weight in self.weights],
            [None if bias is None else place(bias) for bias in self.biases],
            leaves[1 : 1 + n],
            leaves[1 + n :],
            self.scalings,
            dropout_p=self.dropout_p,
            seed=place(self.seed),
        )
        return self.results(ys, leaves, [place(dy) for dy in self.dys] if dys is None else dys)
