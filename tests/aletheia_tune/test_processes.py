"""Several processes train the adapter that one process trains on the same examples of every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


def run(launcher: list[str], *arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("processes", [2])
def test_the_adapter_of_one_process(processes, tiny_model_dir, train_file, eval_file, tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    given = (tiny_model_dir, train_file, eval_file)
    run([str(script)], *given, tmp_path / "one", 4)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script)]
    run(launcher, *given, tmp_path / "several", 4 // processes)

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
