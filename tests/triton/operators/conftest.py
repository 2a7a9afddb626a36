"""What the Triton operators' tests share. TRITON_INTERPRET=1 runs them on CPU tensors; without it they need a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from aletheia_kernels import triton

# Wide enough that a tile which starts on the last row reads guards, not whatever lies behind.
MARGIN = 4096


@pytest.fixture(scope="session")
def device() -> torch.device:
    if triton.interpreted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no card: TRITON_INTERPRET=1 runs these tests without one")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def triton_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALETHEIA_BACKEND", "triton")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every torch.empty comes filled with NaN, so an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def guarded(device: torch.device) -> Callable[[Tensor], Tensor]:
    """A copy on the device that lies between two margins of NaN: what reads out of bounds returns NaN."""

    def guard(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        count = tensor.numel()
        storage = torch.full((count + 2 * MARGIN,), float("nan"), dtype=tensor.dtype, device=device)
        inner = storage[MARGIN : MARGIN + count].view(tensor.shape)
        return inner.copy_(tensor)

    return guard


def _relative_rms(given: Tensor, exact: Tensor) -> float:
    scale = exact.double().norm().item() or 1.0
    return (given.cpu().double() - exact.cpu().double()).norm().item() / scale


@pytest.fixture
def two_times_rule() -> Callable[..., None]:
    """error(ours) ≤ 2 · error(plain torch in the same dtype) + 1e-5, both as relative RMS against float64.

    Tensors of fewer than 256 elements are allowed √(256 / n) units of roundoff besides, since the few roundings of
    plain torch may cancel by luck.
    """

    def check(name: str, ours: Tensor, plain: Tensor, exact: Tensor) -> None:
        assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
        assert torch.isfinite(ours).all(), f"{name}: an element is not finite"
        n = ours.numel()
        slack = torch.finfo(plain.dtype).eps * (256 / n) ** 0.5 if 0 < n < 256 else 0.0
        error, allowed = _relative_rms(ours, exact), 2 * _relative_rms(plain, exact) + 1e-5 + slack
        assert error <= allowed, f"{name}: relative RMS error {error:.3g}, allowed {allowed:.3g}"

    return check
