"""lora_group against the LoRA linears of plain torch, in bfloat16 with float32 adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from aletheia_kernels import lora_group
from benchmarks.shapes import PASSES, SHAPES, Shape

MIXED = {"qkv": (8, 64, 16), "gate_up": (8, 64)}
SCALING = 2.0


@dataclass(frozen=True)
class Case:
    shape: Shape
    group: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.shape} {self.group} r={','.join(map(str, self.ranks))}"

    @property
    def parameters(self) -> int:
        width, outs = self.shape.groups[self.group]
        return sum(rank * (width + out) for rank, out in zip(self.ranks, outs, strict=True))


def _uniform_like(mixed: Case) -> Case:
    """The uniform rank whose parameters come nearest to those of mixed ranks."""
    count = len(mixed.ranks)
    a_rank = Case(mixed.shape, mixed.group, (1,) * count).parameters
    return Case(mixed.shape, mixed.group, (round(mixed.parameters / a_rank),) * count)


def _cases() -> list[Case]:
    cases = []
    for shape in SHAPES:
        for group, (_, outs) in shape.groups.items():
            cases += [Case(shape, group, (rank,) * len(outs)) for rank in (4, 16, 64)]
            if group in MIXED:
                mixed = Case(shape, group, MIXED[group])
                cases += [mixed, _uniform_like(mixed)]
    return cases


class Group:
    """The tensors of a case, and both implementations on them."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        tokens, (width, outs) = case.shape.tokens, case.shape.groups[case.group]
        self.x = torch.randn(tokens, width).bfloat16().requires_grad_()
        self.weights = [torch.randn(out, width).div(width**0.5).bfloat16() for out in outs]
        self.lora_As = [torch.randn(rank, width).div(width**0.5).requires_grad_() for rank in case.ranks]
        self.lora_Bs = [
            torch.randn(out, rank).div(rank**0.5).requires_grad_()
            for out, rank in zip(outs, case.ranks, strict=True)
        ]
        self.dys = [torch.randn(tokens, out).bfloat16() for out in outs]
        self.leaves = [self.x, *self.lora_As, *self.lora_Bs]

    def ours(self) -> Sequence[Tensor]:
        count = len(self.weights)
        return lora_group(self.x, self.weights, [None] * count, self.lora_As, self.lora_Bs, [SCALING] * count)

    def torch(self) -> Sequence[Tensor]:
        return [
            self.x @ weight.T + SCALING * ((self.x @ a.bfloat16().T) @ b.bfloat16().T)
            for weight, a, b in zip(self.weights, self.lora_As, self.lora_Bs, strict=True)
        ]


@pytest.mark.parametrize("name", ["ours", "torch"])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", _cases(), ids=str)
def test_lora_group(benchmark, measure, case, which, name):
    benchmark.group = f"lora_group {case.shape} {case.group} {which}"
    benchmark.extra_info["parameters"] = case.parameters
    group = Group(case)
    measure({"ours": group.ours, "torch": group.torch}, name, which, group.leaves, group.dys)
