"""lora_experts equals its definition, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aletheia_kernels import lora_experts
from aletheia_kernels.backends import BackendError
from tests.experts_case import Case

experts = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 80)), min_size=1, max_size=5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@settings(max_examples=25)
@given(
    group=experts,
    in_features=st.integers(1, 100),
    out_features=st.integers(1, 100),
    spare=st.sampled_from([0, 5]),
    seed=st.integers(0, 2**31),
)
@example(group=[(0, 3), (0, 7)], in_features=33, out_features=5, spare=0, seed=0)
@example(group=[(0, 300), (1, 1), (0, 2), (70, 17)], in_features=64, out_features=48, spare=3, seed=1)
@example(group=[(130, 16), (0, 2), (48, 5), (47, 9)], in_features=96, out_features=64, spare=3, seed=2)
def test_equals_the_definition(two_times_rule, dtype, group, in_features, out_features, spare, seed):
    counts, ranks = zip(*group, strict=True)
    case = Case.draw(counts, ranks, in_features, out_features, dtype, spare, seed)
    ours, plain, exact = case.ours(), case.plain(dtype), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("counts", [(20, 0, 31), (60, 0, 81)])
def test_wide_master_adapters_get_gradients_in_their_own_dtype(two_times_rule, counts):
    case = Case.draw(counts, (3, 5, 16), 48, 40, torch.bfloat16)
    ours = case.ours(adapters=torch.float32)
    plain, exact = case.plain(torch.bfloat16), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])
        assert ours[name].dtype == (torch.float32 if name in ("dA", "dB") else torch.bfloat16)


def peft_views(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """What PEFT's ParamWrapper makes of its factors [r experts, in] and [out, r experts]."""
    in_features, out_features = lora_A.shape[1], lora_B.shape[0]
    return lora_A.view(experts, -1, in_features), lora_B.view(out_features, -1, experts).permute(2, 0, 1)


def test_equals_pefts_experts():
    from peft import LoraConfig, get_peft_model
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=12, intermediate_size=20, num_local_experts=3, num_experts_per_tok=1)
    config._experts_implementation = "eager"
    module = torch.nn.Sequential(MixtralExperts(config))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    adapted = get_peft_model(
        module,
        LoraConfig(
            r=4, lora_alpha=6, target_modules=[], target_parameters=["0.down_proj"], init_lora_weights=False
        ),
    )
    wrapper = adapted.base_model.model[0]
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    hidden, counts = torch.randn(11, 12), (4, 0, 7)
    top_k_index = torch.arange(3).repeat_interleave(torch.tensor(counts))[:, None]
    expected = wrapper(hidden, top_k_index, torch.ones(11, 1))
    expected_grads = torch.autograd.grad(expected.square().sum(), (a, b))

    base = wrapper.get_base_layer()
    offs = torch.tensor([4, 4, 11], dtype=torch.int32)
    inner = torch.cat(
        [
            torch.nn.functional.linear(rows, base.gate_up_proj[expert])
            for expert, rows in enumerate(hidden.split(counts))
        ]
    )
    gate, up = inner.chunk(2, dim=-1)
    inner = base.act_fn(gate) * up
    given = lora_experts(
        inner,
        base.down_proj.detach(),
        *peft_views(a, b, 3),
        torch.full((3,), wrapper.scaling["default"]),
        offs,
    )
    torch.testing.assert_close(given, expected)
    for ours, theirs in zip(torch.autograd.grad(given.square().sum(), (a, b)), expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("backend")
def test_gradients_lie_as_the_factors_do():
    a, b = torch.randn(3 * 4, 10).requires_grad_(), torch.randn(6, 4 * 3).requires_grad_()
    view_A, view_B = peft_views(a, b, 3)
    offs, scalings = torch.tensor([2, 5, 5], dtype=torch.int32), torch.ones(3)
    y = lora_experts(torch.randn(5, 10), torch.randn(3, 6, 10), view_A, view_B, scalings, offs)
    dA, dB = torch.autograd.grad(y, (view_A, view_B), torch.randn(5, 6))
    assert (dA.stride(), dB.stride()) == (view_A.stride(), view_B.stride())


@pytest.mark.usefixtures("backend")
def test_experts_without_adapters_have_rank_zero(two_times_rule):
    case = Case.draw((20, 0, 60), (0, 0, 0), 24, 20, torch.bfloat16, spare=2)
    ours, plain, exact = case.ours(), case.plain(torch.bfloat16), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


@pytest.mark.usefixtures("backend")
def test_strided_operands(two_times_rule):
    case = Case.draw((9, 0, 14), (3, 5, 8), 24, 20, torch.float32)
    plain, exact = case.plain(torch.float32), case.plain(torch.float64)
    case.weight = case.weight.transpose(1, 2).contiguous().transpose(1, 2)
    case.dy = case.dy.T.contiguous().T
    a, b = case.lora_A.transpose(0, 1).contiguous().transpose(0, 1), case.lora_B.permute(2, 1, 0).contiguous()
    leaves = [t.detach().requires_grad_() for t in (case.x.T.contiguous().T, a, b.permute(2, 1, 0))]
    ours = case.results(
        lora_experts(leaves[0], case.weight, *leaves[1:], case.scalings, case.offs, case.ranks), leaves
    )
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])


@pytest.mark.usefixtures("backend")
def test_gradcheck():
    case = Case.draw((3, 0, 2), (2, 3, 3), 5, 4, torch.float64, spare=1)
    case.lora_A.nan_to_num_(0.0)
    case.lora_B.nan_to_num_(0.0)

    def run(x, a, b):
        return lora_experts(x, case.weight, a, b, case.scalings, case.offs, case.ranks)

    assert torch.autograd.gradcheck(run, case.leaves(torch.float64))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_opcheck(dtype):
    case = Case.draw((3, 0, 6), (4, 4, 4), 12, 10, dtype)
    x, a, b = case.leaves(dtype)
    rest = (case.scalings, case.offs, case.ranks)
    torch.library.opcheck(torch.ops.aletheia.lora_experts.default, (x, case.weight, a, b, *rest))
    h = torch.randn(9, 4).to(dtype)
    args = (case.dy, case.x, h, case.weight, case.lora_A, case.lora_B, *rest, True)
    torch.library.opcheck(torch.ops.aletheia.lora_experts_backward.default, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiles_as_one_graph(dtype):
    case = Case.draw((5, 0, 7), (3, 5, 5), 16, 8, dtype)

    def run(x, a, b):
        return lora_experts(x, case.weight, a, b, case.scalings, case.offs, case.ranks)

    eager, compiled = case.leaves(dtype), case.leaves(dtype)
    expected = case.results(run(*eager), eager)
    given = case.results(torch.compile(run, fullgraph=True, backend="aot_eager")(*compiled), compiled)
    for name in expected:
        assert torch.equal(given[name], expected[name]), name


def test_a_compiled_call_serves_other_token_counts_without_recompiling():
    case = Case.draw((30, 34), (3, 5), 16, 8, torch.float32)
    counter = torch._dynamo.testing.CompileCounter()
    a, b = case.lora_A.nan_to_num(0.0), case.lora_B.nan_to_num(0.0)

    def run(x, offs):
        return lora_experts(x, case.weight, a, b, case.scalings, offs)

    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for tokens in (64, 48, 33, 57):
        x, offs = case.x[:tokens].clone(), torch.tensor([tokens // 3, tokens], dtype=torch.int32)
        assert torch.equal(compiled(x, offs), run(x, offs))
    assert counter.frame_count <= 2  # the first length, then one graph for every other


@pytest.mark.usefixtures("backend")
def test_no_operand_is_written_to():
    case = Case.draw((9, 0, 14), (3, 5, 8), 24, 20, torch.float32, spare=2)
    before = {name: tensor.clone() for name, tensor in vars(case).items()}
    leaves = [t.requires_grad_() for t in (case.x, case.lora_A, case.lora_B)]
    case.results(
        lora_experts(leaves[0], case.weight, *leaves[1:], case.scalings, case.offs, case.ranks), leaves
    )
    for name, expected in before.items():
        assert torch.equal(getattr(case, name).detach().nan_to_num(), expected.nan_to_num()), name


@pytest.mark.usefixtures("backend")
def test_input_that_needs_no_gradient_gets_none():
    case = Case.draw((4, 2), (2, 2), 8, 6, torch.float32)
    a, b = case.lora_A.requires_grad_(), case.lora_B.requires_grad_()
    lora_experts(case.x, case.weight, a, b, case.scalings, case.offs).backward(case.dy)
    assert case.x.grad is None
    assert a.grad is not None
    assert b.grad is not None


def test_autocast_does_not_reach_inside():
    case = Case.draw((4, 2), (2, 2), 8, 6, torch.float32)
    args = (case.x, case.weight, case.lora_A, case.lora_B, case.scalings, case.offs)
    expected = lora_experts(*args)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lora_experts(*args), expected)


BAD = {
    "x": (lambda c: setattr(c, "x", c.x[:, :-1]), r"weight: expected \[experts, out, 15\]"),
    "weight dtype": (lambda c: setattr(c, "weight", c.weight.double()), "weight: expected x's dtype"),
    "trained weight": (lambda c: c.weight.requires_grad_(), "expected frozen weights"),
    "A": (lambda c: setattr(c, "lora_A", c.lora_A[:1]), r"lora_A: expected \[2, rank, 16\]"),
    "B": (lambda c: setattr(c, "lora_B", c.lora_B[:, :, 1:]), r"lora_B: expected \(2, 8, 5\)"),
    "scalings": (lambda c: setattr(c, "scalings", c.scalings.double()), r"scalings: expected \[2\]"),
    "offs": (lambda c: setattr(c, "offs", c.offs.long()), r"offs: expected \[2\] torch.int32"),
    "offs that fall": (
        lambda c: setattr(c, "offs", torch.tensor([8, 4], dtype=torch.int32)),
        r"offs: expected ends of rows that rise from 0 to 12 at most, got \[8, 4\]",
    ),
    "offs beyond": (
        lambda c: setattr(c, "offs", torch.tensor([4, 13], dtype=torch.int32)),
        r"offs: expected .* got \[4, 13\]",
    ),
    "ranks": (lambda c: setattr(c, "ranks", c.ranks[:1]), r"ranks: expected \[2\] torch.int32"),
}


@pytest.mark.parametrize("what", BAD)
def test_arguments_that_do_not_fit_are_named(what):
    case = Case.draw((4, 8), (3, 5), 16, 8, torch.float32)
    spoil, message = BAD[what]
    spoil(case)
    with pytest.raises(RuntimeError, match=message):
        lora_experts(case.x, case.weight, case.lora_A, case.lora_B, case.scalings, case.offs, case.ranks)


def test_an_unmet_wish_for_a_backend_is_an_error(monkeypatch):
    case = Case.draw((4, 2), (2, 2), 8, 6, torch.float32)
    monkeypatch.setenv("ALETHEIA_BACKEND", "triton")
    with pytest.raises(BackendError, match="cannot serve lora_experts: it serves CUDA and HIP tensors"):
        lora_experts(case.x, case.weight, case.lora_A, case.lora_B, case.scalings, case.offs)
