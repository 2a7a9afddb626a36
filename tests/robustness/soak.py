"""Trains for thousands of steps and looks for what grows: memory, threads, file handles, objects.

    python -m tests.robustness.soak --steps 2000 --json runs/soak.json

The model is task R1's (`benchmarks/step.py`) made small: a Llama of four layers, the upper half adapted. Every step
has another length. The slope of the resident memory over the steps is fitted by least squares, the first
quarter left out; then a model is put on the operators and taken off them 500 times; at last two trainings run at once,
in two threads of this process, and come to the adapters that each comes to alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import math
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import psutil
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from aletheia_kernels import tune_allocator
from aletheia_tune.data import Example
from aletheia_tune.environment import machine_facts, versions
from aletheia_tune.kernels import use_kernels
from aletheia_tune.metrics import TrainResult
from aletheia_tune.plan import Plan, uniform_plan
from aletheia_tune.train import fine_tune
from aletheia_tune.training_config import TrainConfig
from tests.at_step import AtStep
from tests.robustness.fuzz import tokenizer

LENGTHS = range(16, 129)
BATCH = 2
PAIRED_STEPS = 100
# Memory may grow by so many MB in 1,000 steps; what is below is noise of the allocator.
MOST_SLOPE = 1.0
CONFIG = TrainConfig(
    batch_size=BATCH, learning_rate=1e-3, dtype="float32", threads=1, progress=False, schedule="constant"
)


def small_model() -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=LENGTHS.stop,
            )
        )


def small_plan() -> Plan:
    return uniform_plan(small_model(), rank=4, layers=[2, 3])


def texts(count: int, seed: int) -> list[Example]:
    """Counting sequences from random numbers on, each of a length of its own, the second half to be learned."""
    draw = random.Random(seed)
    made: list[Example] = []
    for _ in range(count):
        start, length = draw.randrange(8, 256), draw.choice(LENGTHS)
        ids = [8 + (start + position) % 248 for position in range(length)]
        made.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return made


class Meter(TrainerCallback):
    """Resident memory in MB, threads and file handles of this process, every so many steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.process = psutil.Process()
        self.readings: list[tuple[int, float, int, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.read(state.global_step)

    def read(self, at: int) -> None:
        resident = self.process.memory_info().rss / 1e6
        self.readings.append((at, resident, self.process.num_threads(), self.process.num_fds()))

    def growth(self) -> dict[str, float]:
        """Of the last three quarters: MB in 1,000 steps by least squares, and the most threads and handles more."""
        warm = self.readings[len(self.readings) // 4 :]
        steps, resident, threads, handles = (np.array(column) for column in zip(*warm, strict=True))
        return {
            "mb_per_1000": float(np.polyfit(steps / 1000, resident, 1)[0]),
            "resident_mb": float(resident[-1]),
            "threads_more": int(threads.max() - threads[0]),
            "handles_more": int(handles.max() - handles[0]),
        }


def train(out: Path, config: TrainConfig, seed: int, callback: TrainerCallback | None = None) -> TrainResult:
    assert config.steps is not None
    # In one epoch, so that the order of the examples is drawn once.
    examples = texts(BATCH * config.steps, seed)
    callbacks = [] if callback is None else [callback]
    return fine_tune(small_model(), tokenizer(), examples, None, small_plan(), config, out, callbacks)


def long_training(steps: int, out: Path) -> dict[str, Any]:
    meter = Meter(max(1, steps // 100))
    config = dataclasses.replace(CONFIG, steps=steps, checkpoint_every=max(1, steps // 10))
    result = train(out, config, 0, meter)
    tokens = [record.tokens for record in result.history]
    changed = sum(a != b for a, b in itertools.pairwise(tokens)) / (len(tokens) - 1)
    tenth = max(1, steps // 10)
    return {
        "steps": len(result.history),
        "steps_of_another_size_than_the_last": round(changed, 3),
        "loss_of_the_first_tenth": float(np.mean([record.loss for record in result.history[:tenth]])),
        "loss_of_the_last_tenth": float(np.mean([record.loss for record in result.history[-tenth:]])),
        **meter.growth(),
    }


def patched_and_restored(cycles: int) -> dict[str, Any]:
    """A model on the operators, one pass, off again; objects and memory from a fifth of the cycles on."""
    plan = small_plan()
    base = small_model()
    model = get_peft_model(base, plan.to_lora_config(base))
    ids = torch.arange(8, 40)[None]
    meter = Meter(1)

    def cycle() -> None:
        with use_kernels(model, example_inputs={"input_ids": ids}):
            model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    objects = 0
    for number in range(cycles):
        cycle()
        if number == cycles // 5:
            gc.collect()
            objects = len(gc.get_objects())
        meter.read(number)
    gc.collect()
    return {"cycles": cycles, "objects_more": len(gc.get_objects()) - objects, **meter.growth()}


def two_at_once(steps: int, directory: Path) -> dict[str, Any]:
    """Two trainings in threads and each alone; the second begins once the first has drawn its adapters' weights."""
    configs = [dataclasses.replace(CONFIG, steps=steps, seed=seed) for seed in (0, 1)]
    errors: list[BaseException] = []
    begun = threading.Event()

    def run(name: str, seed: int, callback: TrainerCallback | None = None) -> None:
        try:
            train(directory / name, configs[seed], seed, callback)
        except BaseException as error:
            errors.append(error)
            begun.set()

    first = threading.Thread(target=run, args=("first", 0, AtStep(1, lambda _: begun.set())))
    second = threading.Thread(target=run, args=("second", 1))
    first.start()
    begun.wait()
    second.start()
    overlapped = first.is_alive()
    first.join()
    second.join()
    if errors:
        raise errors[0]
    for name, seed in (("first-alone", 0), ("second-alone", 1)):
        train(directory / name, configs[seed], seed)
    same = [
        (directory / name / "adapter_model.safetensors").read_bytes()
        == (directory / f"{name}-alone" / "adapter_model.safetensors").read_bytes()
        for name in ("first", "second")
    ]
    return {"steps_each": steps, "ran_at_once": overlapped, "adapters_as_alone": sum(same)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tune_allocator()  # as the command line does
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "training": lambda: long_training(options.steps, directory / "long"),
            "patching": lambda: patched_and_restored(options.cycles),
            "two at once": lambda: two_at_once(min(PAIRED_STEPS, options.steps), directory),
        }
        found = {part: run() for part, run in parts.items()}
    training, patching, two = found.values()
    lost = []
    for part in (training, patching):
        # A short run is all warm-up: its slope says nothing.
        if part.get("steps", part.get("cycles")) >= 500 and part["mb_per_1000"] > MOST_SLOPE:
            lost.append(f"memory grows by {part['mb_per_1000']:.2f} MB in 1,000")
        lost += [f"{part[key]} {key}" for key in ("threads_more", "handles_more") if part[key] > 0]
    if patching["objects_more"] > patching["cycles"] // 10:
        lost.append(f"{patching['objects_more']} objects more after {patching['cycles']} cycles")
    if not training["loss_of_the_last_tenth"] < training["loss_of_the_first_tenth"] < math.inf:
        lost.append("the loss did not fall")
    if not two["ran_at_once"] or two["adapters_as_alone"] != 2:
        lost.append("two trainings at once are not those of each alone")
    print(
        f"{training['steps']} steps, {training['steps_of_another_size_than_the_last']:.0%} of another size than the "
        f"last: {training['mb_per_1000']:+.3f} MB per 1,000 steps, {training['threads_more']} threads and "
        f"{training['handles_more']} file handles more; loss {training['loss_of_the_first_tenth']:.3f} -> "
        f"{training['loss_of_the_last_tenth']:.3f}"
    )
    print(
        f"{patching['cycles']} times patched and restored: {patching['mb_per_1000']:+.3f} MB per 1,000, "
        f"{patching['objects_more']} objects, {patching['handles_more']} file handles more"
    )
    print(f"two trainings at once: {two['adapters_as_alone']} of 2 adapters as alone")
    for one in lost:
        print(f"lost: {one}", file=sys.stderr)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            **found,
            "lost": lost,
            "seconds": round(time.perf_counter() - started, 1),
            "machine": {**dict(machine_facts()), **versions()},
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
