"""Several processes train the adapter that one process trains on the same examples of every step."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SCRIPT = """
import sys
from aletheia_tune import TrainConfig, fine_tune, load_examples, load_model, uniform_plan

model_dir, train, held_out, out, batch = sys.argv[1:]
model, tokenizer = load_model(model_dir, "float32")
config = TrainConfig(
    steps=6, batch_size=int(batch), learning_rate=1e-2, dtype="float32", warmup=0, threads=1, progress=False
)
fine_tune(
    model, tokenizer, load_examples(train, tokenizer), load_examples(held_out, tokenizer),
    uniform_plan(model, rank=4, layers=[2, 3]), config, out,
)
"""

# The example as it stands, and afterwards how often this process called the operators and what share of the model it
# holds.
COUNTED = """
import runpy
import sys

import aletheia_kernels
import aletheia_tune.head

calls = {}


def count(owner, name):
    operator = getattr(owner, name)
    calls[name] = 0

    def counted(*arguments, **named):
        calls[name] += 1
        return operator(*arguments, **named)

    setattr(owner, name, counted)


count(aletheia_kernels, "lora_group")
count(aletheia_kernels, "lora_gated_mlp")
count(aletheia_tune.head, "linear_cross_entropy")
sys.argv = sys.argv[1:]
model = runpy.run_path(sys.argv[0], run_name="__main__")["model"]
parameters = list(model.parameters())
held = sum(getattr(p, "_local_tensor", p).numel() for p in parameters) / sum(p.numel() for p in parameters)
print("process", *calls.values(), held, flush=True)
"""
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "with_fsdp.py"


def run(launcher: list[str], *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]


@pytest.mark.parametrize("processes", [2])
def test_the_adapter_of_one_process(processes, tiny_model_dir, train_file, eval_file, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    given = (tiny_model_dir, train_file, eval_file)
    run([str(script)], *given, tmp_path / "one", 4)
    run([*torchrun(processes), str(script)], *given, tmp_path / "several", 4 // processes)

    one, several = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "several"))
    assert one["prefix_layers"] == several["prefix_layers"] == 2
    assert [e["step"] for e in one["evals"]] == [e["step"] for e in several["evals"]]
    assert several["eval_loss_after"] == pytest.approx(one["eval_loss_after"], rel=1e-4)
    assert several["eval_loss_after"] < several["eval_loss_before"]
    mine, theirs = (
        load_file(Path(tmp_path / name / "adapter_model.safetensors")) for name in ("several", "one")
    )
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "several", "train.py"]


@pytest.mark.parametrize("processes", [2])
def test_shards_probe_plan_train_stop_and_go_on_as_one_process(
    processes, tiny_model_dir, train_file, tmp_path, monkeypatch, capsys
):
    script = tmp_path / "counted.py"
    script.write_text(COUNTED)

    def losses_in(lines: list[str]) -> dict[int, float]:
        return {
            int(step): float(loss) for step, loss in (line.split() for line in lines if line[:1].isdigit())
        }

    def in_one(*arguments: object) -> dict[int, float]:
        monkeypatch.setattr(sys, "argv", [EXAMPLE.name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        return losses_in(capsys.readouterr().out.splitlines())

    def in_shards(*arguments: object) -> dict[int, float]:
        lines = run([*torchrun(processes), str(script), str(EXAMPLE)], *arguments).splitlines()
        losses = losses_in(lines)
        reports = [[float(word) for word in line.split()[1:]] for line in lines if line.startswith("process")]
        assert len(reports) == processes
        for *calls, held in reports:
            # In each step two adapted layers make two calls, four layers one MLP, and the loss is one.
            assert all(count >= most * len(losses) for count, most in zip(calls, (4, 4, 1), strict=True))
            assert held == pytest.approx(1 / processes, abs=0.02)
        return losses

    given = tiny_model_dir, train_file
    once = in_one(*given, tmp_path / "once", 5)
    turns = [
        in_shards(*given, tmp_path / "first", 2),
        in_one(*given, tmp_path / "second", 3, tmp_path / "first"),
        in_shards(*given, tmp_path / "third", 5, tmp_path / "second"),
    ]
    assert [list(losses) for losses in turns] == [[1, 2], [3], [4, 5]]
    in_turns = {step: loss for losses in turns for step, loss in losses.items()}
    assert in_turns == pytest.approx(once, rel=1e-5)
    assert once[5] < once[1]

    mine, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("third", "once"))
    assert mine.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, rtol=1e-3, atol=1e-4, msg=key)
    names = {path.name for path in (tmp_path / "once").iterdir()}
    assert {path.name for path in (tmp_path / "third").iterdir()} == names
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "third"
    )
    for key, value in mine.items():
        parameter = loaded.get_parameter(key.replace(".weight", ".default.weight"))
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=0)
