"""LoRA projections as one kernel equal their definition, and serve only where a measurement chose them."""

from __future__ import annotations

import pytest
import torch

from aletheia_kernels import lora_group
from aletheia_kernels.reference import lora as reference
from aletheia_kernels.triton import lora, lora_fused, tuned
from aletheia_kernels.triton.cards import CARDS
from aletheia_kernels.triton.launch import recording

SMALL = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


def _operands(tokens, features, group, dtype, device):
    def normal(*shape: int, over: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, dtype=torch.float64) / over**0.5).to(dtype)

    torch.manual_seed(0)
    x = normal(tokens, features)
    weights = [normal(out, features, over=features) for out, _, _ in group]
    biases = [normal(out) if bias else None for out, _, bias in group]
    lora_As = [normal(rank, features, over=features) for _, rank, _ in group]
    lora_Bs = [normal(out, rank, over=rank) for out, rank, _ in group]
    return x, weights, biases, lora_As, lora_Bs, [0.5 + i for i in range(len(group))]


def _converted(operands, convert):
    return [
        operand
        if isinstance(operand, list) and isinstance(operand[0], float)
        else [None if t is None else convert(t) for t in operand]
        if isinstance(operand, list)
        else convert(operand)
        for operand in operands
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("tokens", "features", "group"),
    [
        (70, 50, [(33, 5, True), (90, 40, False)]),
        (1, 33, [(7, 1, False)]),
        (0, 16, [(8, 4, False)]),
        (600, 16, [(65, 8, True)]),
    ],
)
def test_equals_the_definition(guarded, two_times_rule, device, dtype, tokens, features, group):
    operands = _operands(tokens, features, group, dtype, device)
    plain, _ = reference.lora_group_forward(*operands, 0.0, None)
    exact, _ = reference.lora_group_forward(*_converted(operands, torch.Tensor.double), 0.0, None)
    x, weights, biases, lora_As, lora_Bs, scalings = _converted(operands, guarded)
    h = lora.shrink(x, lora_As, 0.0, None)
    ys = lora_fused.fused_forward(x, weights, biases, h, [b.float() for b in lora_Bs], scalings, SMALL)
    for i, y in enumerate(ys):
        two_times_rule(f"y[{i}]", y, plain[i], exact[i])


def _names(call) -> list[str]:
    with recording(CARDS["sm_90"]) as kept:
        call()
    return [launch.name for launch in kept.launches]


def test_serves_where_it_was_measured_to_gain(device, tmp_path, monkeypatch):
    monkeypatch.setenv("ALETHEIA_CACHE", str(tmp_path))
    x, weights, _, lora_As, lora_Bs, scalings = _converted(
        _operands(20, 24, [(40, 3, False)], torch.bfloat16, device), lambda t: t.to(device)
    )

    def call() -> None:
        lora_group(x, weights, [None], lora_As, lora_Bs, scalings)

    assert _names(call) == ["lora_shrink", "lora_expand"]
    key, card = lora_fused.key(x, weights, lora_As), tuned.card_name(device)
    tuned.save(card, {key: SMALL})
    assert _names(call) == ["lora_shrink", "lora_linear_fused"]
    tuned.save(card, {key: {"BLOCK_M": 64}})
    assert _names(call) == ["lora_shrink", "lora_expand"]
    tuned.save(card, {key: {}})
    assert _names(call) == ["lora_shrink", "lora_expand"]


def test_calls_of_nearly_one_size_share_a_measurement():
    weights, lora_As = [torch.empty(40, 24)], [torch.empty(3, 24)]
    keys = [lora_fused.key(torch.empty(tokens, 24), weights, lora_As) for tokens in (1000, 1024, 1025)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_every_card_has_choices_that_it_can_hold(card):
    found = lora_fused.candidates(card, torch.bfloat16)
    assert found
    assert all(blocks["num_warps"] <= card.max_warps for blocks in found)
    assert lora_fused.candidates(card, torch.float32) == []
