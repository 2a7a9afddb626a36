"""Seconds of one LoRA training step, arm by arm in turn, beside the time of the matrix products alone.

Task R1: SmolLM2-135M, 4 sequences of 512 tokens of the Python standard library, the first half of each not labelled,
bf16 base weights, LoRA r=16 on all seven linears, fp32 master adapters, AdamW. Every arm is a process of its own with
the same allocator settings and threads; one computes at a time, a step each in turn. No ratio is printed when the
losses of like arms disagree or a gradient norm is zero or not finite.

    python benchmarks/step.py runs/demo-cache/SmolLM2-135M-Instruct --steps 7 --json step.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import sysconfig
import time
from collections import defaultdict
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from low_rank import low_rank
from rich.console import Console
from rich.table import Table

import aletheia_kernels
from aletheia_kernels import cpu
from aletheia_tune.environment import peak_memory_mb

BATCH, LENGTH, RANK, RATE = 4, 512, 16, 2e-4
UNIFORM = ("peft_fp32", "peft_bf16", "peft_compiled", "naive", "ours_uniform")
ARMS = (*UNIFORM, "ours_upper_half", "ours_aletheia")
FROZEN = "frozen"  # forward and input gradient, no adapter; head, norms and attention as in our arms
# The same training in float32 throughout, not timed: what the losses of the others are held to.
EXACT = "exact"
LOSS_TOLERANCE = 1e-3

# Where a profiled operation belongs, by the start of its name; the first that fits.
PARTS = (
    ("products, low-rank", ("aten::mm", "aten::addmm", "aten::linear", "mkldnn", "aten::mkldnn", "aletheia_cpu::lora")),
    ("head and loss", ("aletheia_cpu::linear_cross", "aten::_log_softmax", "aten::nll_loss")),
    ("norms and rope", ("aletheia_cpu::rms_norm", "aletheia_cpu::rotary")),
    ("attention", ("aletheia_cpu::attention", "aten::_scaled_dot", "aten::_softmax", "aten::bmm", "aten::baddbmm")),
    ("optimiser", ("Optimizer", "aten::_fused_adamw", "aten::_foreach", "aten::lerp", "aten::addc")),
)  # fmt: skip


def batches(model_dir: str, count: int) -> list[dict[str, Any]]:
    """Windows of the standard library's source, the first half of each masked."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text(encoding="utf-8") * 8
    ids = torch.tensor(tokenizer(text)["input_ids"][: count * BATCH * LENGTH]).view(count, BATCH, LENGTH)
    labels = ids.clone()
    labels[:, :, : LENGTH // 2] = -100
    return [{"input_ids": i, "labels": y} for i, y in zip(ids, labels, strict=True)]


def hand_written(model: Any) -> None:
    """PEFT's LoRA linears on the shortest autograd function that anyone would write: bf16 products, fp32 masters."""
    import torch
    from peft.tuners.lora.layer import Linear

    class Lora(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, a, b, s):
            a16, b16 = a.to(x.dtype), b.to(x.dtype)
            h = x @ a16.T
            ctx.save_for_backward(x, h, weight, a16, b16)
            ctx.s = s
            return torch.nn.functional.linear(x, weight) + s * (h @ b16.T)

        @staticmethod
        def backward(ctx, dy):
            x, h, weight, a16, b16 = ctx.saved_tensors
            dy2, x2, h2 = dy.flatten(0, 1), x.flatten(0, 1), h.flatten(0, 1)
            g = ctx.s * (dy2 @ b16)
            dx = (dy2 @ weight + g @ a16).view_as(x) if ctx.needs_input_grad[0] else None
            return dx, None, (g.T @ x2).float(), (ctx.s * (dy2.T @ h2)).float(), None

    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.forward = lambda x, layer=layer: Lora.apply(
                x,
                layer.base_layer.weight,
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                layer.scaling["default"],
            )


def prepare(arm: str, model_dir: str, stack: ExitStack, probe_batch: dict[str, Any]) -> tuple[Any, list[Any]]:
    """The arm's model, ready to be called with a batch, and what it trains."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from aletheia_tune.attention import kernel_attention
    from aletheia_tune.gated_mlp import apply_gated_mlps
    from aletheia_tune.head import labelled_head
    from aletheia_tune.kernels import use_kernels
    from aletheia_tune.norms import kernel_norms
    from aletheia_tune.plan import make_plan, uniform_plan
    from aletheia_tune.prefix import cut_prefix
    from aletheia_tune.probe import probe

    dtype = torch.float32 if arm == EXACT else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).to(dtype)
    model.train()
    if arm == FROZEN:
        model.requires_grad_(False)
        model.enable_input_require_grads()
        apply_gated_mlps(model)
        stack.enter_context(kernel_attention(model))
        stack.enter_context(kernel_norms(model))
        stack.enter_context(labelled_head(model))
        return model, []
    if arm == "ours_aletheia":
        plan = make_plan(probe(model, [probe_batch]), layers=50, rank=RANK)
    else:
        count = model.config.num_hidden_layers
        upper = range(count // 2, count) if arm == "ours_upper_half" else None
        plan = uniform_plan(model, rank=RANK, layers=upper)
    torch.manual_seed(0)
    model = get_peft_model(model, plan.to_lora_config(model), autocast_adapter_dtype=arm != "peft_bf16")
    adapters = [p for p in model.parameters() if p.requires_grad]
    if arm == "naive":
        hand_written(model)
    if arm.startswith("ours"):
        cut_prefix(model)
        stack.enter_context(use_kernels(model, strict=True))
    if arm == "peft_compiled":
        model = torch.compile(model)
    return model, adapters


def serve(arm: str, model_dir: str, steps: int, threads: int, allocator: str, pipe: Connection) -> None:
    """One arm: a step whenever asked, what it took in return."""
    import torch

    if allocator == "tuned" or not arm.startswith("peft"):
        aletheia_kernels.tune_allocator()
    torch.set_num_threads(threads)
    data = batches(model_dir, steps + 2)
    with ExitStack() as stack:
        model, adapters = prepare(arm, model_dir, stack, data[0])
        # As transformers' Trainer makes it.
        optimizer = torch.optim.AdamW(adapters, lr=RATE, weight_decay=0.0, fused=True) if adapters else None

        def step(index: int) -> dict[str, float]:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            start = time.perf_counter()
            loss = model(**data[index]).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(adapters, 1.0).item() if adapters else 0.0
            if optimizer:
                optimizer.step()
                optimizer.zero_grad()
            seconds = time.perf_counter() - start
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
            return {"seconds": seconds, "loss": loss.item(), "grad_norm": norm, "faults": faults}

        pipe.send("ready")
        while (request := pipe.recv()) is not None:
            if request == "initial":
                pipe.send([model(**batch).loss.item() for batch in data[: steps + 1]])
            elif request == "profile":
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                    step(steps + 1)
                pipe.send(breakdown(profiler.key_averages()))
            else:
                pipe.send(step(request))
        pipe.send(peak_memory_mb())


def breakdown(events: Any) -> dict[str, float]:
    """Self seconds of one profiled step by part; under the profiler, which itself costs some."""
    parts: dict[str, float] = defaultdict(float)
    for event in events:
        name = next((part for part, starts in PARTS if event.key.startswith(starts)), "activation, other")
        parts[name] += event.self_cpu_time_total / 1e6
    return dict(parts)


class Floor:
    """The base products, forward and for the input, and the head's two, at the rate that the library reaches here.

    Timed between the arms' steps, so that what slows them slows it.
    """

    def __init__(self, model_dir: str, threads: int) -> None:
        import torch
        from transformers import AutoConfig

        torch.set_num_threads(threads)
        config = AutoConfig.from_pretrained(model_dir)
        hidden, ffn, tokens = config.hidden_size, config.intermediate_size, BATCH * LENGTH
        kv = hidden // config.num_attention_heads * config.num_key_value_heads
        shapes = [(tokens, hidden, out) for out in (hidden, kv, kv, hidden, ffn, ffn)] + [
            (tokens, ffn, hidden)
        ]
        self.products: list[tuple[int, Any]] = []
        for count, group in (
            (config.num_hidden_layers, shapes),
            (1, [(tokens // 2, hidden, config.vocab_size)]),
        ):
            for rows, inner, outer in group:
                x, w = torch.randn(rows, inner).bfloat16(), torch.randn(outer, inner).bfloat16()
                dy = torch.randn(rows, outer).bfloat16()
                self.products.append((count, lambda x=x, w=w: torch.nn.functional.linear(x, w)))
                self.products.append((count, lambda dy=dy, w=w: dy @ w))
        self.times: list[list[float]] = [[] for _ in self.products]

    def take(self) -> None:
        """One sample of every product, warm."""
        for times, (_, product) in zip(self.times, self.products, strict=True):
            product()
            start = time.perf_counter()
            product()
            times.append(time.perf_counter() - start)

    def seconds(self) -> float:
        """What a step's products take, from the medians."""
        return sum(
            count * statistics.median(times)
            for times, (count, _) in zip(self.times, self.products, strict=True)
        )


def objection(arms: dict[str, dict[str, Any]], exact: dict[str, list[float]]) -> str | None:
    """Why no speed may be printed; None when every arm trains as well as the first one does.

    That is: its losses are at most twice as far (RMS) from those of the same training in float32. Other plans train
    otherwise: theirs are held to float32's before the first update, when every adapter still adds nothing.
    """

    def error(name: str, losses: str) -> float:
        pairs = zip(arms[name][losses], exact[losses], strict=True)
        return math.sqrt(statistics.mean((loss - true) ** 2 for loss, true in pairs))

    for name, arm in arms.items():
        if not all(math.isfinite(loss) for loss in (*arm["losses"], *arm["initial_losses"])):
            return f"a loss of {name} is not finite"
        if name != FROZEN and not all(math.isfinite(norm) and norm > 0 for norm in arm["grad_norms"]):
            return f"a gradient norm of {name} is zero or not finite"
    first = next(iter(arms))
    for name in arms:
        for losses in ("initial_losses", "losses") if name in UNIFORM else ("initial_losses",):
            given, allowed = error(name, losses), 2 * error(first, losses) + LOSS_TOLERANCE
            if given > allowed:
                what = losses.replace("_", " ")
                return f"{what} of {name} are {given:.3g} (RMS) off float32's, allowed {allowed:.3g}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--allocator",
        choices=["tuned", "default"],
        default="tuned",
        help="default: PEFT's arms as their users run them, without tune_allocator(); the others call it still",
    )
    parser.add_argument("--arms", default=",".join(arm for arm in ARMS if arm != "peft_compiled"))
    parser.add_argument(
        "--compiled", action="store_true", help="add PEFT under torch.compile (compiling takes minutes)"
    )
    parser.add_argument("--profile", action="store_true", help="one more step an arm, by part")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    names = [*options.arms.split(","), *(["peft_compiled"] if options.compiled else [])]
    unknown = [name for name in names if name not in ARMS]
    if unknown or names[0] not in UNIFORM:
        parser.error(f"arms are {', '.join(ARMS)}, a uniform one first; given {options.arms}")

    # The floor and the low-rank work are timed in this process: a floor with page faults would flatter every arm.
    aletheia_kernels.tune_allocator()
    console = Console(width=130, highlight=False)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}

    processes: list[Any] = []

    def start(name: str) -> Connection:
        pipe, other = context.Pipe()
        arguments = (name, options.model_dir, options.steps, options.threads, options.allocator, other)
        processes.append(context.Process(target=serve, args=arguments, daemon=True))
        processes[-1].start()
        pipe.recv()
        return pipe

    def ask(pipe: Connection, request: Any) -> Any:
        pipe.send(request)
        return pipe.recv()

    reference = start(EXACT)
    exact: dict[str, list[float]] = {"initial_losses": ask(reference, "initial"), "losses": []}
    for index in range(options.steps + 1):
        exact["losses"].append(ask(reference, index)["loss"])
        console.print(f"step {index}/{options.steps} in float32", end="\r")
    ask(reference, None)
    initial, first_s = {}, {}
    for name in (*names, FROZEN):
        pipes[name] = start(name)
        began = time.perf_counter()
        initial[name] = ask(pipes[name], "initial")
        first_s[name] = time.perf_counter() - began
    records: dict[str, list[dict[str, float]]] = {name: [] for name in pipes}
    floor = Floor(options.model_dir, options.threads)
    for index in range(options.steps + 1):
        floor.take()
        for name, pipe in pipes.items():
            records[name].append(ask(pipe, index))
        console.print(f"step {index}/{options.steps} of every arm", end="\r")
    parts = {}
    if options.profile:
        for name, pipe in pipes.items():
            parts[name] = ask(pipe, "profile")
    arms: dict[str, dict[str, Any]] = {}
    for name, pipe in pipes.items():
        peak_mb = ask(pipe, None)
        counted = records[name][1:]  # the first step compiles, packs and faults in
        seconds = [record["seconds"] for record in counted]
        arms[name] = {
            "median_s": statistics.median(seconds),
            "quartiles_s": statistics.quantiles(seconds, n=4)[::2],
            "first_s": first_s[name] + records[name][0]["seconds"],
            "faults": statistics.median(record["faults"] for record in counted),
            "initial_losses": initial[name],
            "losses": [record["loss"] for record in records[name]],
            "grad_norms": [record["grad_norm"] for record in records[name]],
            "peak_mb": peak_mb,
            "parts_s": parts.get(name),
        }
    for process in processes:  # giving back gigabytes takes a processor, too
        process.join()
    adapters = low_rank(options.model_dir, options.threads, BATCH * LENGTH, RANK)
    refusal = objection(arms, exact)
    show(console, arms, floor.seconds(), refusal)
    if refusal is None:
        console.print(
            f"low-rank work of our operators {adapters.seconds:.3f} s: {adapters.seconds / adapters.floor_seconds:.2f}"
            f" times its FLOPs at the products' rate ({adapters.floor_seconds:.3f} s)"
        )
    if options.json:
        frozen = arms.pop(FROZEN)
        result = {
            "floor_s": floor.seconds(),
            "frozen_s": frozen["median_s"],
            "allocator": options.allocator,
            "threads": options.threads,
            "machine": platform.processor() or platform.machine(),
            "instruction_set": cpu.instruction_set(),
            "objection": refusal,
            "low_rank_s": adapters.seconds,
            "low_rank_floor_s": adapters.floor_seconds,
            "exact": exact,
            "frozen": frozen,
            "arms": arms,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if refusal is None else 1


def show(console: Console, arms: dict[str, dict[str, Any]], floor: float, refusal: str | None) -> None:
    """The table, and the parts of a step where they were profiled."""
    fastest = {name: arm["median_s"] for name, arm in arms.items()}
    reference = next(iter(arms))
    table = Table(title=f"R1, one step; products alone {floor:.2f} s")
    for column in (
        "arm",
        "s (middle half)",
        f"× {reference}",
        "/ floor",
        "peak MiB",
        "faults",
        "loss first → last",
        "‖g‖",
    ):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for name, arm in arms.items():
        low, high = arm["quartiles_s"]
        table.add_row(
            name,
            f"{arm['median_s']:.2f} ({low:.2f}-{high:.2f})" if refusal is None else "-",
            f"{fastest[reference] / arm['median_s']:.2f}" if refusal is None else "-",
            f"{arm['median_s'] / floor:.2f}" if refusal is None else "-",
            f"{arm['peak_mb']:,.0f}",
            f"{arm['faults']:,.0f}",
            f"{arm['losses'][0]:.4f} → {arm['losses'][-1]:.4f}",
            f"{arm['grad_norms'][-1]:.3f}",
        )
    console.print(table)
    if refusal:
        console.print(f"no speed is shown: {refusal}")
    elif "peft_compiled" in arms:
        console.print(
            f"with compiling, the first losses and step of peft_compiled took {arms['peft_compiled']['first_s']:.0f} s"
        )
    if refusal is None and "ours_uniform" in arms:
        tax = arms["ours_uniform"]["median_s"] / arms[FROZEN]["median_s"] - 1
        console.print(f"LoRA tax of ours_uniform over the frozen model's step: {tax:.1%}")
    names = sorted({part for arm in arms.values() for part in arm["parts_s"] or {}})
    if names:
        table = Table(title="seconds by part, one step under the profiler")
        for column in ("arm", *names):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for name, arm in arms.items():
            table.add_row(name, *(f"{(arm['parts_s'] or {}).get(part, 0.0):.2f}" for part in names))
        console.print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (EOFError, ConnectionError):
        # An arm keeps what it allocated, up to its peak: all of them are in memory at once.
        sys.exit(
            "an arm's process ended before its time, most likely killed for want of memory: give fewer --arms"
        )
