"""Seconds of a training step with the prefix computed, computed and kept, and read; and how near the adapters stay.

Task R1 with the upper half adapted (see `step.py`): SmolLM2-135M, 4 sequences of 512 tokens, half of them labelled,
LoRA r=16. For the times, every batch is trained on three times in turn: by a model without a cache, by one that meets
it for the first time, and by the latter again. For the comparison, two models see the same examples for two epochs,
differently shuffled, one of them with the cache.

    python benchmarks/prefix_cache.py runs/demo-cache/SmolLM2-135M-Instruct --steps 9 --json prefix_cache.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from step import BATCH, RANK, RATE, batches
from torch import Tensor
from transformers import AutoModelForCausalLM

import aletheia_kernels
from aletheia_tune.environment import versions
from aletheia_tune.kernels import use_kernels
from aletheia_tune.plan import uniform_plan
from aletheia_tune.prefix import cut_prefix
from aletheia_tune.prefix_cache import PrefixCache, cache_prefix

Step = Callable[[dict[str, Tensor]], float]


def trainer(
    model_dir: str, dtype: torch.dtype, stack: ExitStack, directory: str | None
) -> tuple[Step, list[Tensor], PrefixCache | None]:
    """A step of the upper half's adapters, which gives its seconds; the adapters; the cache if a directory is given."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).train()
    layers = model.config.num_hidden_layers
    plan = uniform_plan(model, rank=RANK, layers=range(layers // 2, layers))
    torch.manual_seed(0)
    model = get_peft_model(model, plan.to_lora_config(model))
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cut = cut_prefix(model)
    stack.enter_context(use_kernels(model, strict=True))
    cache = None if directory is None else stack.enter_context(cache_prefix(model, cut, directory))
    optimizer = torch.optim.AdamW(adapters, lr=RATE, weight_decay=0.0, fused=True)

    def step(batch: dict[str, Tensor]) -> float:
        start = time.perf_counter()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(adapters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - start

    return step, adapters, cache


def times(model_dir: str, steps: int) -> dict[str, Any]:
    data = batches(model_dir, steps + 1)
    seconds: dict[str, list[float]] = {"uncached": [], "building": [], "cached": []}
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        plain, _, _ = trainer(model_dir, torch.bfloat16, stack, None)
        kept, _, cache = trainer(model_dir, torch.bfloat16, stack, directory)
        for batch in data:
            for arm, step in (("uncached", plain), ("building", kept), ("cached", kept)):
                seconds[arm].append(step(batch))
        assert cache is not None
        assert (cache.hits, cache.stored, cache.recomputed) == (BATCH * len(data), BATCH * len(data), 0)
        size = sum(path.stat().st_size for path in Path(directory).glob("*/data"))
    # The first step of each warms up.
    median = {arm: statistics.median(values[1:]) for arm, values in seconds.items()}
    return {
        "seconds": seconds,
        "median_seconds": median,
        "building_over_cached": median["building"] / median["cached"],
        "uncached_over_cached": median["uncached"] / median["cached"],
        "bytes_per_example": size / (BATCH * len(data)),
    }


def agreement(model_dir: str, dtype: torch.dtype, count: int) -> dict[str, Any]:
    """How far the adapters are apart after two epochs, with the cache and without."""
    data = batches(model_dir, count)
    rows = {name: torch.cat([batch[name] for batch in data]) for name in data[0]}
    shuffled = [
        torch.randperm(count * BATCH, generator=torch.Generator().manual_seed(epoch)).view(count, BATCH)
        for epoch in range(2)
    ]
    final = []
    for cached in (False, True):
        with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
            step, adapters, cache = trainer(model_dir, dtype, stack, directory if cached else None)
            for order in torch.cat(shuffled):
                step({name: values[order] for name, values in rows.items()})
            final.append(torch.cat([adapter.detach().flatten() for adapter in adapters]))
            if cache is not None:
                assert (cache.hits, cache.stored) == (count * BATCH, count * BATCH)
    apart = (final[0] - final[1]).norm() / final[0].norm()
    return {"bit_equal": torch.equal(*final), "relative_distance": apart.item(), "steps": 2 * count}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=9, help="timed steps of each kind")
    parser.add_argument(
        "--batches", type=int, default=2, help="batches an epoch of the comparison; 0 leaves it out"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    aletheia_kernels.tune_allocator()
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "machine": {"processor": platform.processor() or platform.machine(), "threads": options.threads},
        "versions": versions(),
        **times(options.model, options.steps),
    }
    for arm, seconds in result["median_seconds"].items():
        print(f"{arm:10} {seconds:.3f} s a step")
    print(
        f"building / cached {result['building_over_cached']:.2f}, uncached / cached "
        f"{result['uncached_over_cached']:.2f}, {result['bytes_per_example'] / 2**20:.2f} MiB an example"
    )
    if options.batches:
        for name in ("float32", "bfloat16"):
            result[name] = agreement(options.model, getattr(torch, name), options.batches)
            print(
                f"{name}: adapters after {result[name]['steps']} steps "
                + (
                    "bit-equal"
                    if result[name]["bit_equal"]
                    else f"{result[name]['relative_distance']:.1e} apart"
                )
            )
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
