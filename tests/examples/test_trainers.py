"""The same fine-tuning under three trainers, each with one line of this package's, and what that line changes."""

from __future__ import annotations

import difflib
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import aletheia_kernels
import aletheia_tune.kernels

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ["with_trainer", "with_sft", "with_accelerate"]


def adapter(name: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    monkeypatch.setattr(sys, "argv", [name, "DIR", "train.jsonl", str(out)])
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return load_file(out / "adapter_model.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_one_line_puts_a_trainer_on_the_kernels_and_changes_no_result(name, users_directory, monkeypatch):
    calls = 0
    operator = aletheia_kernels.lora_group

    def counted(*arguments, **named):
        nonlocal calls
        calls += 1
        return operator(*arguments, **named)

    monkeypatch.setattr(aletheia_kernels, "lora_group", counted)
    ours = adapter(name, users_directory / "ours", monkeypatch)
    # 4 layers, q, k, v in one call and o in another, at least 12 steps; the MLPs are another operator's.
    assert calls >= 4 * 2 * 12

    @contextmanager
    def without(model, **_):
        yield None

    monkeypatch.setattr(aletheia_tune.kernels, "use_kernels", without)
    before = calls
    theirs = adapter(name, users_directory / "theirs", monkeypatch)
    assert calls == before
    assert ours.keys() == theirs.keys()
    trained = [key for key in ours if "lora_B" in key]
    assert all(ours[key].abs().max() > 0 for key in trained)
    for key in trained:
        apart = (ours[key] - theirs[key]).norm() / theirs[key].norm()
        assert apart < 0.05, (key, float(apart))

    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained("DIR"), str(users_directory / "ours")
    )
    assert loaded.peft_config["default"].r == 16


@pytest.mark.parametrize("name", NAMES)
def test_the_one_line_is_one(name):
    lines = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""\n', 1)[1].splitlines()
    code = [line for line in lines if line.strip() and not line.startswith(("import ", "from "))]
    assert sum("use_kernels" in line for line in code) == 1
    assert len(code) <= 30


def code(name: str) -> list[str]:
    return (EXAMPLES / f"{name}.py").read_text(encoding="utf-8").split('"""\n', 1)[1].splitlines()


def test_a_plan_changes_six_lines_of_an_ordinary_script(users_directory, monkeypatch):
    ordinary = [
        line.removeprefix("    ") if "trainer.train()" in line else line
        for line in code("with_trainer")
        if "use_kernels" not in line
    ]
    changes = [line for line in difflib.ndiff(ordinary, code("with_plan")) if line.startswith("+ ")]
    assert 1 <= len([line for line in changes if line.strip() != "+"]) <= 6

    weights = adapter("with_plan", users_directory / "planned", monkeypatch)
    layers = {key.split(".layers.")[1].split(".")[0] for key in weights}
    assert len(layers) == 2  # of four
    assert all(weight.abs().max() > 0 for key, weight in weights.items() if "lora_B" in key)
