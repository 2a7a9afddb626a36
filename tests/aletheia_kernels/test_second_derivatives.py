"""No operator has a second derivative: whoever asks for one is told, and gets no silent zero."""

from __future__ import annotations

import pytest
import torch

from aletheia_kernels import (
    linear_cross_entropy,
    lora_experts,
    lora_gated_mlp,
    lora_group,
    range_attention,
    rms_norm,
    rotary,
)

WIDTH, RANK, ROWS = 8, 2, 6


def lora(x):
    parts = [torch.randn(WIDTH, WIDTH)], [None], [torch.randn(RANK, WIDTH)], [torch.randn(WIDTH, RANK)], [1.0]
    return lora_group(x, *parts)[0]


def gated_mlp(x):
    weights, As, Bs = (
        [torch.randn(*shape) for _ in range(3)] for shape in ((WIDTH, WIDTH), (RANK, WIDTH), (WIDTH, RANK))
    )
    return lora_gated_mlp(x, weights, [None] * 3, As, Bs, [1.0] * 3)


def experts(x):
    factors = torch.randn(2, RANK, WIDTH), torch.randn(2, WIDTH, RANK), torch.ones(2)
    return lora_experts(x, torch.randn(2, WIDTH, WIDTH), *factors, torch.tensor([2, ROWS], dtype=torch.int32))


def cross_entropy(x):
    return linear_cross_entropy(x, torch.randn(11, WIDTH), torch.arange(ROWS))


def attention(x):
    q = x.view(1, 1, ROWS, WIDTH)
    last = torch.arange(1, ROWS + 1, dtype=torch.int32)[None]
    return range_attention(q, q, q, torch.zeros_like(last), last)


def norm(x):
    return rms_norm(x, torch.randn(WIDTH), 1e-6)


def rotated(x):
    q = x.view(1, 1, ROWS, WIDTH)
    angles = torch.randn(1, ROWS, WIDTH)
    return rotary(q, q, angles.cos(), angles.sin())[0]


@pytest.mark.parametrize("operator", [lora, gated_mlp, experts, cross_entropy, attention, norm, rotated])
def test_a_gradient_of_the_gradient_is_refused(operator):
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    (gradient,) = torch.autograd.grad(operator(x).sum(), x, create_graph=True)
    assert gradient.abs().sum() > 0
    # The incoming gradient is a constant here; the gradient itself is none.
    with pytest.raises(RuntimeError, match=r"no second derivative|no autograd formula"):
        (x.square().sum() + gradient.square().sum()).backward()


def test_what_does_not_pass_through_the_gradient_can_be_differentiated_beside_it():
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    (gradient,) = torch.autograd.grad(lora(x).sum(), x, create_graph=True)
    x.square().sum().backward()
    assert torch.equal(x.grad, 2 * x.detach())
    assert torch.equal(gradient.detach(), gradient)
