"""A model small enough to train in a second, with its own tokenizer and data; the rule that judges errors."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# What a shell runs in the background ignores interrupts, and so would what the tests start there and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A first call may compile, and what the fixtures hold no example changes.
_EITHER = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
# The same examples in every run: whether the suite passes says something about the code alone. For others,
# `pytest --hypothesis-profile=explore`.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, **_EITHER)
hypothesis.settings.register_profile("explore", **_EITHER)
hypothesis.settings.load_profile("repeatable")

# Threads cost more than they bring at this size, and far more on a machine that others share.
torch.set_num_threads(1)

LETTERS = [chr(ord("a") + index) for index in range(26)]


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", "repeat", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers and its tokenizer, as save_pretrained leaves them (float32)."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = _tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def _write(path: Path, count: int, seed: int) -> Path:
    draw = random.Random(seed)
    with path.open("w") as file:
        for _ in range(count):
            words = " ".join(draw.choices(LETTERS[:6], k=draw.randint(2, 9)))
            file.write(json.dumps({"prompt": f"repeat {words}", "completion": words}) + "\n")
    return path


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 examples of prompt and completion, one JSON object a line."""
    return _write(tmp_path_factory.mktemp("data") / "train.jsonl", 48, seed=1)


@pytest.fixture(scope="session")
def eval_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """11 more: no multiple of a batch size, so that means of batch means would show."""
    return _write(tmp_path_factory.mktemp("data") / "eval.jsonl", 11, seed=2)


def _relative_rms(given: Tensor, exact: Tensor) -> float:
    scale = exact.double().norm().item() or 1.0
    return (given.cpu().double() - exact.cpu().double()).norm().item() / scale


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
