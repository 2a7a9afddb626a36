"""The GPU lane: what only a card can show. ``make test-gpu`` runs it after the operators' tests on the same card."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def a_card() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no card: torch.cuda.is_available() is False")
