"""rotary equals its definition, forward and backward, wherever q and k lie in memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aletheia_kernels import rotary
from tests.drawn import DTYPES, normals


def plain_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As transformers' GPT-NeoX writes it, partial rotation included."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = cos.shape[-1]

    def half_turn(x: Tensor) -> Tensor:
        return torch.cat((-x[..., rotated // 2 :], x[..., : rotated // 2]), dim=-1)

    def turn(x: Tensor) -> Tensor:
        part, rest = x[..., :rotated], x[..., rotated:]
        return torch.cat((part * cos + half_turn(part) * sin, rest), dim=-1)

    return turn(q), turn(k)


@dataclass
class Case:
    """Queries, keys and independent halves of cos and sin, rounded to one dtype; in memory as transformers has them."""

    q: Tensor
    k: Tensor
    cos: Tensor
    sin: Tensor
    dq: Tensor
    dk: Tensor

    @staticmethod
    def draw(
        batch: int,
        heads: int,
        key_heads: int,
        tokens: int,
        dim: int,
        rotated: int,
        dtype: torch.dtype,
        angle_rows: int = 1,
        seed: int = 0,
    ) -> Case:
        normal = normals(dtype, seed)

        def projected(count: int) -> Tensor:
            return normal(batch, tokens, count, dim).transpose(1, 2)

        return Case(
            q=projected(heads),
            k=projected(key_heads),
            cos=normal(angle_rows, tokens, rotated),
            sin=normal(angle_rows, tokens, rotated),
            dq=normal(batch, heads, tokens, dim),
            dk=projected(key_heads),
        )

    def results(self, rotate, dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (self.q, self.k)]
        turned = rotate(*leaves, self.cos.to(dtype), self.sin.to(dtype))
        grads = torch.autograd.grad(turned, leaves, [self.dq.to(dtype), self.dk.to(dtype)])
        return dict(zip(("q", "k", "dq", "dk"), (*(t.detach() for t in turned), *grads), strict=True))


@DTYPES
@settings(max_examples=25)
@given(
    batch=st.integers(0, 3),
    heads=st.integers(1, 5),
    key_heads=st.integers(1, 3),
    tokens=st.integers(0, 40),
    dim=st.integers(2, 80),
    share=st.floats(0, 1),
    angles_each=st.booleans(),
    seed=st.integers(0, 2**31),
)
@example(batch=2, heads=9, key_heads=3, tokens=33, dim=64, share=1.0, angles_each=False, seed=0)
@example(batch=2, heads=1, key_heads=1, tokens=7, dim=5, share=0.5, angles_each=True, seed=1)
@example(batch=1, heads=2, key_heads=2, tokens=3, dim=4, share=0.0, angles_each=True, seed=2)
@example(batch=0, heads=2, key_heads=1, tokens=3, dim=4, share=1.0, angles_each=False, seed=3)
def test_equals_the_definition(
    backend, two_times_rule, dtype, batch, heads, key_heads, tokens, dim, share, angles_each, seed
):
    rotated = int(share * dim) // 2 * 2
    rows = batch if angles_each and batch else 1
    case = Case.draw(batch, heads, key_heads, tokens, dim, rotated, dtype, rows, seed)
    ours, plain = case.results(rotary, dtype), case.results(plain_rotary, dtype)
    exact = case.results(plain_rotary, torch.float64)
    for name in exact:
        assert ours[name].dtype == dtype
        two_times_rule(name, ours[name], plain[name], exact[name])


@DTYPES
def test_one_rounding(backend, dtype):
    case = Case.draw(2, 4, 2, 50, 24, 18, dtype)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    expected = case.results(plain_rotary, wide)
    for name, value in case.results(rotary, dtype).items():
        if dtype == torch.float32:
            torch.testing.assert_close(value, expected[name].to(dtype), rtol=1e-6, atol=1e-6)
        else:
            # A fused multiply-add keeps a bit that float32 loses, which tips a rounding here and there.
            assert (value != expected[name].to(dtype)).float().mean() < 1e-3


@DTYPES
def test_angles_in_float32(backend, two_times_rule, dtype):
    case = Case.draw(2, 3, 1, 21, 16, 12, dtype)
    case.cos, case.sin = torch.randn(2, 1, 21, 12, generator=torch.Generator().manual_seed(1))
    q, k = case.q.requires_grad_(), case.k.requires_grad_()
    turned = rotary(q, k, case.cos, case.sin)
    grads = torch.autograd.grad(turned, (q, k), (case.dq, case.dk))
    plain, exact = case.results(plain_rotary, dtype), case.results(plain_rotary, torch.float64)
    for name, value in zip(exact, (*turned, *grads), strict=True):
        assert value.dtype == dtype
        two_times_rule(name, value.detach(), plain[name], exact[name])


def test_backward_undoes_a_rotation(backend):
    case = Case.draw(2, 3, 1, 11, 16, 16, torch.float64)
    angle = torch.randn(1, 11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    q, k = case.q.requires_grad_(), case.k.requires_grad_()
    turned = rotary(q, k, cos, sin)
    for back, start in zip(torch.autograd.grad(turned, (q, k), turned), (q, k), strict=True):
        torch.testing.assert_close(back, start.detach())


@pytest.mark.parametrize(
    "layout", ["heads first", "slices of one projection", "reversed", "one head for all"]
)
def test_any_strides_and_one_layout_of_the_result(backend, layout):
    case = Case.draw(2, 4, 4, 9, 16, 12, torch.float32)
    expected = rotary(case.q, case.k, case.cos, case.sin)
    q, k = case.q, case.k
    if layout == "heads first":
        q, k = q.contiguous(), k.contiguous()
    elif layout == "slices of one projection":
        fused = torch.cat((q.transpose(1, 2).flatten(2), k.transpose(1, 2).flatten(2)), dim=-1)
        q, k = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in fused.chunk(2, dim=-1))
    elif layout == "reversed":
        q, k = (z.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for z in (q, k))
    else:
        k = k[:, :1].expand(2, 4, 9, 16)
        expected = rotary(case.q, k.contiguous(), case.cos, case.sin)
    angles = [torch.cat((z, z), dim=-1)[..., :12] for z in (case.cos, case.sin)]
    for turned, wanted in zip(rotary(q, k, *angles), expected, strict=True):
        assert torch.equal(turned, wanted)
        assert turned.transpose(1, 2).is_contiguous()


def test_gradients_lie_as_the_projections_write(backend):
    case = Case.draw(2, 4, 2, 9, 16, 16, torch.float32)
    for name, value in case.results(rotary, torch.float32).items():
        assert value.transpose(1, 2).is_contiguous(), name


def test_no_operand_is_written_to(backend):
    case = Case.draw(2, 3, 1, 5, 8, 6, torch.float32)
    operands = (case.q, case.k, case.cos, case.sin, case.dq, case.dk)
    before = [t.clone() for t in operands]
    case.results(rotary, torch.float32)
    for operand, expected in zip(operands, before, strict=True):
        assert torch.equal(operand, expected)


def test_gradcheck(backend):
    case = Case.draw(2, 3, 1, 4, 6, 4, torch.float64, angle_rows=2)
    leaves = case.q.requires_grad_(), case.k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: rotary(q, k, case.cos, case.sin), leaves)


@DTYPES
def test_opcheck(backend, dtype):
    case = Case.draw(2, 3, 1, 5, 8, 6, dtype)
    leaves = case.q.detach().requires_grad_(), case.k.detach().requires_grad_()
    torch.library.opcheck(torch.ops.aletheia.rotary.default, (*leaves, case.cos, case.sin))
    torch.library.opcheck(torch.ops.aletheia.rotary_backward.default, (case.dq, case.dk, case.cos, case.sin))


@DTYPES
def test_compiles_as_one_graph_to_what_eager_computes(backend, dtype):
    case = Case.draw(2, 3, 1, 5, 8, 6, dtype)
    compiled = torch.compile(rotary, fullgraph=True, backend="aot_eager")
    expected, given = case.results(rotary, dtype), case.results(compiled, dtype)
    for name in expected:
        assert torch.equal(given[name], expected[name]), name


BAD = {
    "tokens": (lambda c: setattr(c, "k", c.k[:, :, :-1]), r"expected q \[batch, heads, tokens, dim\]"),
    "angles": (lambda c: setattr(c, "cos", c.cos[:, :-1]), r"expected cos and sin \[2 or 1, 5, rotated\]"),
    "batch": (lambda c: setattr(c, "sin", c.sin.expand(3, 5, 6)), r"expected cos and sin \[2 or 1"),
    "odd": (
        lambda c: (setattr(c, "cos", c.cos[..., 1:]), setattr(c, "sin", c.sin[..., 1:])),
        "even number of rotated features, 8 at most, got 5",
    ),
    "dtype": (lambda c: setattr(c, "k", c.k.double()), "expected q and k of one floating dtype"),
    "angles' dtype": (lambda c: setattr(c, "cos", c.cos.double()), "expected cos and sin in torch.float32"),
    "trained angles": (lambda c: c.cos.requires_grad_(), "expected constants"),
}


@pytest.mark.parametrize("what", BAD)
def test_arguments_that_do_not_fit_are_named(backend, what):
    case = Case.draw(2, 3, 1, 5, 8, 6, torch.float32)
    spoil, message = BAD[what]
    spoil(case)
    with pytest.raises(RuntimeError, match=message):
        rotary(case.q, case.k, case.cos, case.sin)
