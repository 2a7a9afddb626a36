"""Seconds of a DoRA step on task R1 (see `step.py`): PEFT's, and the same adapters on these operators, in turns.

No speed is printed when their losses disagree or are not finite.

python benchmarks/dora.py runs/demo-cache/SmolLM2-135M-Instruct --adapters frozen --json dora.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from step import RANK, RATE, batches
from torch import Tensor
from transformers import AutoModelForCausalLM

import aletheia_kernels
from aletheia_tune.environment import machine_facts, versions
from aletheia_tune.kernels import use_kernels

# In nats: half as much again as what PEFT's adapters in bfloat16 are off ours, which are in float32.
LOSS_TOLERANCE = 0.016
Step = Callable[[dict[str, Tensor]], tuple[float, float]]


def arm(model_dir: str, adapters: str) -> tuple[Any, Step]:
    """A model with DoRA on every linear, and a step of it, which gives its seconds and its loss."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).train()
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config, autocast_adapter_dtype=adapters == "float32")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)

    def step(batch: dict[str, Tensor]) -> tuple[float, float]:
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start, loss.item()

    return model, step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument(
        "--adapters", choices=("float32", "frozen"), default="frozen", help="PEFT's dtype for them"
    )
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    aletheia_kernels.tune_allocator()
    torch.set_num_threads(options.threads)
    data = batches(options.model, options.steps + 1)
    _, theirs = arm(options.model, options.adapters)
    model, ours = arm(options.model, "float32")
    seconds: dict[str, list[float]] = {"peft": [], "ours": []}
    losses: dict[str, list[float]] = {"peft": [], "ours": []}
    with use_kernels(model, strict=True):
        for batch in data:
            for name, step in (("peft", theirs), ("ours", ours)):
                took, loss = step(batch)
                seconds[name].append(took)
                losses[name].append(loss)
    apart = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    if not apart < LOSS_TOLERANCE or not all(0 < loss < math.inf for loss in losses["ours"]):
        raise SystemExit(f"losses are up to {apart:.4f} apart: no speed is printed")
    # The first step of each warms up.
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    for name, value in median.items():
        print(f"{name}: {value:.3f} s a step ({min(seconds[name][1:]):.3f} to {max(seconds[name][1:]):.3f})")
    print(f"PEFT over ours {median['peft'] / median['ours']:.2f}; losses at most {apart:.4f} apart")
    if options.json:
        result = {
            "machine": dict(machine_facts()), "versions": versions(), "adapters": options.adapters,
            "median_seconds": median, "seconds": seconds, "losses": losses,
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
