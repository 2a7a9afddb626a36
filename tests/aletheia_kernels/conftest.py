"""What every operator test shares: backends to force, poisoned memory, and the rule that decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

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


def _relative_rms(given: Tensor, exact: Tensor) -> float:
    scale = exact.double().norm().item() or 1.0
    return (given.double() - exact.double()).norm().item() / scale


@pytest.fixture
def two_times_rule() -> Callable[..., None]:
    """error(ours) ≤ 2 · error(plain torch in the same dtype) + 1e-5, both as relative RMS against float64.

    The rounding errors of n elements average out like 1/√n, and of a few plain torch may have hardly any by luck:
    tensors of fewer than 256 are allowed √(256 / n) units of roundoff of the dtype computed in (``plain``'s unless
    named) besides.
    """

    def check(
        name: str, ours: Tensor, plain: Tensor, exact: Tensor, computed_in: torch.dtype | None = None
    ) -> None:
        assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
        assert torch.isfinite(ours).all(), f"{name}: an element is not finite"
        n = ours.numel()
        slack = torch.finfo(computed_in or plain.dtype).eps * (256 / n) ** 0.5 if 0 < n < 256 else 0.0
        error, allowed = _relative_rms(ours, exact), 2 * _relative_rms(plain, exact) + 1e-5 + slack
        assert error <= allowed, f"{name}: relative RMS error {error:.3g}, allowed {allowed:.3g}"

    return check
