"""linear_cross_entropy equals torch's cross entropy of the full logits, and never holds them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from aletheia_kernels import linear_cross_entropy
from aletheia_kernels.reference import cross_entropy as reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def operands(
    rows: int, hidden: int, vocabulary: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, hidden, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, hidden, generator=generator) * 2 / hidden**0.5).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype)
    return h, weight, bias, torch.randint(0, vocabulary, (rows,), generator=generator)


def plain(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """As transformers computes it: logits in h's dtype, softcap, widened, cross entropy."""
    h = h.detach().clone().requires_grad_()
    logits = torch.nn.functional.linear(h, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = torch.nn.functional.cross_entropy(wide, labels, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, h)[0]


@DTYPES
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    rows=st.integers(0, 90),
    hidden=st.integers(1, 80),
    vocabulary=st.integers(2, 600),
    softcap=st.sampled_from([None, 4.0]),
    with_bias=st.booleans(),
    seed=st.integers(0, 999),
)
@example(rows=0, hidden=8, vocabulary=11, softcap=None, with_bias=True, seed=0)
def test_equals_the_definition(
    backend, two_times_rule, dtype, rows, hidden, vocabulary, softcap, with_bias, seed
):
    h, weight, bias, labels = operands(rows, hidden, vocabulary, dtype, seed)
    bias = bias if with_bias else None
    leaf = h.clone().requires_grad_()
    loss = linear_cross_entropy(leaf, weight, labels, bias=bias, softcap=softcap)
    (dh,) = torch.autograd.grad(loss, leaf)
    wide = [t if t is None else t.double() for t in (h, weight, bias)]
    exact_loss, exact_dh = plain(*wide, labels, softcap)
    plain_loss, plain_dh = plain(h, weight, bias, labels, softcap)
    two_times_rule("loss", loss.detach(), plain_loss, exact_loss, computed_in=dtype)
    two_times_rule("dh", dh, plain_dh, exact_dh)


@DTYPES
@pytest.mark.parametrize("scale", [1e-3, 1.0, 200.0], ids=["flat", "usual", "sharp"])
def test_more_rows_than_a_block_and_extreme_logits(backend, two_times_rule, monkeypatch, dtype, scale):
    h, weight, _, labels = operands(300, 16, 49152, dtype)
    assert reference.rows_per_block(49152) < 300
    h = (h.float() * scale).to(dtype)
    leaf = h.clone().requires_grad_()
    loss = linear_cross_entropy(leaf, weight, labels)
    (dh,) = torch.autograd.grad(loss, leaf)
    exact_loss, exact_dh = plain(h.double(), weight.double(), None, labels, None)
    plain_loss, plain_dh = plain(h, weight, None, labels, None)
    two_times_rule("loss", loss.detach(), plain_loss, exact_loss, computed_in=dtype)
    two_times_rule("dh", dh, plain_dh, exact_dh)


def test_upstream_gradient_scales(backend):
    h, weight, _, labels = operands(10, 8, 30, torch.float32)
    leaf = h.clone().requires_grad_()
    (once,) = torch.autograd.grad(linear_cross_entropy(leaf, weight, labels), leaf)
    (thrice,) = torch.autograd.grad(3 * linear_cross_entropy(leaf, weight, labels), leaf)
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck(backend, softcap):
    h, weight, bias, labels = (
        t.double() if t.is_floating_point() else t for t in operands(5, 6, 9, torch.float32)
    )
    assert torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(h, weight, labels, bias=bias, softcap=softcap), (h.requires_grad_(),)
    )


@DTYPES
def test_operator_contract(backend, dtype):
    h, weight, bias, labels = operands(12, 8, 30, dtype)
    h.requires_grad_()
    torch.library.opcheck(
        torch.ops.aletheia.linear_cross_entropy.default, (h, weight, bias, labels, 2.0, True)
    )

    def run(h):
        return linear_cross_entropy(h, weight, labels, bias=bias)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(h)
    expected = run(h)
    assert torch.equal(compiled, expected)
    assert torch.equal(torch.autograd.grad(compiled, h)[0], torch.autograd.grad(expected, h)[0])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda h, w, y: (h, w, y + 30), "class indices in \\[0, 30\\)"),
        (lambda h, w, y: (h, w, y - 100), "class indices in \\[0, 30\\)"),
        (lambda h, w, y: (h, w[:, :-1], y), "h \\[rows, hidden\\] and weight"),
        (lambda h, w, y: (h, w.double(), y), "one floating dtype"),
        (lambda h, w, y: (h, w, y[:-1]), "labels: expected int64 \\[10\\]"),
        (lambda h, w, y: (h, w.requires_grad_(), y), "expected a frozen head"),
    ],
)
def test_arguments_that_do_not_fit_are_named(backend, spoil, message):
    h, weight, _, labels = operands(10, 8, 30, torch.float32)
    h, weight, labels = spoil(h, weight, labels)
    with pytest.raises(RuntimeError, match=message):
        linear_cross_entropy(h, weight, labels)


def test_a_mean_over_rows_scales_the_gradient_exactly(backend, two_times_rule):
    # 1/77 is not a bf16 number: rounded before the product, it would put one factor on every element.
    h, weight, _, labels = operands(77, 32, 200, torch.bfloat16)

    def mean(h: Tensor, weight: Tensor, ours: bool) -> Tensor:
        leaf = h.clone().requires_grad_()
        if ours:
            loss = linear_cross_entropy(leaf, weight, labels) / 77
        else:
            wide = (leaf @ weight.T).to(torch.promote_types(h.dtype, torch.float32))
            loss = torch.nn.functional.cross_entropy(wide, labels)
        return torch.autograd.grad(loss, leaf)[0]

    exact = mean(h.double(), weight.double(), ours=False)
    two_times_rule("dh", mean(h, weight, ours=True), mean(h, weight, ours=False), exact)
    scale = (mean(h, weight, ours=True).double() * exact).sum() / exact.square().sum()
    assert abs(scale - 1) < 1e-3
