"""TRL's DPO and GRPO on a patched model: steps, rewards and adapters of the model that is not patched."""

from __future__ import annotations

import json
import math
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import aletheia_kernels
import aletheia_tune.kernels

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def preferences(train_file: Path, tmp_path: Path) -> Path:
    """Of each example the completion, preferred to the same words backwards."""
    path = tmp_path / "preferences.jsonl"
    with path.open("w") as file:
        for line in train_file.read_text().splitlines():
            example = json.loads(line)
            words = example["completion"].split()
            chosen, rejected = (" " + " ".join(order) for order in (words, reversed(words)))
            row = {"prompt": example["prompt"], "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture
def arithmetic_model_dir(tmp_path: Path) -> Path:
    """A random Llama whose whole vocabulary is digits and signs, so that some of what it draws is a number."""
    words = ["<pad>", "<eos>", "<unk>", "+", "=", *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.decoder = decoders.Fuse()
    path = tmp_path / "arithmetic"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """Of each call of the LoRA operator, whether it kept what a backward pass needs."""
    seen: list[bool] = []
    operator = aletheia_kernels.lora_group

    def counted(*arguments, **named):
        seen.append(torch.is_grad_enabled())
        return operator(*arguments, **named)

    monkeypatch.setattr(aletheia_kernels, "lora_group", counted)
    return seen


def run(name: str, *arguments: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """The example as it stands; what it logged at each step, and the adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        torch.manual_seed(0)
        trainer: Any = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")["trainer"]
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    weights = {n: p.detach() for n, p in trainer.model.named_parameters() if "lora_B" in n}
    return steps, weights


def beside_unpatched(
    name: str, given: list[Path], tmp_path: Path, calls: list[bool], monkeypatch
) -> list[dict]:
    ours, adapter = run(name, *given, tmp_path / "ours")
    patched = list(calls)

    @contextmanager
    def without(model, **_):
        yield None

    monkeypatch.setattr(aletheia_tune.kernels, "use_kernels", without)
    theirs, reference = run(name, *given, tmp_path / "theirs")
    assert len(calls) == len(patched) > 0
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("loss", "grad_norm", "reward", "rewards/margins", "completions/mean_length"):
            if key in other:
                assert mine[key] == pytest.approx(other[key], rel=5e-3, abs=1e-4), (other["step"], key)
    assert adapter.keys() == reference.keys()
    for key, weight in reference.items():
        assert weight.abs().max() > 0
        apart = (adapter[key] - weight).norm() / weight.norm()
        assert apart < 0.05, (key, float(apart))
    base = AutoModelForCausalLM.from_pretrained(given[0])
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "ours"))
    for key, weight in adapter.items():
        torch.testing.assert_close(loaded.get_parameter(key).detach(), weight, rtol=0, atol=0)
    return ours


def test_dpo(tiny_model_dir, preferences, tmp_path, calls, monkeypatch):
    steps = beside_unpatched("with_dpo", [tiny_model_dir, preferences], tmp_path, calls, monkeypatch)
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)  # the adapters begin as nothing
    assert sum(step["loss"] for step in steps[10:]) < 10 * math.log(2)
    assert sum(calls) >= 4 * 2 * 20


def test_grpo(arithmetic_model_dir, tmp_path, calls, monkeypatch):
    steps = beside_unpatched("with_grpo", [arithmetic_model_dir], tmp_path, calls, monkeypatch)
    assert all(step["grad_norm"] > 0 for step in steps)
    # Completions are drawn on the operators too, without gradients, one token after another.
    assert sum(calls) >= 2 * 2 * 10
    assert len(calls) - sum(calls) >= 2 * 2 * 10
