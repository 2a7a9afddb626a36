"""The gated MLP in Triton equals its definition, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aletheia_kernels.gated_mlp import ACTIVATIONS
from aletheia_kernels.triton import gated_mlp
from aletheia_kernels.triton.cards import CARDS
from aletheia_kernels.triton.launch import recording
from tests.drawn import DTYPES
from tests.gated_mlp_case import Case


@DTYPES
@settings(max_examples=4)
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


def test_masters_of_several_dtypes(device, two_times_rule):
    """As where gate's stand in, with rank 0, for an adapter that is not there."""
    for ranks in ((0, 5, 3), (4, 5, 3)):
        case = Case.draw(70, (16, 24, 16), ranks, torch.bfloat16)
        leaves = [leaf.detach().to(device) for leaf in case.leaves(torch.bfloat16, torch.float32)]
        for gate in (1, 4):
            leaves[gate] = leaves[gate].to(torch.bfloat16)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        ours = case.results(case.call(leaves, lambda t: t.to(device)), leaves)
        plain, exact = case.plain(torch.bfloat16), case.plain(torch.float64)
        for name in exact:
            two_times_rule(name, ours[name], plain[name], exact[name])
        assert {ours[name].dtype for name in ("dA[0]", "dB[0]", "dx")} == {torch.bfloat16}
        assert {ours[name].dtype for name in ("dA[1]", "dB[1]", "dA[2]", "dB[2]")} == {torch.float32}


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


def test_without_adapters_nothing_is_read_to_be_added_to():
    weights = [torch.empty(32, 32, device="meta") for _ in range(3)]
    lora_As = [torch.empty(0, 32, device="meta") for _ in range(3)]
    lora_Bs = [torch.empty(32, 0, device="meta") for _ in range(3)]
    with recording(CARDS["sm_90"]) as recorded:
        gated_mlp.lora_gated_mlp_forward(
            torch.empty(64, 32, device="meta"), weights, [None] * 3, lora_As, lora_Bs, [0.0] * 3, "silu"
        )
    assert {launch.name for launch in recorded.launches} == {"gated_product"}


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
        gated_mlp.lora_gated_mlp_forward(x, weights, [None] * 3, lora_As, lora_Bs, [0.5, 1.25, 2.0], "silu")
        gated_mlp.lora_gated_mlp_backward(
            x, x, gate, gate.clone(), h, *operands, [0.5, 1.25, 2.0], "silu", True
        )
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
