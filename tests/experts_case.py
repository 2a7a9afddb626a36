"""Experts with everything rounded to one dtype, and what plain torch makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from aletheia_kernels import lora_experts
from tests.drawn import normals


@dataclass
class Case:
    """``counts`` rows an expert, then ``spare`` rows of none; what the factors hold past a rank is NaN."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    scalings: Tensor
    offs: Tensor
    ranks: Tensor
    dy: Tensor

    @staticmethod
    def draw(
        counts: Sequence[int],
        ranks: Sequence[int],
        in_features: int,
        out_features: int,
        dtype: torch.dtype,
        spare: int = 0,
        seed: int = 0,
    ) -> Case:
        normal = normals(dtype, seed)
        experts, rank, tokens = len(counts), max(ranks), sum(counts) + spare
        lora_A = normal(experts, rank, in_features, over=in_features)
        lora_B = normal(experts, out_features, rank, over=rank)
        for expert, own in enumerate(ranks):
            lora_A[expert, own:] = float("nan")
            lora_B[expert, :, own:] = float("nan")
        return Case(
            x=normal(tokens, in_features),
            weight=normal(experts, out_features, in_features, over=in_features),
            lora_A=lora_A,
            lora_B=lora_B,
            scalings=torch.tensor([0.5 + 0.75 * expert for expert in range(experts)]),
            offs=torch.tensor(list(accumulate(counts)), dtype=torch.int32),
            ranks=torch.tensor(ranks, dtype=torch.int32),
            dy=normal(tokens, out_features),
        )

    def leaves(self, dtype: torch.dtype, adapters: torch.dtype | None = None) -> list[Tensor]:
        adapters = adapters or dtype
        parts = [self.x.to(dtype, copy=True), self.lora_A.to(adapters, copy=True)]
        return [part.requires_grad_() for part in (*parts, self.lora_B.to(adapters, copy=True))]

    def results(self, y: Tensor, leaves: Sequence[Tensor], dy: Tensor | None = None) -> dict[str, Tensor]:
        """Output and gradients by name, from ``dy`` or, by default, the case's own."""
        grads = torch.autograd.grad(y, leaves, self.dy.to(y.dtype) if dy is None else dy)
        return dict(zip(("y", "dx", "dA", "dB"), (y.detach(), *grads), strict=True))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The definition by a loop of plain torch and its autograd, in one dtype throughout."""
        leaves = self.leaves(dtype)
        x, lora_A, lora_B = leaves
        ends = self.offs.tolist()
        parts = []
        for expert, (begin, end) in enumerate(pairwise([0, *ends])):
            rank = int(self.ranks[expert])
            rows = x[begin:end]
            low_rank = (rows @ lora_A[expert, :rank].T) @ lora_B[expert, :, :rank].T
            parts.append(rows @ self.weight[expert].to(dtype).T + self.scalings[expert] * low_rank)
        y = torch.cat([*parts, (x[ends[-1] :] * 0) @ self.weight[0].to(dtype).T])
        return self.results(y, leaves)

    def ours(
        self,
        place: Callable[[Tensor], Tensor] = lambda tensor: tensor,
        adapters: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """By the operator, every operand put where ``place`` puts it."""
        leaves = [place(leaf).detach().requires_grad_() for leaf in self.leaves(self.x.dtype, adapters)]
        rest = (place(tensor) for tensor in (self.scalings, self.offs, self.ranks))
        y = lora_experts(leaves[0], place(self.weight), *leaves[1:], *rest)
        return self.results(y, leaves, place(self.dy))
