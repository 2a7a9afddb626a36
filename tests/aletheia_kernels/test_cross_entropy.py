"""linear_cross_entropy equals torch's cross entropy of the full logits, and never holds them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given, settings
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
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As transformers computes it: logits in h's dtype, softcap, widened, cross entropy."""
    h = h.detach().clone().requires_grad_()
    logits = torch.nn.functional.linear(h, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    loss = torch.nn.functional.cross_entropy(wide, labels, reduction="sum", label_smoothing=label_smoothing)
    return loss.detach(), torch.autograd.grad(loss, h)[0]


@DTYPES
@settings(max_examples=25)
@given(
    rows=st.integers(0, 90),
    hidden=st.integers(1, 80),
    vocabulary=st.integers(2, 600),
    softcap=st.sampled_from([None, 4.0]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    with_bias=st.booleans(),
    seed=st.integers(0, 999),
)
@example(rows=0, hidden=8, vocabulary=11, softcap=None, label_smoothing=0.1, with_bias=True, seed=0)
@example(rows=600, hidden=8, vocabulary=37, softcap=4.0, label_smoothing=0.1, with_bias=True, seed=0)
def test_equals_the_definition(
    backend, two_times_rule, dtype, rows, hidden, vocabulary, softcap, label_smoothing, with_bias, seed
):
    h, weight, bias, labels = operands(rows, hidden, vocabulary, dtype, seed)
    bias = bias if with_bias else None
    leaf = h.clone().requires_grad_()
    options = {"softcap": softcap, "label_smoothing": label_smoothing}
    loss = linear_cross_entropy(leaf, weight, labels, bias=bias, **options)
    (dh,) = torch.autograd.grad(loss, leaf)
    wide = [t if t is None else t.double() for t in (h, weight, bias)]
    exact_loss, exact_dh = plain(*wide, labels, **options)
    plain_loss, plain_dh = plain(h, weight, bias, labels, **options)
    two_times_rule("loss", loss.detach(), plain_loss, exact_loss, computed_in=dtype)
    two_times_rule("dh", dh, plain_dh, exact_dh)


@DTYPES
@pytest.mark.parametrize(
    ("scale", "options"),
    [(1e-3, {}), (1.0, {}), (200.0, {}), (200.0, {"softcap": 30.0, "label_smoothing": 0.1})],
    ids=["flat", "usual", "sharp", "sharp-capped-smoothed"],
)
def test_more_rows_than_a_block_and_extreme_logits(backend, two_times_rule, dtype, scale, options):
    h, weight, _, labels = operands(300, 16, 49152, dtype)
    assert reference.ROWS < 300
    h = (h.float() * scale).to(dtype)
    leaf = h.clone().requires_grad_()
    loss = linear_cross_entropy(leaf, weight, labels, **options)
    (dh,) = torch.autograd.grad(loss, leaf)
    exact_loss, exact_dh = plain(h.double(), weight.double(), None, labels, **options)
    plain_loss, plain_dh = plain(h, weight, None, labels, **options)
    two_times_rule("loss", loss.detach(), plain_loss, exact_loss, computed_in=dtype)
    two_times_rule("dh", dh, plain_dh, exact_dh)


def test_upstream_gradient_scales(backend):
    h, weight, _, labels = operands(10, 8, 30, torch.float32)
    leaf = h.clone().requires_grad_()
    (once,) = torch.autograd.grad(linear_cross_entropy(leaf, weight, labels), leaf)
    (thrice,) = torch.autograd.grad(3 * linear_cross_entropy(leaf, weight, labels), leaf)
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_gradcheck(backend, softcap, label_smoothing):
    h, weight, bias, labels = (
        t.double() if t.is_floating_point() else t for t in operands(5, 6, 9, torch.float32)
    )
    assert torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(
            h, weight, labels, bias=bias, softcap=softcap, label_smoothing=label_smoothing
        ),
        (h.requires_grad_(),),
    )


@DTYPES
def test_operator_contract(backend, dtype):
    h, weight, bias, labels = operands(12, 8, 30, dtype)
    h.requires_grad_()
    torch.library.opcheck(
        torch.ops.aletheia.linear_cross_entropy.default, (h, weight, bias, labels, 2.0, 0.1, True)
    )

    def run(h):
        return linear_cross_entropy(h, weight, labels, bias=bias)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(h)
    expected = run(h)
    assert torch.equal(compiled, expected)
    assert torch.equal(torch.autograd.grad(compiled, h)[0], torch.autograd.grad(expected, h)[0])


def test_the_gradient_lies_as_the_traced_call_says(backend):
    h, weight, bias, labels = operands(8, 12, 30, torch.float32)
    h = h.T.contiguous().T.requires_grad_()
    torch.library.opcheck(
        torch.ops.aletheia.linear_cross_entropy.default, (h, weight, bias, labels, 0.0, 0.0, True)
    )


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


@pytest.mark.parametrize("epsilon", [-0.1, 1.1])
def test_smoothing_beyond_all_of_the_label_is_refused(backend, epsilon):
    h, weight, _, labels = operands(10, 8, 30, torch.float32)
    with pytest.raises(RuntimeError, match="label_smoothing: expected 0 <= epsilon <= 1"):
        linear_cross_entropy(h, weight, labels, label_smoothing=epsilon)


PEAKS = """
import torch
from aletheia_kernels import linear_cross_entropy, reference

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024

torch.set_num_threads(1)
weight = torch.randn(20_000, 8)
print(peak())
for blocks in (2, 8):
    rows = blocks * reference.cross_entropy.ROWS
    h = torch.randn(rows, 8).requires_grad_()
    labels = torch.randint(0, 20_000, (rows,))
    loss = linear_cross_entropy(h, weight, labels, softcap=30.0, label_smoothing=0.1)
    assert sum(tensor.numel() for tensor in loss.grad_fn.saved_tensors) == h.numel(), "only dh is kept"
    print(peak())
"""


def test_memory_does_not_grow_with_the_rows(backend):
    # A fixed threshold: malloc hands large blocks back, always, so that what is resident is what is alive.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(128 * 1024)
    done = subprocess.run(
        [sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True, env=environment
    )
    before, two_blocks, eight_blocks = map(int, done.stdout.split())
    block = reference.ROWS * 20_000 * 4
    assert two_blocks - before > block / 2, "a block of logits must show"
    assert eight_blocks - two_blocks < block / 2


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
