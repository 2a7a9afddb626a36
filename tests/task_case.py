"""The task file of a race of seconds: PEFT at rank 4 against Aletheia's upper half."""

from __future__ import annotations

from pathlib import Path


def task_text(name: str, model: str | Path, steps: int, keys: str = "") -> str:
    """It ends in the challenger's table; ``keys`` are lines of further top-level keys."""
    return f"""
name = "{name}"
model = "{model}"
train = "train.jsonl"
eval = "eval.jsonl"
rates = [2e-3, 1e-2, 1e-1]
seeds = [0]
slices = 3
{keys}

[training]
steps = {steps}
batch_size = 4
dtype = "float32"
threads = 1
warmup = 0
eval_every = 6
progress = false

[[baseline]]
name = "peft"
plan = {{ rank = 4 }}

[[challenger]]
name = "half"
plan = {{ score = "aletheia", layers = 50, rank = 4, probe_batches = 2 }}
"""
