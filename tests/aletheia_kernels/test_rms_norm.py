"""rms_norm equals its definition and, to the bit, the rounding of the models that it stands in for."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aletheia_kernels import rms_norm
from tests.drawn import DTYPES, normals

FORMS = pytest.mark.parametrize(
    ("offset", "rounds_first"), [(0.0, True), (1.0, False), (0.0, False)], ids=["llama", "gemma", "olmo2"]
)


def plain_norm(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor:
    """As transformers' modules write it: LlamaRMSNorm for rounds_first, Gemma2RMSNorm and Olmo2RMSNorm without."""
    wide = x if x.dtype == torch.float64 else x.float()
    normalised = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if rounds_first:
        return (offset + weight) * normalised.to(x.dtype)
    return (normalised * (offset + weight.to(wide.dtype))).type_as(x)


@dataclass
class Case:
    """A norm with everything rounded to one dtype, held in that dtype."""

    x: Tensor
    weight: Tensor
    dy: Tensor
    eps: float = 1e-5
    offset: float = 0.0
    rounds_first: bool = True

    @staticmethod
    def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, **form) -> Case:
        normal = normals(dtype, seed)
        return Case(normal(*shape), normal(shape[-1]), normal(*shape), **form)

    def results(self, norm, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (self.x, self.weight)]
        y = norm(*leaves)
        grads = torch.autograd.grad(y, leaves, self.dy.to(dtype))
        return {"y": y.detach(), "dx": grads[0], "dweight": grads[1]}

    def plain(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return self.results(lambda x, w: plain_norm(x, w, self.eps, self.offset, self.rounds_first), dtype)

    def beside_what_cancels(self, dx: Tensor) -> Tensor:
        """dx = r (dn - n mean(dn n)) with r dn next to it, so that errors count against the terms of the difference.

        Where dn and n are nearly parallel, as they are with one feature, the difference itself is mere rounding.
        """
        x, weight, dy = (t.double() for t in (self.x, self.weight, self.dy))
        r = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return torch.cat((dx.double(), r * dy * (self.offset + weight)))

    def operator(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.eps, offset=self.offset, rounds_first=self.rounds_first)

    def ours(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return self.results(self.operator, dtype)


@FORMS
@DTYPES
@settings(max_examples=25)
@given(rows=st.integers(0, 150), features=st.integers(1, 200), seed=st.integers(0, 2**31))
@example(rows=0, features=33, seed=0)
@example(rows=1, features=1, seed=1)
@example(rows=130, features=64, seed=2)
@example(rows=3, features=2049, seed=3)
def test_equals_the_definition(backend, two_times_rule, dtype, offset, rounds_first, rows, features, seed):
    case = Case.draw((rows, features), dtype, seed, offset=offset, rounds_first=rounds_first)
    ours, plain, exact = case.ours(dtype), case.plain(dtype), case.plain(torch.float64)
    for results in (ours, plain, exact):
        results["dx"] = case.beside_what_cancels(results["dx"])
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name], computed_in=dtype)


@FORMS
@DTYPES
def test_gradients_have_the_dtypes_of_their_tensors(backend, dtype, offset, rounds_first):
    case = Case.draw((3, 5), dtype, offset=offset, rounds_first=rounds_first)
    assert {value.dtype for value in case.ours(dtype).values()} == {dtype}


@FORMS
@DTYPES
def test_rounds_where_the_models_round(backend, dtype, offset, rounds_first):
    case = Case.draw((512, 576), dtype, offset=offset, rounds_first=rounds_first)
    expected = plain_norm(case.x, case.weight, case.eps, offset, rounds_first)
    given = case.operator(case.x, case.weight)
    # The sum of squares adds in another order: its last bit tips one rounding in some thousands.
    if dtype == torch.float32:
        torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)
    else:
        assert (given != expected).float().mean() < 2e-3
        other = plain_norm(case.x, case.weight, case.eps, offset, not rounds_first)
        assert (other != expected).float().mean() > 2e-2


def test_enough_rows_for_every_chunk_and_thread(backend, two_times_rule):
    case = Case.draw((5003, 24), torch.bfloat16)
    ours, plain, exact = case.ours(torch.bfloat16), case.plain(torch.bfloat16), case.plain(torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], plain[name], exact[name])
    torch.set_num_threads(1)
    alone = case.ours(torch.bfloat16)
    for name in exact:
        assert torch.equal(alone[name], ours[name]), name


def test_epsilon_and_values_at_the_ends_of_the_range(backend):
    x = torch.tensor([[0.0, 0.0], [1e-4, -1e-4], [float("inf"), 1.0], [float("nan"), 1.0]]).bfloat16()
    y = rms_norm(x, torch.ones(2).bfloat16(), 1e-5)
    assert torch.equal(y[0], torch.zeros(2).bfloat16())
    expected = plain_norm(x, torch.ones(2).bfloat16(), 1e-5, 0.0, True)
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_strided_operands_and_leading_dimensions(backend, two_times_rule):
    case = Case.draw((24, 16), torch.float32)
    exact, plain = case.plain(torch.float64), case.plain(torch.float32)

    def strided(t: Tensor) -> Tensor:
        holder = torch.full((3, 2, 4, 32), float("nan"))
        holder[..., ::2] = t.view(2, 3, 4, 16).transpose(0, 1)
        return holder[..., ::2].transpose(0, 1)

    x, weight = strided(case.x).requires_grad_(), torch.stack((case.weight,) * 2, 1)[:, 0].requires_grad_()
    y = case.operator(x, weight)
    dx, dweight = torch.autograd.grad(y, (x, weight), strided(case.dy))
    assert y.shape == dx.shape == (2, 3, 4, 16)
    for name, value in {"y": y.detach(), "dx": dx, "dweight": dweight}.items():
        two_times_rule(name, value.reshape(exact[name].shape), plain[name], exact[name])


def test_only_what_needs_a_gradient_gets_one(backend):
    case = Case.draw((6, 8), torch.float32)
    expected = case.ours(torch.float32)
    for wanted, name in ((0, "dx"), (1, "dweight")):
        leaves = [case.x.clone(), case.weight.clone()]
        leaves[wanted].requires_grad_()
        case.operator(*leaves).backward(case.dy)
        assert torch.equal(leaves[wanted].grad, expected[name])
        assert leaves[1 - wanted].grad is None


def test_it_keeps_the_input_and_one_number_a_row(backend):
    case = Case.draw((40, 64), torch.bfloat16)
    kept: list[Tensor] = []
    x = case.x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        case.operator(x, case.weight)
    assert sorted(tuple(t.shape) for t in kept) == [(40,), (40, 64), (64,)]
    assert {t.dtype for t in kept if t.dim() == 1 and len(t) == 40} == {torch.float32}


def test_no_operand_is_written_to(backend):
    case = Case.draw((20, 24), torch.float32)
    operands = (case.x, case.weight, case.dy)
    before = [t.clone() for t in operands]
    leaves = [case.x.requires_grad_(), case.weight.requires_grad_()]
    torch.autograd.grad(case.operator(*leaves), leaves, case.dy)
    for operand, expected in zip(operands, before, strict=True):
        assert torch.equal(operand.detach(), expected)


@FORMS
def test_gradcheck(backend, offset, rounds_first):
    case = Case.draw((5, 7), torch.float64, offset=offset, rounds_first=rounds_first)
    assert torch.autograd.gradcheck(case.operator, (case.x.requires_grad_(), case.weight.requires_grad_()))


@DTYPES
def test_opcheck(backend, dtype):
    case = Case.draw((3, 5, 12), dtype)
    leaves = case.x.clone().requires_grad_(), case.weight.clone().requires_grad_()
    torch.library.opcheck(torch.ops.aletheia.rms_norm.default, (*leaves, 1e-5, 1.0, False))
    rstd = torch.rand(3, 5)
    for needs in ((True, True), (True, False), (False, True)):
        args = (case.dy, case.x, case.weight, rstd, 1.0, *needs)
        torch.library.opcheck(torch.ops.aletheia.rms_norm_backward.default, args)


@DTYPES
def test_compiles_as_one_graph_to_what_eager_computes(backend, dtype):
    case = Case.draw((9, 33), dtype)
    compiled = torch.compile(case.operator, fullgraph=True, backend="aot_eager")
    expected, given = case.ours(dtype), case.results(compiled, dtype)
    for name in expected:
        assert torch.equal(given[name], expected[name]), name


def test_traced_under_fake_tensors(backend):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        y = rms_norm(torch.empty(2, 5, 16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16), 1e-5)
    assert y.shape == (2, 5, 16)
    assert y.dtype == torch.bfloat16


def test_autocast_does_not_reach_inside(backend):
    case = Case.draw((16, 32), torch.float32)
    expected = case.operator(case.x, case.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.operator(case.x, case.weight), expected)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(3, 4), torch.ones(5), r"weight \[features\], got \(3, 4\), \(5,\)"),
        (torch.ones(3, 4), torch.ones(1, 4), r"got \(3, 4\), \(1, 4\)"),
        (torch.ones(3, 4), torch.ones(4).bfloat16(), r"x torch.float32, weight torch.bfloat16"),
        (torch.ones(3, 4).int(), torch.ones(4).int(), "expected one floating dtype"),
    ],
    ids=["size", "dimensions", "dtype", "integers"],
)
def test_arguments_that_do_not_fit_are_named(backend, x, weight, message):
    with pytest.raises(RuntimeError, match=message):
        rms_norm(x, weight, 1e-5)
