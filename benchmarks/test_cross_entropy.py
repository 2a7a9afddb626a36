"""linear_cross_entropy against cross_entropy of the full logits, and both against their two products alone."""

from __future__ import annotations

import pytest
import torch

from aletheia_kernels import linear_cross_entropy
from benchmarks.shapes import PASSES, SHAPES, Shape


def operands(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    h = torch.randn(shape.tokens, shape.hidden).bfloat16().requires_grad_()
    weight = torch.empty(shape.vocabulary, shape.hidden, dtype=torch.bfloat16).normal_(std=shape.hidden**-0.5)
    return h, weight, torch.randint(0, shape.vocabulary, (shape.tokens,))


@pytest.mark.parametrize("name", ["ours", "torch"])
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cross_entropy(benchmark, measure, shape, which, name):
    benchmark.group = f"cross_entropy {shape} {which}"
    h, weight, labels = operands(shape)

    def ours():
        return [linear_cross_entropy(h, weight, labels)]

    def plain():
        logits = torch.nn.functional.linear(h, weight).float()
        return [torch.nn.functional.cross_entropy(logits, labels, reduction="sum")]

    measure({"ours": ours, "torch": plain}, name, which, [h], [torch.ones(())])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_alone(benchmark, shape):
    benchmark.group = f"cross_entropy {shape} full"
    h, weight, _ = operands(shape)
    dlogits = torch.randn(shape.tokens, shape.vocabulary, dtype=torch.bfloat16)
    with torch.no_grad():
        benchmark(lambda: (h @ weight.T, dlogits @ weight))
