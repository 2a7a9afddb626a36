"""The ahead-of-time lane: kernels compiled for cards that are not there. It needs no card, and no interpreter."""

from __future__ import annotations

import pytest

from aletheia_kernels import triton

if triton.interpreted():
    raise pytest.UsageError(
        "TRITON_INTERPRET=1 makes kernels that cannot be compiled: run this lane without it"
    )

COMPILED = pytest.StashKey[str]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if COMPILED in config.stash:
        terminalreporter.write_line(f"ahead of time: {config.stash[COMPILED]}")
