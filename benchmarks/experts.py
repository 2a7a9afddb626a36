"""Seconds and memory of a LoRA step on one Mixtral-shaped layer: PEFT's `target_parameters`, and the same adapters on
these operators, in turns.

A random Mixtral of one layer and a small vocabulary in bfloat16: every token goes to 2 experts of width 3.5 x hidden,
adapters of rank 16, float32 unless --adapters says otherwise, on both projections of all experts and on the attention's
four, AdamW. Both arms share the frozen weights. No speed is printed when the losses of a step or the gradients of the
experts' factors in the first disagree, or one is zero or not finite. Peak memory is that of a process of its own.

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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from agreement import assert_agree
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

import aletheia_kernels
from aletheia_tune.environment import machine_facts, peak_memory_mb, versions
from aletheia_tune.kernels import use_kernels

ARMS = ("peft", "ours")
VOCABULARY, LENGTH, RANK, RATE = 1024, 256, 16, 2e-4
# Of one bfloat16 loss computed in two ways, relative.
LOSS_TOLERANCE = 3e-3


def frozen_model(hidden: int, experts: int) -> Any:
    """One random layer in bfloat16."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=1,
        num_attention_heads=hidden // 128,
        num_key_value_heads=hidden // 512,
        num_local_experts=experts,
        num_experts_per_tok=2,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        return MixtralForCausalLM(config).train()
    finally:
        torch.set_default_dtype(torch.float32)


class Arm:
    """The model with adapters, on the operators or not, and its optimizer."""

    def __init__(self, frozen: Any, name: str, adapters: str, stack: ExitStack) -> None:
        # The copy holds the same parameters.
        model = copy.deepcopy(frozen, {id(parameter): parameter for parameter in frozen.parameters()})
        config = LoraConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            init_lora_weights=False,  # of a B that is zero A has no gradient to compare
        )
        torch.manual_seed(1)
        self.model = get_peft_model(model, config, autocast_adapter_dtype=adapters == "float32")
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for name_of, parameter in self.trained.items():
                if "lora_B" in name_of:
                    parameter.mul_(0.1)  # as small beside W as after some training
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=RATE, weight_decay=0.0, fused=True)
        if name == "ours":
            stack.enter_context(use_kernels(self.model, strict=True))

    def step(self, ids: Tensor) -> tuple[float, float]:
        """Its seconds and its loss."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        return time.perf_counter() - start, loss.item()

    def gradients(self) -> list[Tensor]:
        """Of the experts' factors."""
        return [p.grad for name, p in self.trained.items() if "experts" in name and p.grad is not None]


def batches(tokens: int, count: int) -> Tensor:
    """[count, sequences, length]"""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCABULARY, (count, tokens // LENGTH, LENGTH), generator=generator)


def timed(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds and losses of each step, the first of which warms up."""
    frozen = frozen_model(options.hidden, options.experts)
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with ExitStack() as stack:
        arms = {name: Arm(frozen, name, options.adapters, stack) for name in ARMS}
        for index, ids in enumerate(batches(options.tokens, options.steps + 1)):
            for name, arm in arms.items():
                took, loss = arm.step(ids)
                seconds[name].append(took)
                losses[name].append(loss)
            if index == 0:
                assert_agree(arms["ours"].gradients(), arms["peft"].gradients())
    return seconds, losses


def peak(options: argparse.Namespace) -> float:
    """Peak memory in MiB of two steps of one arm in this process."""
    with ExitStack() as stack:
        arm = Arm(frozen_model(options.hidden, options.experts), options.peak, options.adapters, stack)
        for ids in batches(options.tokens, 2):
            arm.step(ids)
    return peak_memory_mb()


def peak_of(arm: str, options: argparse.Namespace) -> float:
    """The same, in another process."""
    command = [sys.executable, __file__, "--peak", arm, "--threads", str(options.threads)]
    for name in ("experts", "hidden", "tokens", "adapters"):
        command += [f"--{name}", str(getattr(options, name))]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 512")
    parser.add_argument("--tokens", type=int, default=1024, help=f"a multiple of {LENGTH}")
    parser.add_argument(
        "--adapters",
        choices=("float32", "frozen"),
        default="float32",
        help="their dtype, as PEFT keeps them or the weights'",
    )
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=ARMS, help="only print one arm's peak memory in MiB")
    options = parser.parse_args()
    if options.hidden % 512 or options.tokens % LENGTH:
        parser.error(f"--hidden must be a multiple of 512 and --tokens one of {LENGTH}")
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
    print(f"PEFT over ours {ratio:.2f}; losses at most {apart:.1e} apart, {losses['ours'][0]:.3f} at first")
    if options.json:
        result = {
            "machine": dict(machine_facts()), "versions": versions(), "experts": options.experts,
            "hidden": options.hidden, "tokens": options.tokens, "adapters": options.adapters, "ratio": ratio,
            "median_seconds": median, "peak_mib": memory, "seconds": seconds, "losses": losses,
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
