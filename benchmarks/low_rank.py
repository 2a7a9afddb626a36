"""What adapters add to a layer's projections over the same operators without any, beside what their products take.

    python benchmarks/low_rank.py runs/demo-cache/SmolLM2-135M-Instruct --rank 16

The least is the adapters' FLOPs at the rate that the library reaches on the base products, timed in the same run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LowRank:
    """Seconds of forward and backward over every layer: the adapters' share, and the least it could be."""

    seconds: float
    floor_seconds: float


def medians(runs: dict[str, Callable[[], Any]], rounds: int = 15) -> dict[str, float]:
    """Median seconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if index >= 2:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def projections(shapes: list[tuple[int, int]], tokens: int, rank: int, mlp: bool) -> Callable[[], None]:
    """Forward and backward of one group of projections [out, in], or of a gated MLP, with adapters of one rank."""
    import torch

    from aletheia_kernels import lora_gated_mlp, lora_group

    x = torch.randn(tokens, shapes[0][1]).bfloat16().requires_grad_()
    weights = [torch.randn(shape).bfloat16() for shape in shapes]
    lora_As = [torch.randn(rank, inner).requires_grad_() for _, inner in shapes]
    lora_Bs = [torch.randn(outer, rank).requires_grad_() for outer, _ in shapes]
    rest: Any = ([None] * len(shapes), lora_As, lora_Bs, [1.0] * len(shapes))

    def outputs() -> list[torch.Tensor]:
        return [lora_gated_mlp(x, weights, *rest)] if mlp else lora_group(x, weights, *rest)

    gradients = [torch.randn_like(y) for y in outputs()]
    return lambda: torch.autograd.backward(outputs(), gradients)


def base_products(shapes: list[tuple[int, int]], tokens: int) -> Callable[[], None]:
    """The same projections' base products, forward and for the input, by the library."""
    import torch

    operands = [
        (
            torch.randn(tokens, inner).bfloat16(),
            torch.randn(outer, inner).bfloat16(),
            torch.randn(tokens, outer).bfloat16(),
        )
        for outer, inner in shapes
    ]

    def run() -> None:
        for x, weight, dy in operands:
            torch.nn.functional.linear(x, weight)
            _ = dy @ weight

    return run


def low_rank(model_dir: str, threads: int, tokens: int, rank: int) -> LowRank:
    """Measured on one layer of the model, times its number of layers."""
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(threads)
    config = AutoConfig.from_pretrained(model_dir)
    hidden, ffn = config.hidden_size, config.intermediate_size
    kv = hidden // config.num_attention_heads * config.num_key_value_heads
    groups = {
        "q, k, v": [(hidden, hidden), (kv, hidden), (kv, hidden)],
        "o": [(hidden, hidden)],
        "mlp": [(ffn, hidden), (ffn, hidden), (hidden, ffn)],
    }
    extra = floor = 0.0
    for name, shapes in groups.items():
        times = medians(
            {
                "adapted": projections(shapes, tokens, rank, name == "mlp"),
                "bare": projections(shapes, tokens, 0, name == "mlp"),
                "base": base_products(shapes, tokens),
            }
        )
        extra += times["adapted"] - times["bare"]
        # A token: two base products, and six low-rank ones, three over the input features and three over the output.
        base = sum(2 * 2 * inner * outer for outer, inner in shapes)
        adapters = sum(3 * 2 * rank * (inner + outer) for outer, inner in shapes)
        floor += times["base"] * adapters / base
    return LowRank(config.num_hidden_layers * extra, config.num_hidden_layers * floor)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()

    import aletheia_kernels

    aletheia_kernels.tune_allocator()
    given = low_rank(options.model_dir, options.threads, options.tokens, options.rank)
    print(
        f"rank {options.rank}, {options.tokens} tokens: adapters add {given.seconds:.3f} s to all layers, "
        f"{given.seconds / given.floor_seconds:.2f} times the least ({given.floor_seconds:.3f} s)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
