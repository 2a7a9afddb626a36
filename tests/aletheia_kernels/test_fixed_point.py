"""Bfloat16 products in fixed point: exact where they claim to be, and harmless where numbers run out.

That the operators on them are as close to their definitions as plain torch is said by the tests of each on every
instruction set.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from aletheia_kernels import cpu, linear_cross_entropy, lora_group

GROUP = 128  # inner indices that share a scale

pytestmark = pytest.mark.skipif(
    "avx512_vnni" not in cpu.offered_instruction_sets(), reason="this processor has no AVX512-VNNI"
)


@pytest.fixture(autouse=True)
def in_fixed_point(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ALETHEIA_BACKEND", "cpu")
    with cpu.forced_instruction_set("avx512_vnni"):
        yield


def products(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """x Wᵀ and dy W, by a LoRA group whose adapter is zero."""
    leaf = x.detach().requires_grad_()
    lora_A = torch.zeros(1, x.shape[1], dtype=x.dtype)
    lora_B = torch.zeros(weight.shape[0], 1, dtype=x.dtype)
    (y,) = lora_group(leaf, [weight], [None], [lora_A], [lora_B], [1.0])
    (dx,) = torch.autograd.grad(y, leaf, dy)
    return y.detach(), dx


def whole_numbers(most: int, *shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-most, most + 1, shape, generator=generator).to(torch.bfloat16)


# Whole numbers below 2^8 keep every bit, whatever the rest of their group is, and their sums are below 2^24, which
# float32 holds: what is left is one rounding to bfloat16.
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 97, 300])
@pytest.mark.parametrize(("inner", "outer"), [(1, 1), (2, 17), (127, 63), (129, 64), (200, 65), (255, 130)])
def test_whole_numbers_are_multiplied_exactly(rows, inner, outer):
    x, weight = whole_numbers(255, rows, inner, seed=1), whole_numbers(255, outer, inner, seed=2)
    dy = whole_numbers(255, rows, outer, seed=3)
    y, dx = products(x, weight, dy)
    assert torch.equal(y, (x.double() @ weight.double().T).to(torch.bfloat16))
    assert torch.equal(dx, (dy.double() @ weight.double()).to(torch.bfloat16))


def test_the_largest_sums_of_a_group_do_not_wrap_round():
    x = torch.full((7, 2 * GROUP), 255.0, dtype=torch.bfloat16)
    weight = torch.full((65, 2 * GROUP), -255.0, dtype=torch.bfloat16)
    y, dx = products(x, weight, torch.full((7, 65), 255.0, dtype=torch.bfloat16))
    assert (y == torch.tensor(-255.0 * 255.0 * 2 * GROUP).to(torch.bfloat16)).all()
    assert (dx == torch.tensor(-255.0 * 255.0 * 65).to(torch.bfloat16)).all()


def test_an_outlier_costs_its_own_group_what_is_below_its_last_digit(two_times_rule):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(70, 4 * GROUP, generator=generator).to(torch.bfloat16)
    weight = torch.randn(96, 4 * GROUP, generator=generator).to(torch.bfloat16)
    x[:, 3] = 2.0**12  # the rest of the first group of 128 is rounded to whole numbers
    y, _ = products(x, weight, torch.zeros(70, 96, dtype=torch.bfloat16))
    two_times_rule("y", y, x @ weight.T, x.double() @ weight.double().T)
    largest = x[:, :GROUP].abs().amax(1, keepdim=True).double()
    bound = 2.0**-12 * largest / 2 * weight[:, :GROUP].double().abs().sum(1)
    rounding = 2.0**-8 * (x.double() @ weight.double().T).abs() + 2.0**-6
    assert ((y.double() - x.double() @ weight.double().T).abs() <= bound + rounding).all()


@pytest.mark.parametrize("exponent", [-60, -20, 20, 60])
def test_powers_of_two_pass_through(exponent):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(9, 150, generator=generator).to(torch.bfloat16)
    weight = torch.randn(40, 150, generator=generator).to(torch.bfloat16)
    dy = torch.randn(9, 40, generator=generator).to(torch.bfloat16)
    y, dx = products(x, weight, dy)
    scaled_y, scaled_dx = products(x * 2.0**exponent, weight, dy * 2.0**exponent)
    assert torch.equal(scaled_y, y * 2.0**exponent)
    assert torch.equal(scaled_dx, dx * 2.0**exponent)


@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-30, 1e38])
def test_numbers_at_the_ends_of_the_range(size):
    x = torch.full((3, 130), size, dtype=torch.float32).to(torch.bfloat16)
    weight = torch.eye(130, dtype=torch.bfloat16)
    y, dx = products(x, weight, x)
    # Of less than 2^-115, as much is lost as 2^-127 is: no more than a bfloat16's own last digit at 2^-119.
    assert torch.allclose(y.double(), x.double(), rtol=0, atol=2.0**-127)
    assert torch.allclose(dx.double(), x.double(), rtol=0, atol=2.0**-127)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_where_it_is(bad):
    x, weight = whole_numbers(255, 8, 140, seed=6), whole_numbers(255, 70, 140, seed=7)
    dy = whole_numbers(255, 8, 70, seed=8)
    clean_y, clean_dx = products(x, weight, dy)
    x[2, 131], dy[5, 3] = bad, bad
    y, dx = products(x, weight, dy)
    assert not y[2].isfinite().any()
    assert not dx[5].isfinite().any()
    others = torch.arange(8)
    assert torch.equal(y[others != 2], clean_y[others != 2])
    assert torch.equal(dx[others != 5], clean_dx[others != 5])


def test_a_weight_that_is_not_finite_spoils_its_own_column():
    x, weight = whole_numbers(255, 8, 140, seed=6), whole_numbers(255, 70, 140, seed=7)
    dy = torch.zeros(8, 70, dtype=torch.bfloat16)
    clean, _ = products(x, weight, dy)
    weight[66, 1] = float("inf")
    y, _ = products(x, weight, dy)
    assert not y[:, 66].isfinite().any()
    columns = torch.arange(70) != 66
    assert torch.equal(y[:, columns], clean[:, columns])


def test_rows_of_zeros_are_zero():
    x, weight = torch.zeros(5, 300, dtype=torch.bfloat16), whole_numbers(255, 20, 300, seed=9)
    y, dx = products(x, weight, torch.zeros(5, 20, dtype=torch.bfloat16))
    assert (y == 0).all()
    assert (dx == 0).all()


# A vocabulary is the inner index of the head's second product: hundreds of groups, and columns of weights in strides.
@pytest.mark.parametrize("transposed", [False, True])
def test_head(two_times_rule, transposed):
    generator = torch.Generator().manual_seed(10)
    h = torch.randn(300, 72, generator=generator).to(torch.bfloat16)
    weight = (torch.randn(3001, 72, generator=generator) / 8).to(torch.bfloat16)
    labels = torch.randint(0, 3001, (300,), generator=generator)

    def run(head, dtype):
        leaf, w = h.to(dtype).requires_grad_(), weight.to(dtype)
        loss = head(leaf, w.T.contiguous().T if transposed else w)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    def plainly(leaf, w):
        logits = leaf @ w.T
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return torch.nn.functional.cross_entropy(wide, labels, reduction="sum")

    ours = run(lambda leaf, w: linear_cross_entropy(leaf, w, labels), torch.bfloat16)
    plain = run(plainly, torch.bfloat16)
    exact = run(plainly, torch.float64)
    for name, given, rounded, true in zip(("loss", "dh"), ours, plain, exact, strict=True):
        two_times_rule(name, given, rounded, true)
