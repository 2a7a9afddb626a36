"""Bytes and FLOPs are counted as a person would count them."""

from __future__ import annotations

import pytest
import torch

from benchmarks import adapted
from benchmarks.traffic import OVERHEAD_S, Cost, Rate, counting, others, products


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def counted(function) -> list[tuple[str, int, int]]:
    with counting() as kept:
        function()
    return [(cost.name, cost.bytes, cost.flops) for cost in kept.costs]


def test_a_product_reads_its_operands_and_writes_its_result():
    x, weight = empty(4, 8), empty(6, 8)
    assert counted(lambda: x @ weight.T) == [("mm", 2 * (4 * 8 + 6 * 8 + 4 * 6), 2 * 4 * 8 * 6)]


def test_views_and_allocations_move_nothing():
    x = empty(4, 8)
    assert counted(lambda: (x.view(2, 16).T[:3], x.detach(), x.expand(2, 4, 8), torch.empty_like(x))) == []
    assert counted(lambda: x[:0].zero_()) == []


@pytest.mark.parametrize(
    ("name", "operation", "elements"),
    [
        ("add", lambda x, y: x + y, 3 * 32),
        ("add", lambda x, y: x + x, 2 * 32),
        ("add", lambda x, y: x + y[:1].expand(4, 8), 2 * 32 + 8),
        ("add_", lambda x, y: x.add_(y), 3 * 32),
        ("copy_", lambda x, y: x.copy_(y), 2 * 32),
        ("zero_", lambda x, y: x.zero_(), 32),
        ("zeros_like", lambda x, y: torch.zeros_like(x), 32),
        ("cat", lambda x, y: torch.cat([x, y]), 4 * 32),
    ],
)
def test_an_operation_moves_what_it_reads_and_writes(name, operation, elements):
    x, y = empty(4, 8), empty(4, 8)
    assert counted(lambda: operation(x, y)) == [(name, 2 * elements, 0)]


def test_an_added_product_counts_its_flops_and_what_it_adds_to():
    out, left, right = empty(4, 6), empty(4, 8), empty(8, 6)
    moved = 2 * (2 * 4 * 6 + 4 * 8 + 8 * 6)
    assert counted(lambda: out.addmm_(left, right)) == [("addmm_", moved, 2 * 4 * 8 * 6)]


def test_a_cast_reads_one_dtype_and_writes_the_other():
    assert counted(lambda: empty(4, 8).float()) == [("_to_copy", 32 * 2 + 32 * 4, 0)]


def test_rows_that_are_taken_are_read_and_the_others_are_not():
    x, rows = empty(1000, 8), empty(3, dtype=torch.int64)
    assert counted(lambda: x[rows]) == [("index", 3 * 8 + 2 * 2 * 3 * 8, 0)]


def test_a_time_is_the_longer_of_memory_and_arithmetic_and_the_overhead():
    rate = Rate("a card", bandwidth=100.0, flops=1000.0)
    costs = [Cost("by memory", 500, 10), Cost("by arithmetic", 1, 7000)]
    assert rate.seconds(costs) == pytest.approx(5.0 + 7.0 + 2 * OVERHEAD_S)


def test_pefts_layer_is_traced_operation_by_operation():
    """One linear 8 -> 6 with rank 2 and float32 adapters on 4 tokens."""
    module = adapted.Siblings(8, (6,)).with_peft((2,), torch.float32)
    costs = adapted.counted_pass(module, empty(4, 8))
    x, y, low = 4 * 8, 4 * 6, 4 * 2
    weight, a, b = 6 * 8, 2 * 8, 6 * 2
    forward = [
        ("mm", 2 * (x + weight + y)),
        ("_to_copy", 6 * x),
        ("mm", 4 * (x + a + low)),
        ("mm", 4 * (low + b + y)),
        ("mul", 4 * 2 * y),  # times the scaling
        ("add", 2 * y + 4 * 2 * y),
        ("_to_copy", 6 * y),
    ]
    assert [(cost.name, cost.bytes) for cost in costs[: len(forward)]] == forward
    backward = [
        ("_to_copy", 6 * y),  # dy in float32
        ("_to_copy", 6 * y),  # and, from there, for the base product in bfloat16
        ("mul", 4 * 2 * y),
        ("mm", 4 * (y + low + b)),  # dB
        ("mm", 4 * (y + b + low)),  # g
        ("mm", 4 * (low + x + a)),  # dA
        ("mm", 4 * (low + a + x)),
        ("_to_copy", 6 * x),
        ("mm", 2 * (y + weight + x)),
        ("add", 2 * 3 * x),
    ]
    assert sorted((cost.name, cost.bytes) for cost in costs[len(forward) :]) == sorted(backward)


def test_our_group_is_its_products_and_its_launches():
    costs = adapted.counted_pass(adapted.OurGroup(64, (48, 32), (3, 5)), empty(16, 64))
    x, ys = 16 * 64, (16 * 48, 16 * 32)
    weights = (48 * 64, 32 * 64)
    base = [2 * (x + w + y) for w, y in zip(weights, ys, strict=True)]
    base += [2 * (ys[0] + weights[0] + x), 2 * (ys[1] + weights[1] + 2 * x)]
    assert [cost.bytes for cost in products(costs)] == base
    shrink, expand = [cost for cost in others(costs) if cost.name in ("lora_shrink", "lora_expand")]
    assert (shrink.name, shrink.flops) == ("lora_shrink", 2 * 16 * 64 * 8)
    assert shrink.bytes == 2 * x + 4 * (3 + 5) * 64 + 4 * 16 * 8
    assert (expand.name, expand.flops) == ("lora_expand", 2 * 16 * (48 * 3 + 32 * 5))
    assert expand.bytes == 2 * 2 * sum(ys) + 4 * 16 * 8 + 4 * (48 * 3 + 32 * 5)


def test_our_experts_are_their_products_and_their_launches():
    rows, width, out, experts, rank = 64, 32, 48, 4, 16
    costs = adapted.counted_pass(adapted.OurExperts(width, out, experts, rank), empty(rows, width))
    weight = experts * out * width
    assert [cost.bytes for cost in products(costs)] == [
        2 * (rows * width + weight + rows * out) + 4 * experts
    ] * 2
    launches = {cost.name: cost for cost in others(costs)}
    gradient = [cost for cost in others(costs) if cost.name == "grouped_gradient"]
    assert [cost.flops for cost in gradient] == [2 * rows * out * rank, 2 * rows * width * rank]
    assert gradient[0].bytes == 2 * rows * (out + rank) + 4 * experts * out * rank
    assert launches["grouped_expand"].bytes == 2 * (2 * rows * width + rows * rank + experts * rank * width)
