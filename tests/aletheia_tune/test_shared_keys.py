"""A mask tells where a row's beginning is to be repeated, and the repeated keys give the gradient of one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aletheia_tune.shared_keys import shared_beginning, shared_mask


def mask_of(common: int, rests: list[int]) -> torch.Tensor:
    ends = torch.tensor(rests).cumsum(0) + common
    return shared_mask(common, ends[:-1], int(ends[-1]))


@given(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=2, max_size=5))
def test_each_query_sees_one_range_of_the_repeated_keys(common, rests):
    mask = mask_of(common, rests)
    shared = shared_beginning(mask)
    assert shared is not None
    assert len(shared.keys) == common * len(rests) + sum(rests)
    place = torch.arange(len(shared.keys))
    visible = (place >= shared.first[0][:, None]) & (place < shared.last[0][:, None])
    for query, seen in enumerate(visible):
        assert torch.equal(shared.keys[seen], mask[0, 0, query].nonzero().flatten())
    assert torch.equal(shared.keys[shared.rests], torch.arange(common + sum(rests)))
    assert torch.equal(shared.keys[shared.copies], torch.arange(common).expand(len(rests), common))


@pytest.mark.parametrize(
    "mask",
    [
        mask_of(2, [3, 2]).float(),
        mask_of(2, [3, 2]).expand(2, -1, -1, -1),
        mask_of(2, [3, 2])[..., :-1],
        torch.ones(1, 1, 6, 6, dtype=torch.bool).tril(),
        mask_of(0, [3, 2]),
        mask_of(2, [3, 2]).logical_and(torch.arange(7) != 1),
        mask_of(2, [3, 2]).logical_or(torch.arange(7) == 6),
    ],
    ids=["float", "two rows", "fewer keys", "causal", "nothing shared", "a hole", "not causal"],
)
def test_other_masks_are_none_of_this_form(mask):
    assert shared_beginning(mask) is None


@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
def test_gradients_of_the_copies_are_summed(layout):
    shared = shared_beginning(mask_of(3, [2, 4, 1]))
    assert shared is not None
    x = torch.randn(1, 2, 10, 4, dtype=torch.float64)
    if layout == "tokens first":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(shared.repeated(x), x[:, :, shared.keys])
    assert torch.autograd.gradcheck(shared.repeated, x.requires_grad_())


def test_many_copies_lose_nothing_to_bfloat16():
    shared = shared_beginning(mask_of(1, [1] * 600))
    assert shared is not None
    x = torch.zeros(1, 1, 601, 8, dtype=torch.bfloat16, requires_grad=True)
    shared.repeated(x).sum().backward()
    # Ones that are added up in bfloat16 come to 256 and no further.
    assert torch.equal(x.grad[0, 0, 0], torch.full((8,), 600, dtype=torch.bfloat16))
    assert torch.equal(x.grad[0, 0, 1:], torch.ones(600, 8, dtype=torch.bfloat16))
