"""The gated MLP in Triton equals its definition, forward and every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from aletheia_kernels import lora_gated_mlp
from aletheia_kernels.gated_mlp import ACTIVATIONS
from aletheia_kernels.triton import gated_mlp
from aletheia_kernels.triton.cards import CARDS
from aletheia_kernels.triton.launch import recording

SETTINGS = settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)


@dataclass
class Case:
    """A gated MLP with everything rounded to one dtype."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    dy: Tensor
    activation: str
    scalings = (0.5, 1.25, 2.0)

    @staticmethod
    def draw(tokens, sizes, ranks, dtype, activation="silu", bias=False, seed=0) -> Case:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, over: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, dtype=torch.float64) / over**0.5).to(dtype)

        hidden, width, out = sizes
        shapes = [(width, hidden), (width, hidden), (out, width)]
        return Case(
            normal(tokens, hidden),
            [normal(*shape, over=shape[1]) for shape in shapes],
            [normal(shape[0]) if bias else None for shape in shapes],
            [normal(r, shape[1], over=shape[1]) for r, shape in zip(ranks, shapes, strict=True)],
            [normal(shape[0], r, over=max(r, 1)) for r, shape in zip(ranks, shapes, strict=True)],
            normal(tokens, out),
            activation,
        )

    def results(self, y: Tensor, leaves: list[Tensor]) -> dict[str, Tensor]:
        names = ["dx", *(f"dA[{i}]" for i in range(3)), *(f"dB[{i}]" for i in range(3))]
        grads = torch.autograd.grad(y, leaves, self.dy.to(y))
        return {"y": y.detach()} | dict(zip(names, grads, strict=True))

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The definition by plain torch and its autograd, in one dtype throughout."""
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (self.x, *self.lora_As, *self.lora_Bs)]

        def project(i: int, z: Tensor) -> Tensor:
            bias = self.biases[i]
            base = linear(z, self.weights[i].to(dtype), None if bias is None else bias.to(dtype))
            return base + self.scalings[i] * linear(linear(z, leaves[1 + i]), leaves[4 + i])

        gate, up = project(0, leaves[0]), project(1, leaves[0])
        active = silu(gate) if self.activation == "silu" else gelu(gate, approximate="tanh")
        return self.results(project(2, active * up), leaves)

    def ours(self, place, adapters: torch.dtype | None = None) -> dict[str, Tensor]:
        """By the operator, every operand put where ``place`` puts it."""
        parts = [self.x, *(t.to(adapters or t.dtype) for t in (*self.lora_As, *self.lora_Bs))]
        leaves = [place(t).detach().requires_grad_() for t in parts]
        y = lora_gated_mlp(
            leaves[0],
            [place(w) for w in self.weights],
            [None if b is None else place(b) for b in self.biases],
            leaves[1:4],
            leaves[4:],
            self.scalings,
            activation=self.activation,
        )
        return self.results(y, leaves)


@DTYPES
@SETTINGS
@given(
    tokens=st.integers(0, 100),
    sizes=st.tuples(st.integers(1, 100), st.integers(1, 100), st.integers(1, 100)),
    ranks=st.tuples(st.integers(0, 64), st.integers(0, 40), st.integers(0, 40)),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(tokens=0, sizes=(33, 5, 7), ranks=(3, 0, 300), activation="silu", bias=True, seed=0)
@example(tokens=65, sizes=(33, 97, 17), ranks=(0, 0, 0), activation="gelu_tanh", bias=False, seed=1)
@example(tokens=64, sizes=(64, 128, 64), ranks=(16, 16, 16), activation="silu", bias=False, seed=2)
def test_equals_the_definition(guarded, two_times_rule, dtype, tokens, sizes, ranks, activation, bias, seed):
    case = Case.draw(tokens, sizes, ranks, dtype, activation, bias, seed)
    ours, plain, exact = case.ours(guarded), case.plain(dtype), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_master_adapters_and_a_width_of_several_blocks(guarded, two_times_rule, activation):
    case = Case.draw(5, (16, 2300, 16), (5, 9, 17), torch.bfloat16, activation)
    ours = case.ours(guarded, adapters=torch.float32)
    plain, exact = case.plain(torch.bfloat16), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])
        assert ours[name].dtype == (torch.float32 if name[:2] in ("dA", "dB") else torch.bfloat16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saturated_gates_stay_finite(guarded, two_times_rule, activation):
    case = Case.draw(30, (16, 24, 16), (2, 2, 2), torch.bfloat16, activation)
    case.weights[0] = case.weights[0] * 4096
    ours, plain, exact = case.ours(guarded), case.plain(torch.bfloat16), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


@DTYPES
def test_strided_operands(device, two_times_rule, dtype):
    case = Case.draw(40, (48, 56, 24), (5, 0, 11), dtype)

    def every_other_column(t: Tensor) -> Tensor:
        holder = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype, device=device)
        holder[..., ::2] = t
        return holder[..., ::2]

    case.dy = every_other_column(case.dy)
    ours, plain, exact = case.ours(every_other_column), case.plain(dtype), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


def test_backward_writes_to_nothing_that_it_was_given(device):
    case = Case.draw(20, (16, 24, 16), (2, 3, 4), torch.float32)
    _, gate, up, h = gated_mlp.lora_gated_mlp_forward(
        case.x.to(device),
        [w.to(device) for w in case.weights],
        case.biases,
        [a.to(device) for a in case.lora_As],
        [b.to(device) for b in case.lora_Bs],
        case.scalings,
        "silu",
    )
    given = [case.dy.to(device), case.x.to(device), gate, up, h]
    before = [t.clone() for t in given]
    rest = ([t.to(device) for t in group] for group in (case.weights, case.lora_As, case.lora_Bs))
    gated_mlp.lora_gated_mlp_backward(*given, *rest, case.scalings, "silu", True)
    for now, then in zip(given, before, strict=True):
        assert torch.equal(now, then)


def test_activations_move_each_tensor_once():
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    tokens, hidden, width, r = 4096, 4096, 14336, 16
    shapes = [(width, hidden), (width, hidden), (hidden, width)]
    operands = (
        [meta(*shape) for shape in shapes],
        [meta(r, shape[1]) for shape in shapes],
        [meta(shape[0], r) for shape in shapes],
    )
    x, gate, h = meta(tokens, hidden), meta(tokens, width), meta(tokens, 3 * r).float()
    with recording(CARDS["sm_90"]) as recorded:
        weights, lora_As, lora_Bs = operands
        gated_mlp.lora_gated_mlp_forward(x, weights, [None] * 3, lora_As, lora_Bs, Case.scalings, "silu")
        gated_mlp.lora_gated_mlp_backward(x, x, gate, gate.clone(), h, *operands, Case.scalings, "silu", True)
    moved = {
        name: sum(
            launch.traffic.read + launch.traffic.written
            for launch in recorded.launches
            if launch.name == name
        )
        for name in ("gated_product", "gated_gradients")
    }
    # The product is made twice from two tensors; three tensors make two.
    assert moved == {"gated_product": 2 * 3 * gate.nbytes, "gated_gradients": 5 * gate.nbytes}
