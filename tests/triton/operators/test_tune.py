"""What tuning measures are two ways to one result, and what it keeps is what the next call finds."""

from __future__ import annotations

import pytest
import torch

from aletheia_kernels.triton import lora_fused, tuned
from aletheia_kernels.triton.cards import Card
from benchmarks import tune

BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}


@pytest.fixture
def projections(device) -> tune.Projections:
    torch.manual_seed(0)
    return tune.Projections(40, 64, (96, 48), (4, 8), device)


@pytest.mark.parametrize("fused_ms", [0.9, 1.1])
def test_the_faster_form_is_chosen(projections, device, fused_ms, monkeypatch):
    import triton.testing

    monkeypatch.setattr(lora_fused, "candidates", lambda card, dtype: [BLOCKS])
    monkeypatch.setattr(
        triton.testing,
        "do_bench",
        lambda function, return_mode: 1.0 if function == projections.composed else fused_ms,
    )
    composed, best, chosen = tune.tune(projections, Card.of(device))
    assert (composed, best) == (1.0, fused_ms)
    assert chosen == (BLOCKS if fused_ms < 1 else {})


def test_a_wrong_kernel_is_not_chosen(projections, device, monkeypatch):
    monkeypatch.setattr(lora_fused, "candidates", lambda card, dtype: [BLOCKS])
    monkeypatch.setattr(projections, "fused", lambda blocks: [y * 1.1 for y in projections.composed()])
    monkeypatch.setattr("triton.testing.do_bench", lambda *_, **__: 1.0)
    with pytest.raises(AssertionError):
        tune.tune(projections, Card.of(device))


def test_what_is_kept_is_found_by_the_next_call(projections, tmp_path, monkeypatch):
    monkeypatch.setenv("ALETHEIA_CACHE", str(tmp_path))
    arguments = projections.x, projections.weights, projections.lora_As
    assert lora_fused.choice(*arguments) is None
    tuned.save(tuned.card_name(projections.x.device), {lora_fused.key(*arguments): BLOCKS})
    assert lora_fused.choice(*arguments) == BLOCKS
    tuned.save(tuned.card_name(projections.x.device), {lora_fused.key(*arguments): {}})
    assert lora_fused.choice(*arguments) is None
