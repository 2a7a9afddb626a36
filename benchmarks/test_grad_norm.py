"""weight_grad_norm_sq, exact and sketched, against the weight gradient that plain torch would make, in bfloat16."""

from __future__ import annotations

import pytest
import torch

from aletheia_kernels import weight_grad_norm_sq, weight_grad_norm_sq_sketch
from benchmarks.agreement import assert_agree
from benchmarks.shapes import SHAPES

DIRECTIONS = 16


@pytest.mark.parametrize("name", ["tiles", "gram", "auto", "sketch", "torch"])
@pytest.mark.parametrize("group", ["qkv", "gate_up", "down"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_grad_norm(benchmark, shape, group, name):
    width, (out, *_) = shape.groups[group]
    benchmark.group = f"grad_norm {shape} {out} x {width}"
    torch.manual_seed(0)
    x, dy = torch.randn(shape.tokens, width).bfloat16(), torch.randn(shape.tokens, out).bfloat16()
    omega = torch.randn(width, DIRECTIONS).bfloat16()

    def plain():
        return (dy.T @ x).float().square().sum()

    def ours():
        return weight_grad_norm_sq(x, dy, method=name)

    def sketch():
        return weight_grad_norm_sq_sketch(x, dy, omega)[0]

    if name in ("tiles", "gram", "auto"):
        assert_agree([ours()], [plain()])
    benchmark({"torch": plain, "sketch": sketch}.get(name, ours))
