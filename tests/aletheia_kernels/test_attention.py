"""range_attention equals softmax attention under the mask that its ranges stand for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aletheia_kernels import cpu, range_attention

# On the instruction sets from AVX512-BF16 on, float32 runs as on AVX-512.
COMPILED = [
    (name, dtype)
    for name in cpu.offered_instruction_sets()
    for dtype in cpu.ATTENTION_DTYPES
    if dtype == torch.bfloat16 or name in ("default", "avx2", "avx512")
]
CASES = [
    ("reference", "", torch.float32),
    ("reference", "", torch.bfloat16),
    *(("cpu", name, dtype) for name, dtype in COMPILED),
]


@pytest.fixture(params=CASES, ids=["-".join([*filter(None, case[:2]), str(case[2])[6:]]) for case in CASES])
def dtype(request, monkeypatch) -> Iterator[torch.dtype]:
    backend, instruction_set, dtype = request.param
    monkeypatch.setenv("ALETHEIA_BACKEND", backend)
    with cpu.forced_instruction_set(instruction_set) if instruction_set else nullcontext():
        yield dtype


def operands(batch, heads, groups, length, dim, dtype, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, length, dim), (batch, groups, length, dim), (batch, groups, length, dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in [*shapes, shapes[0]]]


def kinds(kind: str, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    last = torch.arange(1, length + 1).expand(batch, length)
    first = torch.zeros_like(last)
    if kind == "window":
        first = (last - 5).clamp_min(0)
    elif kind == "full":
        last = torch.full_like(last, length)
    elif kind == "padded":
        real = torch.randint(0, length + 1, (batch, 1), generator=torch.Generator().manual_seed(seed))
        last = torch.minimum(last, real)  # with nothing real, every query is empty
        first = torch.where(last > 3, first, last)  # and some queries are empty in any case
    elif kind == "packed":
        first = torch.arange(length).expand(batch, length) // 11 * 11
    elif kind in ("examples", "unseen", "backwards"):
        generator = torch.Generator().manual_seed(seed)
        first, last = first.clone(), last.clone()
        for row in range(batch):
            begin = 0
            while begin < length:
                end = min(begin + int(torch.randint(1, 90, (), generator=generator)), length)
                first[row, begin:end] = begin
                if kind == "unseen":  # every example's last key, but for those of one token
                    last[row, begin:end] = max(end - 1, begin + 1)
                begin = end
        if kind == "backwards":  # the first queries see the last examples
            first, last = first.flip(1), last.flip(1)
    return first.int(), last.int()


def plain(q: Tensor, k: Tensor, v: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """By torch's own softmax under the mask; a query without keys gives zeros."""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    position = torch.arange(k.shape[2])
    seen = ((position >= first[..., None]) & (position < last[..., None]))[:, None]
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
    return torch.where(seen, weights, 0.0) @ v


def with_gradients(attend, qkv: list[Tensor], grad: Tensor, as_dtype: torch.dtype) -> dict[str, Tensor]:
    leaves = [t.to(as_dtype, copy=True).requires_grad_() for t in qkv]
    o = attend(*leaves)
    # Rows of NaN weights (no key at all) are replaced in `plain`, but not in its gradient: such rows get none.
    grads = torch.autograd.grad(o, leaves, grad.to(as_dtype))
    return dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *grads), strict=True))


def hold_to_the_definition(
    rule, ours: dict[str, Tensor], qkv: list[Tensor], grad: Tensor, first: Tensor, last: Tensor
) -> None:
    """The two-times rule where some queries may be without keys.

    `plain` cannot be asked about those: they look at their first key instead, and give zeros and no gradient.
    """
    empty = (last <= first)[:, None, :, None]
    last = torch.where(last > first, last, first + 1)
    grad = grad.masked_fill(empty, 0.0)
    naive, exact = (
        with_gradients(lambda *t: plain(*t, first, last).masked_fill(empty, 0.0), qkv, grad, dtype)
        for dtype in (grad.dtype, torch.float64)
    )
    for name in exact:
        rule(name, ours[name], naive[name], exact[name])


@settings(max_examples=25)
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 3),
    length=st.integers(1, 260),
    dim=st.integers(1, 80),
    kind=st.sampled_from(["causal", "window", "full", "packed", "examples", "unseen", "backwards"]),
    seed=st.integers(0, 999),
)
@example(batch=2, groups=3, per_group=3, length=97, dim=64, kind="causal", seed=0)
@example(batch=1, groups=2, per_group=2, length=301, dim=40, kind="window", seed=0)
@example(batch=1, groups=1, per_group=2, length=300, dim=65, kind="packed", seed=0)
@example(batch=1, groups=2, per_group=1, length=289, dim=96, kind="full", seed=0)
@example(batch=2, groups=3, per_group=2, length=413, dim=64, kind="examples", seed=3)
@example(batch=2, groups=1, per_group=1, length=350, dim=33, kind="unseen", seed=4)
@example(batch=1, groups=1, per_group=1, length=350, dim=64, kind="backwards", seed=5)
def test_equals_the_definition(dtype, two_times_rule, batch, groups, per_group, length, dim, kind, seed):
    *qkv, grad = operands(batch, groups * per_group, groups, length, dim, dtype, seed)
    first, last = kinds(kind, batch, length, seed)
    ours = with_gradients(lambda *t: range_attention(*t, first, last), qkv, grad, dtype)
    naive = with_gradients(lambda *t: plain(*t, first, last), qkv, grad, dtype)
    exact = with_gradients(lambda *t: plain(*t, first, last), qkv, grad, torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], naive[name], exact[name])


@pytest.mark.parametrize("length", [1, 16, 50, 100])
def test_queries_without_keys_give_zeros_and_no_gradient(dtype, two_times_rule, length):
    *qkv, grad = operands(3, 4, 2, length, 24, dtype)
    first, last = kinds("padded", 3, length, seed=length)
    empty = (last <= first)[:, None, :, None]
    ours = with_gradients(lambda *t: range_attention(*t, first, last), qkv, grad, dtype)
    assert (ours["o"].masked_select(empty) == 0).all()
    assert (ours["dq"].masked_select(empty) == 0).all()
    hold_to_the_definition(two_times_rule, ours, qkv, grad, first, last)


def test_strided_operands_and_the_layout_of_the_output(dtype):
    *qkv, _ = operands(2, 4, 2, 30, 16, dtype)
    first, last = kinds("causal", 2, 30, 0)
    expected = range_attention(*qkv, first, last)
    strided = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in qkv]
    assert torch.equal(range_attention(*strided, first, last), expected)
    assert expected.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(("length", "dim"), [(30, 16), (45, 24), (64, 64), (131, 33), (250, 32)])
@pytest.mark.parametrize("kind", ["causal", "window", "examples"])
def test_nothing_beside_the_operands_is_read(dtype, length, dim, kind):
    *qkv, grad = operands(2, 4, 2, length, dim, dtype)
    first, last = kinds(kind, 2, length, 0)
    expected = with_gradients(lambda *t: range_attention(*t, first, last), qkv, grad, dtype)
    # Rows end, and the last row ends, where NaN begins: any that enters a product shows.
    around = [t.new_full((*t.shape[:2], length + 1, dim + 1), torch.nan) for t in (*qkv, grad)]
    inside = [t[:, :, :length, :dim] for t in around]
    for window, t in zip(inside, (*qkv, grad), strict=True):
        window.copy_(t)
    leaves = [t.requires_grad_() for t in inside[:3]]
    o = range_attention(*leaves, first, last)
    given = dict(zip(expected, (o.detach(), *torch.autograd.grad(o, leaves, inside[3])), strict=True))
    for name, tensor in expected.items():
        assert torch.equal(given[name], tensor), name


@pytest.mark.parametrize(
    ("name", "dtype"), COMPILED, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in COMPILED]
)
@pytest.mark.parametrize("real", [1, 16, 17, 37, 64, 90])
def test_keys_that_no_query_sees_may_hold_anything(monkeypatch, name, dtype, real):
    monkeypatch.setenv("ALETHEIA_BACKEND", "cpu")
    *qkv, grad = operands(1, 4, 2, 100, 40, dtype)
    position = torch.arange(100, dtype=torch.int32)[None]
    last = torch.where(position < real, position + 1, position)  # causal, then padding: empty ranges
    first = torch.where(position < real, 0, position).int()
    with cpu.forced_instruction_set(name):
        expected = with_gradients(lambda *t: range_attention(*t, first, last), qkv, grad, dtype)
        for t in qkv[1:]:
            t[:, :, real:] = torch.nan
        given = with_gradients(lambda *t: range_attention(*t, first, last), qkv, grad, dtype)
    for which, tensor in expected.items():
        assert torch.equal(given[which], tensor), which


@pytest.mark.parametrize(
    ("batch", "queries", "keys"), [(2, 37, 90), (1, 90, 37), (0, 5, 5), (2, 0, 9), (1, 7, 0)]
)
def test_other_keys_than_queries_and_nothing_at_all(dtype, two_times_rule, batch, queries, keys):
    generator = torch.Generator().manual_seed(0)
    qkv = [
        torch.randn(batch, h, n, 24, generator=generator).to(dtype)
        for h, n in ((4, queries), (2, keys), (2, keys))
    ]
    grad = (
        torch.randn(batch, 1, 1, 24, generator=generator).to(dtype).expand(batch, 4, queries, 24)
    )  # one row for all
    last = torch.randint(0, keys + 1, (batch, queries), generator=generator, dtype=torch.int32)
    first = (last - 20).clamp_min(0)
    ours = with_gradients(lambda *t: range_attention(*t, first, last), qkv, grad, dtype)
    assert [t.shape for t in ours.values()] == [qkv[0].shape, *(t.shape for t in qkv)]
    if batch * queries * keys == 0:
        assert all((t == 0).all() for t in ours.values())
        return
    hold_to_the_definition(two_times_rule, ours, qkv, grad, first, last)


def test_large_scores_do_not_overflow(dtype, two_times_rule):
    *qkv, grad = operands(1, 2, 1, 60, 32, dtype)
    qkv[0] = qkv[0] * 60
    first, last = kinds("causal", 1, 60, 0)
    ours = with_gradients(lambda *t: range_attention(*t, first, last), qkv, grad, dtype)
    naive = with_gradients(lambda *t: plain(*t, first, last), qkv, grad, dtype)
    exact = with_gradients(lambda *t: plain(*t, first, last), qkv, grad, torch.float64)
    for name in exact:
        two_times_rule(name, ours[name], naive[name], exact[name])


# Of scores this large the roundings are larger than any exponent: the key with the largest takes all.
@pytest.mark.parametrize(
    ("name", "dtype"), [case for case in COMPILED if case[0] in ("default", "avx2", "avx512")]
)
def test_scores_beyond_every_exponent(monkeypatch, name, dtype):
    monkeypatch.setenv("ALETHEIA_BACKEND", "cpu")
    *qkv, grad = operands(1, 2, 1, 60, 32, dtype)
    qkv[0], qkv[1] = qkv[0] * 3e9, qkv[1] * 3e9
    first, last = kinds("causal", 1, 60, 0)
    with cpu.forced_instruction_set(name):
        ours = with_gradients(lambda *t: range_attention(*t, first, last), qkv, grad, dtype)
    exact = with_gradients(lambda *t: plain(*t, first, last), qkv, grad, torch.float64)
    for which in ("o", "dv"):
        torch.testing.assert_close(ours[which].double(), exact[which], rtol=2e-2, atol=1e-2)
    assert ours["dq"].isfinite().all()
    assert ours["dk"].isfinite().all()


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("ALETHEIA_BACKEND", "reference")
    *qkv, _ = operands(2, 4, 2, 6, 3, torch.float64)
    first, last = kinds("packed", 2, 6, 0)
    leaves = [t.requires_grad_() for t in qkv]
    assert torch.autograd.gradcheck(lambda *t: range_attention(*t, first, last, scale=0.7), leaves)


def test_operator_contract(dtype):
    *qkv, grad = operands(2, 4, 2, 20, 8, dtype)
    first, last = kinds("window", 2, 20, 0)
    leaves = [t.requires_grad_() for t in qkv]
    torch.library.opcheck(torch.ops.aletheia.range_attention.default, (*leaves, first, last, 0.3))
    compiled = torch.compile(lambda *t: range_attention(*t, first, last), fullgraph=True, backend="aot_eager")
    given_grads = torch.autograd.grad(compiled(*leaves), leaves, grad)
    expected = torch.autograd.grad(range_attention(*leaves, first, last), leaves, grad)
    for a, b in zip(given_grads, expected, strict=True):
        assert torch.equal(a, b)


def test_a_run_repeats_bit_for_bit_whatever_the_threads(dtype):
    *qkv, grad = operands(2, 6, 3, 70, 24, dtype)
    first, last = kinds("causal", 2, 70, 0)
    runs = []
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        runs.append(with_gradients(lambda *t: range_attention(*t, first, last), qkv, grad, dtype))
    for name, tensor in runs[0].items():
        assert torch.equal(runs[1][name], tensor)
        torch.testing.assert_close(runs[2][name], tensor, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda q, k, v, a, b: (q[0], k, v, a, b), "q \\[batch, heads, queries, dim\\]"),
        (lambda q, k, v, a, b: (q[:, :3], k, v, a, b), "heads a multiple of key heads"),
        (lambda q, k, v, a, b: (q.double(), k, v, a, b), "one floating dtype"),
        (lambda q, k, v, a, b: (q, k, v, a.long(), b), "first: expected int32 \\[2, 20\\]"),
        (lambda q, k, v, a, b: (q, k, v, a, b + 1), "ranges within \\[0, 20\\]"),
        (lambda q, k, v, a, b: (q, k, v, a - 1, b), "ranges within \\[0, 20\\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(dtype, spoil, message):
    *qkv, _ = operands(2, 4, 2, 20, 8, dtype)
    with pytest.raises(RuntimeError, match=message):
        range_attention(*spoil(*qkv, *kinds("causal", 2, 20, 0)))
