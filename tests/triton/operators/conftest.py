"""What the Triton operators' tests share. TRITON_INTERPRET=1 runs them on CPU tensors; without it they need a card."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

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


@pytest.fixture
def model(device: torch.device) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                pad_token_id=0,
            )
        )
    return model.to(device)


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
