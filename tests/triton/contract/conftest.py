"""The contract lane: what torch sees of the Triton operators. Run under TRITON_INTERPRET=1, it needs no card."""

from __future__ import annotations

import pytest

from aletheia_kernels import triton

if not triton.interpreted():
    raise pytest.UsageError("this lane runs the operators without a card: set TRITON_INTERPRET=1")


@pytest.fixture(autouse=True)
def triton_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALETHEIA_BACKEND", "triton")
