"""Checkpoints: a killed training goes on to the adapter of an undisturbed one; nothing else passes for a checkpoint."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from aletheia_tune import files
from aletheia_tune.checkpoint import Checkpoint, beside
from aletheia_tune.cli import app
from aletheia_tune.data import load_examples
from aletheia_tune.errors import NonFiniteLoss, UserError
from aletheia_tune.loading import load_model
from aletheia_tune.metrics import TrainResult
from aletheia_tune.plan import Plan, uniform_plan
from aletheia_tune.train import fine_tune
from aletheia_tune.training_config import TrainConfig
from tests.at_step import AtStep, Killed, break_weights, die, interrupt

# Six steps an epoch.
CONFIG = TrainConfig(
    steps=14,
    batch_size=8,
    learning_rate=1e-2,
    dtype="float32",
    progress=False,
    checkpoint_every=4,
    eval_every=5,
)

Tune = Callable[..., TrainResult]


@pytest.fixture
def plan(tiny_model_dir: Path) -> Plan:
    return dataclasses.replace(
        uniform_plan(load_model(tiny_model_dir)[0], rank=3, layers=[2, 3]), dropout=0.2
    )


@pytest.fixture
def tune(tiny_model_dir: Path, train_file: Path, eval_file: Path, plan: Plan) -> Tune:
    """fine_tune on a fresh copy of the tiny model."""

    def run(out: Path, config: TrainConfig = CONFIG, plan: Plan = plan, **options: Any) -> TrainResult:
        model, tokenizer = load_model(tiny_model_dir, config.dtype)
        examples, held_out = load_examples(train_file, tokenizer), load_examples(eval_file, tokenizer)
        return fine_tune(model, tokenizer, examples, held_out, plan, config, out, **options)

    return run


def bits(out: Path) -> bytes:
    return (out / "adapter_model.safetensors").read_bytes()


def measured(result: TrainResult) -> list[Any]:
    """Everything in the history and the evaluations but times."""
    timeless = {"seconds": 0.0, "step_seconds": 0.0, "forward_seconds": 0.0, "backward_seconds": 0.0}
    history = [dataclasses.replace(record, **timeless) for record in result.history]
    return [*history, *(dataclasses.replace(record, seconds=0.0) for record in result.evals)]


@pytest.mark.parametrize(
    ("settings", "killed"),
    [
        ({}, 11),  # goes on within the second epoch
        ({"checkpoint_every": 6}, 8),  # goes on where an epoch begins
        ({"batch_size": 3, "gradient_accumulation": 3, "group_by_length": True, "schedule": "cosine"}, 10),
        ({"init": "gradient", "lora_plus": 4.0, "sampled_depth": {2: 1.0, 3: 2.0}, "kernels": False}, 13),
        ({"shrink_after": 30.0, "shrink_to": 25.0}, 13),  # goes on after the lower adapters were frozen
    ],
    ids=["second-epoch", "epoch-boundary", "grouped", "sampled-depth", "shrunk"],
)
def test_goes_on_to_the_same_adapter_and_metrics(tune, tmp_path, settings, killed):
    config = dataclasses.replace(CONFIG, **settings)
    whole = tune(tmp_path / "whole", dataclasses.replace(config, checkpoint_every=None))
    with pytest.raises(Killed):
        tune(tmp_path / "out", config, callbacks=[AtStep(killed, die)])
    found = Checkpoint.read(beside(tmp_path / "out"))
    assert found.step == (killed - 1) // config.checkpoint_every * config.checkpoint_every
    seen: list[int] = []
    went_on = tune(tmp_path / "out", config, resume=True, callbacks=[AtStep(found.step + 1, seen.append)])
    assert len(seen) == 1
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")
    assert measured(went_on) == measured(whole)
    assert went_on.history[-1].seconds > went_on.history[found.step - 1].seconds > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_goes_on_with_a_prefix_cache_and_other_free_settings(tune, tmp_path, plan):
    bare = dataclasses.replace(plan, dropout=0.0)
    config = dataclasses.replace(CONFIG, prefix_cache=str(tmp_path / "cache"))
    tune(tmp_path / "whole", dataclasses.replace(config, prefix_cache=str(tmp_path / "other")), bare)
    with pytest.raises(Killed):
        tune(tmp_path / "out", config, bare, callbacks=[AtStep(7, die)])
    tune(tmp_path / "out", dataclasses.replace(config, checkpoint_every=3), bare, resume=True)
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")


def test_resume_without_a_checkpoint_begins_and_says_so(tune, tmp_path, capsys):
    tune(tmp_path / "whole", dataclasses.replace(CONFIG, checkpoint_every=None))
    tune(tmp_path / "out", dataclasses.replace(CONFIG, progress=True), resume=True)
    assert "training begins at step 1" in capsys.readouterr().err.splitlines()[0]
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")


def test_an_interrupt_says_what_is_kept_and_resume_replaces_it(tune, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt) as caught:
        tune(out, callbacks=[AtStep(7, interrupt)])
    said = str(caught.value)
    assert said.startswith(f"interrupted after step 6; the adapter so far is in {out}; ")
    assert said.endswith(f"with --resume goes on after step 4, from {beside(out)}")
    with pytest.raises(UserError, match="pass --resume to go on from it or --overwrite to begin anew"):
        tune(out)
    tune(out, resume=True)
    tune(tmp_path / "whole", dataclasses.replace(CONFIG, checkpoint_every=None))
    assert bits(out) == bits(tmp_path / "whole")
    assert json.loads((out / "metrics.json").read_text())["stopped"] is None
    with pytest.raises(UserError, match="exists and is not empty"):
        tune(out, resume=True)


def test_overwrite_begins_anew(tune, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Killed):
        tune(out, callbacks=[AtStep(7, die)])
    seen: list[int] = []
    config = dataclasses.replace(CONFIG, learning_rate=1e-3, checkpoint_every=None)
    tune(out, config, overwrite=True, callbacks=[AtStep(1, seen.append)])
    assert len(seen) == 1
    assert not beside(out).exists()


def test_not_finite_leaves_the_checkpoint_and_the_last_good_adapter(tune, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(
        NonFiniteLoss, match=r"step 5; .* after 3 good updates is in .* after step 4, from"
    ) as caught:
        tune(out, callbacks=[AtStep(5, break_weights)])
    assert "\n" not in str(caught.value)
    kept = bits(out)
    # Met again at once, by a training that knows the last good weights from the checkpoint alone.
    with pytest.raises(NonFiniteLoss, match="after 3 good updates"):
        tune(out, resume=True, callbacks=[AtStep(5, break_weights)])
    assert bits(out) == kept
    tune(out, resume=True)
    tune(tmp_path / "whole", dataclasses.replace(CONFIG, checkpoint_every=None))
    assert bits(out) == bits(tmp_path / "whole")


def test_a_broken_adapter_replaces_no_checkpoint(tune, tmp_path):
    class BreakBeforeWriting(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 8:
                break_weights(model)

    with pytest.raises(NonFiniteLoss, match="the adapter became nan at step 8"):
        tune(tmp_path / "out", callbacks=[BreakBeforeWriting()])
    assert Checkpoint.read(beside(tmp_path / "out")).step == 4


def test_no_space_left_keeps_the_earlier_checkpoint(tune, tmp_path, monkeypatch):
    out = tmp_path / "out"
    earlier: list[bytes] = []

    def full(file: int, content: bytes) -> None:
        os.write(file, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill(_: Any) -> None:
        earlier.append(beside(out).read_bytes())
        monkeypatch.setattr(files, "_write", full)

    with pytest.raises(UserError, match=r"no space left to write .*; what was there is kept") as caught:
        tune(out, callbacks=[AtStep(6, fill)])
    assert "\n" not in str(caught.value)
    assert [beside(out).read_bytes()] == earlier
    assert [path.name for path in tmp_path.iterdir()] == [beside(out).name]
    monkeypatch.undo()
    tune(out, resume=True)


@pytest.fixture
def place(tune, tmp_path) -> Path:
    with pytest.raises(Killed):
        tune(tmp_path / "out", callbacks=[AtStep(6, die)])
    return beside(tmp_path / "out")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("a file of mine\n" * 9)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def adapter(path: Path) -> None:
    safetensors.torch.save_file({"lora_A": torch.zeros(2)}, path)


def newer(path: Path) -> None:
    safetensors.torch.save_file(load_file(path), path, {"format": "aletheia-checkpoint", "version": "9"})


@pytest.mark.parametrize("harm", [cut, alter, empty, text, directory, adapter, newer])
def test_what_is_no_checkpoint_is_refused_by_name(tune, tmp_path, place, harm):
    harm(place)
    before = None if place.is_dir() else place.read_bytes()
    with pytest.raises(UserError) as caught:
        tune(tmp_path / "out", resume=True)
    assert str(place) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert before == (None if place.is_dir() else place.read_bytes())
    assert not (tmp_path / "out").exists()


def test_another_training_is_refused(tune, tmp_path, place, plan, tiny_model_dir, train_file):
    out = tmp_path / "out"
    other = dataclasses.replace(CONFIG, learning_rate=2e-2)
    with pytest.raises(UserError, match=r"learning_rate is 0\.01 there and 0\.02 here"):
        tune(out, other, resume=True)
    with pytest.raises(UserError, match="not of the same plan"):
        tune(out, plan=dataclasses.replace(plan, dropout=0.0), resume=True)
    model, tokenizer = load_model(tiny_model_dir, "float32")
    fewer = load_examples(train_file, tokenizer)[1:]
    with pytest.raises(UserError, match="not of the same training examples"):
        fine_tune(model, tokenizer, fewer, None, plan, CONFIG, out, resume=True)
    assert Checkpoint.read(place).step == 4


def test_the_same_plan_made_again_is_the_same_training(tune, tmp_path, place, plan):
    tune(tmp_path / "whole", dataclasses.replace(CONFIG, checkpoint_every=None))
    tune(tmp_path / "out", plan=dataclasses.replace(plan, meta={"probe": {"seconds": 9.0}}), resume=True)
    assert bits(tmp_path / "out") == bits(tmp_path / "whole")


def test_several_processes_are_refused(tune, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="checkpoints are of one process"):
        tune(tmp_path / "out")


def test_the_command_is_terminated_and_goes_on(tmp_path, tiny_model_dir, train_file, eval_file, plan):
    (tmp_path / "plan.json").write_text(plan.to_json())
    arguments = ["train"]
    for name, value in {
        "model": tiny_model_dir,
        "train": train_file,
        "eval": eval_file,
        "plan": tmp_path / "plan.json",
        "out": tmp_path / "out",
        "dtype": "float32",
        "threads": 1,
        "steps": 60,
        "checkpoint-every": 1,
    }.items():
        arguments += [f"--{name}", str(value)]
    process = subprocess.Popen(
        [sys.executable, "-m", "aletheia_tune", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 12/"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read().splitlines()
    assert process.wait() == 128 + signal.SIGTERM
    assert rest[-1].startswith("aletheia: interrupted after step ")
    assert "the same command with --resume goes on after step " in rest[-1]
    assert "Traceback" not in "\n".join(rest)
    done = CliRunner().invoke(app, [*arguments, "--resume"])
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith("training goes on after step ")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [record["step"] for record in metrics["history"]] == list(range(1, 61))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.json"]
