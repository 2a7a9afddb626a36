"""Every family's row of docs/families.md holds as it is written there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.families import COLUMNS, HALF_PRECISION, examine, half_precision, markdown
from benchmarks.family_table import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text(encoding="utf-8"))
ROWS, HALVES = RESULTS["families"], RESULTS["half_precision"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_the_table(family):
    # Better or worse than written: `python benchmarks/families.py` writes both files anew.
    assert examine(FAMILIES[family]) == ROWS[family]


@pytest.mark.parametrize("dtype", HALF_PRECISION)
def test_gpt_neox_in_half_precision(dtype):
    assert half_precision(HALF_PRECISION[dtype]) == HALVES[dtype]


@pytest.mark.parametrize("family", ["LLaVA", "Qwen2.5-VL"])
def test_the_picture_of_a_batch_counts(family):
    model, batch = FAMILIES[family].build(), FAMILIES[family].batch(torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = [
            model(**{**batch, "pixel_values": by * batch["pixel_values"]}).loss.item() for by in (1, -1)
        ]
    assert abs(losses[0] - losses[1]) > 1e-3


def test_the_page_is_made_from_the_rows():
    assert list(ROWS) == list(FAMILIES)
    assert list(HALVES) == list(HALF_PRECISION)
    assert all(list(cells) == list(COLUMNS) for cells in ROWS.values())
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == markdown(ROWS, HALVES)
