"""What every operator test shares: backends to force, and poisoned memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from aletheia_kernels import cpu

BACKENDS = ("reference", "cpu")


@pytest.fixture(scope="session", autouse=True)
def extension_is_built() -> None:
    assert cpu.unavailable_reason() is None, "the C++ extension must be built for the operator tests"


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """The operators split their work: on one thread a wrong split would not show."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("ALETHEIA_BACKEND", request.param)
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty and at::empty comes filled with NaN, so an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
