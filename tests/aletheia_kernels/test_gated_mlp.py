"""lora_gated_mlp equals its definition, forward and every gradient, in every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aletheia_kernels.gated_mlp import ACTIVATIONS
from tests.gated_mlp_case import Case
from tests.layouts import every_other_column, transposed

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@DTYPES
@settings(max_examples=20)
@given(
    tokens=st.integers(0, 130),
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 150), st.integers(1, 150)),
    ranks=st.tuples(st.integers(0, 300), st.integers(0, 40), st.integers(0, 40)),
    activation=st.sampled_from(ACTIVATIONS),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(tokens=0, sizes=(33, 5, 7), ranks=(3, 0, 300), activation="silu", bias=True, seed=0)
@example(tokens=129, sizes=(65, 97, 33), ranks=(0, 0, 0), activation="gelu_tanh", bias=False, seed=1)
@example(tokens=130, sizes=(64, 128, 64), ranks=(16, 16, 16), activation="silu", bias=False, seed=2)
def test_equals_the_definition(backend, two_times_rule, dtype, tokens, sizes, ranks, activation, bias, seed):
    case = Case.draw(tokens, sizes, ranks, dtype, activation, bias, seed)
    ours, plain, exact = case.ours(), case.plain(dtype), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_width_longer_than_one_sweep_of_the_product(backend, two_times_rule, activation):
    case = Case.draw(60, (40, 4500, 40), (5, 9, 17), torch.bfloat16, activation)
    ours, plain, exact = (
        case.ours(adapters=torch.float32),
        case.plain(torch.bfloat16),
        case.plain(torch.float64),
    )
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])
        assert ours[name].dtype == (torch.float32 if name[:2] in ("dA", "dB") else torch.bfloat16)


@pytest.mark.parametrize("tokens", [7, 70, 270])
def test_wide_weights(backend, two_times_rule, tokens):
    """More than two million of them: threads take columns, and all rows a stage at a time."""
    case = Case.draw(tokens, (330, 2100, 310), (5, 9, 17), torch.bfloat16, "silu", bias=True)
    ours = case.ours(adapters=torch.float32)
    plain, exact = case.plain(torch.bfloat16), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_saturated_gates_stay_finite(backend, two_times_rule, activation):
    case = Case.draw(64, (16, 24, 16), (2, 2, 2), torch.bfloat16, activation)
    case.weights[0] = case.weights[0] * 4096
    ours, plain, exact = case.ours(), case.plain(torch.bfloat16), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


# Rows and widths for which wide registers pack a weight's columns before the product, and as they come to them.
@pytest.mark.parametrize("weight_layout", [transposed, every_other_column])
@pytest.mark.parametrize(("tokens", "widths"), [(70, (48, 56, 24)), (300, (256, 520, 256))])
@DTYPES
def test_strided_operands(backend, two_times_rule, dtype, tokens, widths, weight_layout):
    case = Case.draw(tokens, widths, (5, 0, 11), dtype)
    plain, exact = case.plain(dtype), case.plain(torch.float64)
    case.weights = [weight_layout(w) for w in case.weights]
    leaves = [every_other_column(t).detach().requires_grad_() for t in (case.x, *case.lora_As, *case.lora_Bs)]
    case.dy = every_other_column(case.dy)
    ours = case.results(case.call(leaves), leaves)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


def test_one_thread_and_two_agree_and_a_run_repeats(two_times_rule):
    case = Case.draw(700, (64, 96, 64), (8, 64, 16), torch.bfloat16)
    exact, plain = case.plain(torch.float64), case.plain(torch.bfloat16)
    results = {}
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        given = case.ours(adapters=torch.float32)
        for name in exact:
            two_times_rule(name, given[name], plain[name], exact[name])
            again = results.setdefault((threads, name), given[name])
            assert torch.equal(again, given[name]), name
    for name in ("y", "dx"):  # every row is summed by one thread, in one order
        assert torch.equal(results[1, name], results[2, name])


def test_keeps_gate_and_up_and_not_their_product(backend):
    case = Case.draw(64, (16, 32, 16), (2, 2, 2), torch.bfloat16)
    saved: dict[int, Tensor] = {}
    own = {t.untyped_storage().data_ptr() for t in (case.x, *case.weights, *case.lora_As, *case.lora_Bs)}

    def keep(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t
        return t

    leaves = [t.requires_grad_() for t in (case.x, *case.lora_As, *case.lora_Bs)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        case.call(leaves)
    fresh = sorted(t.shape for data, t in saved.items() if data not in own)
    assert fresh == [(64, 6), (64, 32), (64, 32)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend, activation):
    case = Case.draw(4, (5, 6, 3), (2, 0, 3), torch.float64, activation, bias=True)
    assert torch.autograd.gradcheck(lambda *leaves: case.call(list(leaves)), case.leaves(torch.float64))


@DTYPES
def test_opcheck(backend, dtype):
    case = Case.draw(9, (12, 6, 5), (2, 0, 4), dtype)
    leaves = case.leaves(dtype)
    args = (leaves[0], case.weights, case.biases, leaves[1:4], leaves[4:], case.scalings, "silu")
    torch.library.opcheck(torch.ops.aletheia.lora_gated_mlp.default, args)
    gate, h = torch.randn(9, 6).to(dtype), torch.randn(9, 6)
    rest = (case.weights, case.lora_As, case.lora_Bs, case.scalings, "silu", True)
    torch.library.opcheck(
        torch.ops.aletheia.lora_gated_mlp_backward.default, (case.dy, case.x, gate, gate.clone(), h, *rest)
    )


@DTYPES
def test_compiles_as_one_graph(backend, dtype):
    case = Case.draw(12, (16, 10, 8), (3, 5, 2), dtype)
    eager, compiled = case.leaves(dtype), case.leaves(dtype)
    expected = case.results(case.call(eager), eager)
    run = torch.compile(lambda *leaves: case.call(list(leaves)), fullgraph=True, backend="aot_eager")
    given = case.results(run(*compiled), compiled)
    for name in expected:
        assert torch.equal(given[name], expected[name]), name


def test_leading_dimensions_are_kept(backend):
    case = Case.draw(24, (16, 12, 10), (3, 3, 3), torch.float32)
    leaves = case.leaves(torch.float32)
    stacked = case.call([leaves[0].view(2, 3, 4, 16), *leaves[1:]])
    assert stacked.shape == (2, 3, 4, 10)
    assert torch.equal(stacked.view(24, 10), case.call(leaves))


def transposed_up(case: Case) -> None:
    case.weights[1] = case.weights[1][:4]
    case.lora_Bs[1] = case.lora_Bs[1][:4]


BAD = {
    "two weights": (lambda case: case.weights.pop(), "expected one weight, bias, A, B and scaling"),
    "gate and up": (transposed_up, "gate is .* expected one shape"),
    "activation": (lambda case: setattr(case, "activation", "relu"), "expected silu or gelu_tanh, got relu"),
    "down": (lambda case: case.weights.__setitem__(2, case.x), r"weights\[2\]: expected \[out, 6\]"),
    "trained": (lambda case: case.weights[0].requires_grad_(), "expected frozen ones"),
}


@pytest.mark.parametrize("what", BAD)
def test_arguments_that_do_not_fit_are_named(backend, what):
    case = Case.draw(9, (12, 6, 5), (2, 1, 4), torch.float32)
    spoil, message = BAD[what]
    spoil(case)
    with pytest.raises(RuntimeError, match=message):
        case.call([case.x, *case.lora_As, *case.lora_Bs])
