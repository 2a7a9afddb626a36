"""Seconds and memory of a LoRA step on one Mixtral-shaped mixture: PEFT's `target_parameters`, and the same adapters on
these operators, in turns.

Router and experts of Mixtral with random weights; every token goes to 2 experts of width 3.5 x hidden. Adapters of rank
16 on both projections of every expert, float32 as PEFT keeps them. A step is forward, the mean squared distance from a
random target, backward to the adapters and to the input, as for adapters below, clipping and AdamW. Both arms share the
frozen weights. No speed is printed when the losses of a step or the gradients of the first disagree, or a gradient is
zero or not finite. Peak memory is that of a process of its own for each arm.

    python benchmarks/experts.py --experts 8 --hidden 4096 --json experts-8.json
    python benchmarks/experts.py --experts 64 --hidden 1024 --json experts-64.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from agreement import assert_agree
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

import aletheia_kernels
from aletheia_tune.environment import machine_facts, peak_memory_mb, versions
from aletheia_tune.patch import apply_kernels

ARMS = ("peft", "ours")
RANK, RATE = 16, 1e-3
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Of one bfloat16 loss computed in two ways, relative.
LOSS_TOLERANCE = 3e-3


def frozen_mixture(options: argparse.Namespace) -> nn.Module:
    """A mixture as the first part of a module: PEFT wraps no parameter of the module that it is given."""
    config = MixtralConfig(
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_local_experts=options.experts,
        num_experts_per_tok=2,
        experts_implementation="grouped_mm",  # what a model takes by default
    )
    with torch.device("meta"):
        module = nn.Sequential(MixtralSparseMoeBlock(config)).to(DTYPES[options.dtype])
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module.train()


class Arm:
    """A mixture with adapters, on the operators or not, and its optimizer."""

    def __init__(self, frozen: nn.Module, name: str) -> None:
        # The copy holds the same parameters.
        module: Any = copy.deepcopy(frozen, {id(parameter): parameter for parameter in frozen.parameters()})
        config = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            init_lora_weights=False,  # where B is zero A has no gradient to compare
        )
        torch.manual_seed(1)
        self.model = get_peft_model(module, config)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0, fused=True)
        if name == "ours":
            apply_kernels(self.model, strict=True)

    def step(self, x: Tensor, target: Tensor) -> tuple[float, float]:
        """Its seconds and its loss."""
        x = x.clone().requires_grad_()
        self.optimizer.zero_grad()
        start = time.perf_counter()
        loss = (self.model(x).float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return time.perf_counter() - start, loss.item()

    def gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.trained if parameter.grad is not None]


def batches(options: argparse.Namespace, count: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs [1, tokens, hidden] and targets of the size that outputs have."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, options.tokens, options.hidden)
    inputs = [torch.randn(shape, generator=generator) for _ in range(count)]
    return [(x.to(DTYPES[options.dtype]), 0.3 * torch.randn(shape, generator=generator)) for x in inputs]


def timed(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and losses of each step, the first of which warms up."""
    frozen = frozen_mixture(options)
    arms = {name: Arm(frozen, name) for name in ARMS}
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    losses: dict[str, list[float]] = {name: [] for name in ARMS}
    for index, batch in enumerate(batches(options, options.steps + 1)):
        for name, arm in arms.items():
            took, loss = arm.step(*batch)
            seconds[name].append(took)
            losses[name].append(loss)
        if index == 0:
            given, expected = (arms[name].gradients() for name in ("ours", "peft"))
            assert len(given) == len(expected) == 4
            assert_agree(given, expected)
    return seconds, losses


def peak(options: argparse.Namespace) -> float:
    """Peak memory in MiB of two steps of one arm in this process."""
    arm = Arm(frozen_mixture(options), options.peak)
    for batch in batches(options, 2):
        arm.step(*batch)
    return peak_memory_mb()


def peak_of(arm: str, options: argparse.Namespace) -> float:
    """The same, in another process."""
    command = [sys.executable, __file__, "--peak", arm]
    for name in ("experts", "hidden", "tokens", "dtype", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(printed.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the frozen weights")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=ARMS, help="only print one arm's peak memory in MiB")
    options = parser.parse_args()
    aletheia_kernels.tune_allocator()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    if options.peak:
        print(peak(options))
        return
    memory = {arm: peak_of(arm, options) for arm in ARMS}
    seconds, losses = timed(options)
    apart = max(abs(ours / peft - 1) for ours, peft in zip(losses["ours"], losses["peft"], strict=True))
    if not apart < LOSS_TOLERANCE:
        raise SystemExit(f"losses disagree by {apart:.1e}: no speed is printed")
    median = {arm: statistics.median(values[1:]) for arm, values in seconds.items()}
    for arm in ARMS:
        spread = f"{min(seconds[arm][1:]):.3f} to {max(seconds[arm][1:]):.3f}"
        print(f"{arm}: {median[arm]:.3f} s a step ({spread}), peak {memory[arm]:,.0f} MiB")
    ratio = median["peft"] / median["ours"]
    first, last = losses["ours"][0], losses["ours"][-1]
    print(f"PEFT over ours {ratio:.2f}; losses {first:.4f} to {last:.4f}, at most {apart:.1e} apart")
    if options.json:
        result = {
            "machine": dict(machine_facts()), "versions": versions(), "experts": options.experts,
            "hidden": options.hidden, "tokens": options.tokens, "dtype": options.dtype, "ratio": ratio,
            "median_seconds": median, "peak_mib": memory, "seconds": seconds, "losses": losses,
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
