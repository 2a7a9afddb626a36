"""What the probe costs and how true it is, on a real model, in one run.

    python benchmarks/probe.py DIR [--json FILE]

DIR holds a causal language model in transformers' format (SmolLM2-135M for the figures in the README). Printed are

* agreement: the faithful probe's score of every layer against the published package (``aletheia-lora``), fp32, the same
  5 x 256 tokens, the layers that both would choose, and both costs;
* time: exact and sketched probe against a plain forward and backward for the inputs only (frozen weights, the model's
  own head and loss), taken in turn, medians with their spread, as wall-clock and as processor time;
* memory: the peak of all live tensors, weights included, and of the process, each pass in a process of its own; also
  for a single 4096 x 11008 linear.

Ratios are to the plain pass. On a machine that others use, trust processor time (``--threads 1``) before wall-clock.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoModelForCausalLM, AutoTokenizer

from aletheia_tune.files import write_text
from aletheia_tune.head import labelled_head
from aletheia_tune.layers import find_layers
from aletheia_tune.probe import faithful_batches, probe

Batch = dict[str, Tensor]
IN_FEATURES, OUT_FEATURES, LINEAR_TOKENS = 4096, 11008, 512
SHAPES = {"1 x 256 float32": (1, 256, torch.float32), "4 x 512 bfloat16": (4, 512, torch.bfloat16)}
PASSES = ("plain", "plain, labelled head", "exact", "sketch")
BATCHES = (
    4  # in one timed call; what a probe does once (trying the head, finding the layers) is spread over them
)
MIB = 1 << 20


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensor storages alive, and their peak: those given, and then every operator's outputs."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self.live = self.peak = 0
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out


class Block(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.up = nn.Linear(in_features, out_features, bias=False)


class SingleLinear(nn.Module):
    """One linear in a list of one layer; the loss is <y, labels>."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(in_features, out_features)])

    def forward(self, inputs_embeds: Tensor, labels: Tensor, **_: Any) -> Any:
        loss = (self.layers[0].up(inputs_embeds) * labels).sum()
        return type("Output", (), {"loss": loss})


def plain_pass(model: nn.Module, batches: list[Batch]) -> None:
    """Forward and backward for the inputs only: frozen weights, train mode, the model's own head and loss."""
    model.train()
    model.requires_grad_(False)
    extra = {"use_cache": False} if hasattr(model, "config") else {}
    for batch in batches:
        inputs = dict(batch)
        if "input_ids" in inputs:
            inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        inputs["inputs_embeds"] = inputs["inputs_embeds"].detach().requires_grad_()
        model(**inputs, **extra).loss.backward()


def labelled_head_pass(model: nn.Module, batches: list[Batch]) -> None:
    """The plain pass with the head that the probe uses: what the probe adds is what it costs more than this."""
    model.requires_grad_(False)
    with labelled_head(model):
        plain_pass(model, batches)


def passes(model: nn.Module, batch: Batch, times: int = 1) -> dict[str, Callable[[], Any]]:
    """The passes to compare, each over the batch so many times in one call, as a probe takes several batches."""
    return {
        "plain": lambda: plain_pass(model, [batch] * times),
        "plain, labelled head": lambda: labelled_head_pass(model, [batch] * times),
        "exact": lambda: probe(model, [batch] * times),
        "sketch": lambda: probe(model, [batch] * times, exact=False),
    }


def single_linear(in_features: int, out_features: int, tokens: int) -> tuple[nn.Module, Batch]:
    batch = {
        "inputs_embeds": torch.randn(1, tokens, in_features),
        "labels": torch.randn(1, tokens, out_features),
    }
    return SingleLinear(in_features, out_features), batch


def subject(model_dir: str, case: str) -> tuple[nn.Module, Batch]:
    """The model and the batch of a case: one of SHAPES, or the single linear."""
    torch.manual_seed(0)
    if case not in SHAPES:
        return single_linear(IN_FEATURES, OUT_FEATURES, LINEAR_TOKENS)
    rows, tokens, dtype = SHAPES[case]
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    ids = torch.tensor([example["input_ids"] for example in examples(model_dir, rows, tokens)])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def examples(model_dir: str, count: int, tokens: int) -> list[dict[str, list[int]]]:
    """Text that every machine has: sources of the standard library, cut into pieces of equal length."""
    import argparse as first
    import statistics as second
    import typing as third

    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    text = "".join(inspect.getsource(module) for module in (first, second, third))
    ids = tokenizer(text)["input_ids"]
    if len(ids) < count * tokens:
        raise SystemExit(f"the sample text has {len(ids)} tokens, not {count * tokens}")
    return [{"input_ids": ids[i * tokens : (i + 1) * tokens]} for i in range(count)]


def agreement(model_dir: str) -> dict[str, Any]:
    import aletheia_lora

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, local_files_only=True)
    data = [
        {"input_ids": torch.tensor(e["input_ids"]), "attention_mask": torch.ones(256, dtype=torch.int64)}
        for e in examples(model_dir, 20, 256)
    ]
    layers = len(find_layers(model).layers)
    start, processor = time.perf_counter(), time.process_time()
    ours = probe(model, faithful_batches(data), faithful=True).layers
    our_cost = time.perf_counter() - start, time.process_time() - processor
    start, processor = time.perf_counter(), time.process_time()
    published = aletheia_lora.gradient_probe(model, data, layers, device=torch.device("cpu"))
    their_cost = time.perf_counter() - start, time.process_time() - processor
    theirs = [published[index] for index in range(layers)]

    def chosen(scores: Any) -> list[int]:
        return sorted(sorted(range(layers), key=lambda index: -scores[index])[: layers // 2])

    return {
        "max_relative_difference": max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True)),
        "by_layer": [[a, b] for a, b in zip(ours, theirs, strict=True)],
        "chosen": chosen(ours),
        "chosen_by_the_published_package": chosen(theirs),
        "seconds": our_cost[0],
        "seconds_published": their_cost[0],
        "processor_seconds": our_cost[1],
        "processor_seconds_published": their_cost[1],
    }


def timing(model_dir: str, case: str, repeats: int) -> dict[str, Any]:
    """Medians and spread of each pass, the passes taken in turn after one round to warm up."""
    model, batch = subject(model_dir, case)
    runs = passes(model, batch, BATCHES)
    wall: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(repeats + 1):
        for name, run in runs.items():
            start, start_processor = time.perf_counter(), time.process_time()
            run()
            if round_:
                wall[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - start_processor)
    result: dict[str, Any] = {}
    for name in runs:
        result[name] = {
            "wall": statistics.median(wall[name]),
            "wall_spread": [min(wall[name]), max(wall[name])],
            "wall_ratio": statistics.median(a / b for a, b in zip(wall[name], wall["plain"], strict=True)),
            "processor": statistics.median(processor[name]),
            "processor_spread": [min(processor[name]), max(processor[name])],
            "processor_ratio": statistics.median(
                a / b for a, b in zip(processor[name], processor["plain"], strict=True)
            ),
        }
    return result


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _memory_child(model_dir: str, case: str, name: str, tracked: bool, pipe: Any, threads: int) -> None:
    torch.set_num_threads(threads)
    for run in passes(
        *single_linear(8, 8, 8)
    ).values():  # what the first call of an operator imports is no pass's memory
        run()
    model, batch = subject(model_dir, case)
    held = [*model.parameters(), *model.buffers(), *batch.values()]
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for tensor in held:  # pages of a mapped file become resident when they are read
        tensor.sum()
    run = passes(model, batch)[name]
    if tracked:
        with LiveBytes(held) as live:
            run()
        pipe.send({"live_peak": live.peak, "weights": weights})
    else:
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        run()
        pipe.send({"process_peak": _status("VmHWM"), "process_rise": _status("VmHWM") - before})
    pipe.close()


def memory(model_dir: str, case: str, threads: int) -> dict[str, Any]:
    """Peaks of each pass, each in a fresh process: once followed tensor by tensor, once undisturbed."""
    context = multiprocessing.get_context("spawn")
    # Blocks of a mebibyte and more go back to the system when freed: the peak is then of memory in use, not of holes.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(MIB)
    result: dict[str, Any] = {}
    for name in PASSES:
        result[name] = {}
        for tracked in (True, False):
            receive, send = context.Pipe(duplex=False)
            child = context.Process(
                target=_memory_child, args=(model_dir, case, name, tracked, send, threads)
            )
            child.start()
            send.close()
            result[name].update(receive.recv())
            child.join()
    plain = result["plain"]
    for each in result.values():
        each["live_ratio"] = each["live_peak"] / plain["live_peak"]
        each["process_ratio"] = each["process_peak"] / plain["process_peak"]
        # Without the interpreter and its libraries, which would flatter the ratio.
        each["rise_ratio"] = (plain["weights"] + each["process_rise"]) / (
            plain["weights"] + plain["process_rise"]
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="What the probe costs and how true it is.")
    parser.add_argument("model", help="directory of a causal language model")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of timing (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--parts", nargs="+", default=["memory", "agreement", "time"], help="of memory, agreement, time"
    )
    cases = [*SHAPES, f"linear {IN_FEATURES} x {OUT_FEATURES}, {LINEAR_TOKENS} tokens"]
    parser.add_argument(
        "--cases", nargs="+", default=cases, choices=cases, help="of memory and time (default all)"
    )
    arguments = parser.parse_args()
    cases = arguments.cases
    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    load = os.getloadavg()[0]
    figures: dict[str, Any] = {
        "torch": torch.__version__,
        "threads": arguments.threads,
        "load_at_start": load,
    }
    print(f"torch {torch.__version__}, {arguments.threads} threads, load at start {load:.1f}", flush=True)

    if "memory" in arguments.parts:
        figures["memory"] = {}
        for case in cases:
            found = figures["memory"][case] = memory(arguments.model, case, arguments.threads)
            print(f"\nmemory, {case} (weights {found['plain']['weights'] / MIB:.0f} MiB)")
            print(f"  {'':20}{'live tensors':>20}{'process':>20}{'weights + rise':>20}")
            for name, each in found.items():
                print(
                    f"  {name:20}{each['live_peak'] / MIB:9.0f} MiB x{each['live_ratio']:.3f}"
                    f"{each['process_peak'] / MIB:10.0f} MiB x{each['process_ratio']:.3f}"
                    f"{(found['plain']['weights'] + each['process_rise']) / MIB:10.0f} MiB x{each['rise_ratio']:.3f}",
                    flush=True,
                )
    if "time" in arguments.parts:
        figures["time"] = {}
        for case in cases:
            found = figures["time"][case] = timing(arguments.model, case, arguments.repeats)
            print(f"\ntime, {case}, {BATCHES} batches a call, median of {arguments.repeats} (least to most)")
            for name, each in found.items():
                print(
                    f"  {name:20} wall {each['wall']:7.3f} s ({each['wall_spread'][0]:.3f} to "
                    f"{each['wall_spread'][1]:.3f}) x{each['wall_ratio']:.2f}   processor {each['processor']:7.3f} s "
                    f"({each['processor_spread'][0]:.3f} to {each['processor_spread'][1]:.3f}) "
                    f"x{each['processor_ratio']:.2f}",
                    flush=True,
                )
    if "agreement" in arguments.parts:
        found = figures["agreement"] = agreement(arguments.model)
        print(f"\nfaithful probe against aletheia-lora, {len(found['by_layer'])} layers, 5 x 256 tokens")
        print(
            "  largest relative difference of a layer's score: " + f"{found['max_relative_difference']:.2e}"
        )
        print(f"  chosen here:   {found['chosen']}")
        print(f"  chosen there:  {found['chosen_by_the_published_package']}")
        print(f"  the same layers: {found['chosen'] == found['chosen_by_the_published_package']}")
        print(
            f"  wall {found['seconds']:.1f} s against {found['seconds_published']:.1f} s "
            f"(x{found['seconds_published'] / found['seconds']:.2f}), processor {found['processor_seconds']:.1f} s "
            f"against {found['processor_seconds_published']:.1f} s "
            f"(x{found['processor_seconds_published'] / found['processor_seconds']:.2f})",
            flush=True,
        )
    if arguments.json:
        write_text(arguments.json, json.dumps(figures, indent=2) + "\n", overwrite=True)


if __name__ == "__main__":
    main()
