"""lora_experts in Triton equals its definition, forward and every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aletheia_kernels.triton import experts as kernels
from tests.drawn import DTYPES
from tests.experts_case import Case


@pytest.fixture
def check(guarded, two_times_rule):
    """Holds a case on the device, between margins of NaN unless placed otherwise, to the two-times rule."""

    def run(
        case: Case, dtype: torch.dtype, adapters: torch.dtype | None = None, place=guarded
    ) -> dict[str, torch.Tensor]:
        plain, exact = case.plain(dtype), case.plain(torch.float64)
        ours = case.ours(place, adapters)
        for name in exact:
            two_times_rule(name, ours[name], plain[name], exact[name])
        return ours

    return run


@DTYPES
@settings(max_examples=4)
@given(
    group=st.lists(st.tuples(st.integers(0, 80), st.integers(1, 40)), min_size=1, max_size=3),
    in_features=st.integers(1, 100),
    out_features=st.integers(1, 100),
    spare=st.sampled_from([0, 3]),
    seed=st.integers(0, 2**31),
)
@example(group=[(0, 3), (0, 7)], in_features=33, out_features=5, spare=0, seed=0)
@example(group=[(0, 5), (65, 1), (0, 2), (3, 17)], in_features=64, out_features=48, spare=70, seed=1)
def test_equals_the_definition(check, dtype, group, in_features, out_features, spare, seed):
    counts, ranks = zip(*group, strict=True)
    check(Case.draw(counts, ranks, in_features, out_features, dtype, spare, seed), dtype)


def test_ranks_wider_than_a_block(check):
    case = Case.draw((20, 0, 9), (300, 129, 16), 40, 136, torch.float32)
    ours = check(case, torch.float32)
    assert not ours["dA"][1].any()
    assert not ours["dA"][2, 16:].any()
    assert not ours["dB"][2, :, 16:].any()


def test_experts_without_adapters_have_rank_zero(check):
    check(Case.draw((20, 0, 9), (0, 0, 0), 24, 20, torch.float32, spare=3), torch.float32)


def test_wide_master_adapters_in_pefts_layout(check):
    case = Case.draw((20, 0, 31), (3, 5, 16), 48, 40, torch.bfloat16)
    case.lora_B = case.lora_B.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    ours = check(case, torch.bfloat16, adapters=torch.float32)
    assert ours["dA"].dtype == ours["dB"].dtype == torch.float32


@DTYPES
def test_strided_operands(check, device, dtype):
    case = Case.draw((9, 0, 14), (3, 5, 8), 24, 20, dtype, spare=1)

    def every_other(t: torch.Tensor) -> torch.Tensor:
        holder = torch.full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"), dtype=t.dtype, device=device)
        holder[..., ::2] = t.to(device)
        return holder[..., ::2]

    check(case, dtype, place=lambda t: every_other(t) if t.is_floating_point() else t.to(device))


def test_a_run_repeats_bit_for_bit(device):
    case = Case.draw((40, 0, 70), (3, 5, 16), 48, 40, torch.bfloat16)
    first, again = (case.ours(lambda t: t.to(device)) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], again[name]), name


def test_every_row_has_one_tile(device):
    """The tiles that programs find for themselves, against a loop."""
    counts = (0, 64, 1, 0, 130, 0)
    case = Case.draw(counts, (1,) * 6, 16, 16, torch.float32, spare=65)
    ones = torch.ones(case.x.shape[0], 16, device=device)
    own = torch.arange(1.0, 7.0, device=device)[:, None, None].expand(6, 1, 16)
    found = kernels._product(ones, own, case.offs.to(device), None)[:, 0] / 16
    expected = torch.arange(1.0, 7.0).repeat_interleave(torch.tensor(counts))
    assert torch.equal(found.cpu(), torch.cat([expected, torch.zeros(65)]))
