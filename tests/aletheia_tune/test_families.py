"""Every family's row of docs/families.md holds as it is written there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.families import COLUMNS, examine, markdown
from benchmarks.family_table import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
ROWS = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text(encoding="utf-8"))["families"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_the_table(family):
    # Better or worse than written: `python benchmarks/families.py` writes both files anew.
    assert examine(FAMILIES[family]) == ROWS[family]


def test_the_page_is_made_from_the_rows():
    assert list(ROWS) == list(FAMILIES)
    assert all(list(cells) == list(COLUMNS) for cells in ROWS.values())
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == markdown(ROWS)
