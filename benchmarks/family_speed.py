"""Seconds of a step at the true width of fourteen models: PEFT's adapters, and the same on these operators, in turns.

A few layers of each, random weights in bfloat16, 512 tokens of which the second half is labelled, rank 16 on every
linear, AdamW; the vocabulary is cut by as much as the layers are, so that the head weighs what it weighs in the whole
model. All arms share one copy of the frozen weights and take a step each in turn. PEFT's adapters are in bfloat16, its
fastest way that needs no compiler.

    python benchmarks/family_speed.py --json benchmarks/results/family-speed.json --write docs/family-speed.md
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
import transformers as tf
from matplotlib.figure import Figure
from peft import get_peft_model
from torch import Tensor

import aletheia_kernels
from aletheia_tune import files
from aletheia_tune.environment import machine_facts, versions
from aletheia_tune.kernels import use_kernels
from aletheia_tune.plan import Plan, make_plan, uniform_plan
from aletheia_tune.prefix import cut_prefix
from aletheia_tune.probe import probe

TOKENS, RANK, RATE = 512, 16, 2e-4
# Relative, between losses of the same plan in bfloat16: some ten times what rounding leaves between two orders of sums.
LOSS_TOLERANCE = 2e-3
PLANS = ("uniform", "published", "upper half")
ARMS = tuple((who, plan) for plan in PLANS for who in ("PEFT", "ours"))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Size:
    """A model as it was published, and how many of its layers are built here.

    Attributes:
        model: class of the model.
        config: class of its configuration.
        hidden: width of the residual stream.
        ffn: width inside the MLP.
        depth: layers of the published model.
        heads: of queries.
        key_heads: of keys and values.
        vocabulary: of the published model.
        layers: built here.
        settings: what else the configuration is given.
        targets: ends of the names to adapt; all linears by default.
    """

    model: Any
    config: Callable[..., Any]
    hidden: int
    ffn: int
    depth: int
    heads: int
    key_heads: int
    vocabulary: int
    layers: int = 4
    settings: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] | None = None

    def build(self) -> Any:
        """The model in bfloat16 with the weights that its own initialisation draws."""
        vocabulary = 64 * math.ceil(self.vocabulary * self.layers / self.depth / 64)
        config = self.config(
            hidden_size=self.hidden, intermediate_size=self.ffn, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, num_key_value_heads=self.key_heads, vocab_size=vocabulary,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False, **self.settings,
        )  # fmt: skip
        torch.manual_seed(0)
        return self.model._from_config(config, dtype=torch.bfloat16).train()


_LLAMA, _QWEN = (tf.LlamaForCausalLM, tf.LlamaConfig), (tf.Qwen2ForCausalLM, tf.Qwen2Config)
_GEMMA = (tf.Gemma2ForCausalLM, tf.Gemma2Config)
SIZES: dict[str, Size] = {
    "Qwen2.5-0.5B": Size(*_QWEN, 896, 4864, 24, 14, 2, 151936),
    "TinyLlama-1.1B": Size(*_LLAMA, 2048, 5632, 22, 32, 4, 32000),
    "Llama-3.2-1B": Size(*_LLAMA, 2048, 8192, 16, 32, 8, 128256),
    "Qwen2.5-1.5B": Size(*_QWEN, 1536, 8960, 28, 12, 2, 151936),
    "StableLM-2-1.6B": Size(
        tf.StableLmForCausalLM, tf.StableLmConfig, 2048, 5632, 24, 32, 32, 100352,
        settings={"partial_rotary_factor": 0.25, "use_qkv_bias": True},
    ),
    "Gemma-2-2B": Size(*_GEMMA, 2304, 9216, 26, 8, 4, 256000, settings={"head_dim": 256}),
    "Qwen2.5-3B": Size(*_QWEN, 2048, 11008, 36, 16, 2, 151936),
    "Phi-3.5-mini": Size(tf.Phi3ForCausalLM, tf.Phi3Config, 3072, 8192, 32, 32, 32, 32064),
    "Mistral-7B": Size(
        tf.MistralForCausalLM, tf.MistralConfig, 4096, 14336, 32, 32, 8, 32768, settings={"sliding_window": None}
    ),
    "Qwen2.5-7B": Size(*_QWEN, 3584, 18944, 28, 28, 4, 152064),
    "Llama-3.1-8B": Size(*_LLAMA, 4096, 14336, 32, 32, 8, 128256),
    "Gemma-2-9B": Size(*_GEMMA, 3584, 14336, 42, 16, 8, 256000, settings={"head_dim": 256}),
    "Mixtral-8x7B": Size(
        tf.MixtralForCausalLM, tf.MixtralConfig, 4096, 14336, 32, 32, 8, 32000, layers=2, targets=ATTENTION
    ),
    "Llama-3.1-70B": Size(*_LLAMA, 8192, 28672, 80, 64, 8, 128256, layers=2),
}  # fmt: skip


class Arm:
    """A model with adapters on frozen weights that other arms hold too, and a step of it."""

    def __init__(self, model: Any, plan: Plan, *, ours: bool, undo: ExitStack) -> None:
        # Parameters stand for themselves in the copy: only modules are made anew.
        model = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
        torch.manual_seed(0)
        self.model = get_peft_model(model, plan.to_lora_config(model), autocast_adapter_dtype=ours)
        self.trained = [tensor for tensor in self.model.parameters() if tensor.requires_grad]
        if ours:
            cut_prefix(self.model)
            self.report = str(undo.enter_context(use_kernels(self.model)))
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0, fused=True)
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def step(self, batch: dict[str, Tensor]) -> None:
        start = time.perf_counter()
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def batches(vocabulary: int, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, vocabulary, (count, 1, TOKENS), generator=generator)
    labels = rows.clone()
    labels[:, :, : TOKENS // 2] = -100
    return [{"input_ids": ids, "labels": y} for ids, y in zip(rows, labels, strict=True)]


def plans(size: Size, model: Any, batch: dict[str, Tensor]) -> dict[str, Plan]:
    """All layers; the half that the published score prefers on this model; the half with the shortest backward pass."""
    scores = probe(model, [batch])
    return {
        "uniform": uniform_plan(model, rank=RANK, targets=size.targets),
        "published": make_plan(scores, layers=50, rank=RANK, targets=size.targets),
        "upper half": uniform_plan(
            model, rank=RANK, targets=size.targets, layers=range(size.layers // 2, size.layers)
        ),
    }


def measure(size: Size, steps: int) -> dict[str, Any]:
    """The row: every arm's seconds and losses, and what stayed on PEFT's path.

    Raises:
        AssertionError: an arm trains otherwise than PEFT's on the same plan.
    """
    model = size.build()
    data = batches(model.config.vocab_size, steps + 1)
    chosen = plans(size, model, data[0])
    with ExitStack() as undo:
        arms = {(who, plan): Arm(model, chosen[plan], ours=who == "ours", undo=undo) for who, plan in ARMS}
        for batch in data:
            for arm in arms.values():
                arm.step(batch)
        report = arms["ours", "uniform"].report
    for plan in PLANS:
        for theirs, ours in zip(arms["PEFT", plan].losses, arms["ours", plan].losses, strict=True):
            assert math.isfinite(ours), f"{plan}: a loss is not finite"
            assert abs(ours - theirs) <= LOSS_TOLERANCE * abs(theirs), (
                f"{plan}: {ours} beside PEFT's {theirs}"
            )
    return {
        "layers": size.layers,
        "published_layers": sorted(chosen["published"].layers),
        "parameters_a_layer": sum(tensor.numel() for tensor in model.model.layers[0].parameters()),
        "report": report,
        # The first step of each touches its memory for the first time.
        "arms": {
            f"{who} {plan}": {"seconds": arm.seconds[1:], "losses": arm.losses}
            for (who, plan), arm in arms.items()
        },
    }


def ratio(row: dict[str, Any], theirs: str, ours: str) -> tuple[float, float, float]:
    """PEFT's seconds over ours, round by round: the median, the least and the largest."""
    pairs = zip(row["arms"][theirs]["seconds"], row["arms"][ours]["seconds"], strict=True)
    ratios = [peft / mine for peft, mine in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


COLUMNS = {
    "uniform": ("PEFT uniform", "ours uniform"),
    "PEFT uniform over our published half": ("PEFT uniform", "ours published"),
    "published half": ("PEFT published", "ours published"),
    "PEFT's published half over our uniform": ("PEFT published", "ours uniform"),
    "upper half": ("PEFT upper half", "ours upper half"),
    "PEFT uniform over our upper half": ("PEFT uniform", "ours upper half"),
}


# Of the columns, those whose points the picture shows, with their colours and shapes.
DRAWN = {
    "uniform": ("#0072b2", "o"),
    "published half": ("#4a4f57", "s"),
    "PEFT uniform over our upper half": ("#d55e00", "D"),
}
STYLE: dict[Any, Any] = {"svg.hashsalt": "aletheia", "font.family": "DejaVu Sans", "font.size": 10}


def picture(rows: dict[str, dict[str, Any]]) -> Figure:
    """A line for each model, with a median and its range for each ratio drawn."""
    figure = Figure(figsize=(8.4, 0.42 * len(rows) + 1.3), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for place, (column, (colour, shape)) in enumerate(DRAWN.items()):
        found = [ratio(row, *COLUMNS[column]) for row in rows.values()]
        middles = [middle for middle, _, _ in found]
        ranges = [[middle - low for middle, low, _ in found], [high - middle for middle, _, high in found]]
        y = [index + 0.24 * (place - 1) for index in range(len(rows))]
        axes.errorbar(
            middles, y, xerr=ranges, fmt=shape, color=colour, markersize=5, elinewidth=1, label=column
        )
    axes.axvline(1.0, color="#1b1e23", linewidth=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("seconds of PEFT's step over ours: median, least and largest of the rounds")
    axes.grid(axis="x", color="#d5d9df")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=len(DRAWN), frameon=False)
    return figure


HEAD = f"""# Speed by model

Made by `python benchmarks/family_speed.py --write docs/family-speed.md`. A few layers at each model's true width with
random bf16 weights, {TOKENS} tokens, half of them labelled, rank {RANK}, AdamW; the vocabulary is cut by as much as the
layers are. PEFT's adapters are in bf16, its fastest way that needs no compiler. Every arm takes a step in turn on one
copy of the frozen weights. A cell is PEFT's seconds over ours: the median of the rounds, the least and the largest;
above 1 ours is faster. *Published half*: the layers that the published score prefers on this model; *upper half*: those
that let the backward pass end soonest. Mixtral has adapters on its attention alone.

What the operators save is the work beside the frozen products: the adapters', the passes over activations around them,
the MLP's and the head's. The frozen products take both arms the same time, and their share of a step grows with the
width, so the wider the layer, the less there is to win; Mixtral's experts, most of its step, have no adapters here. The
published half, on these random weights, holds layer 0 of every model, so its backward pass is as long as that of all
layers and it is hardly quicker; the upper half's is half as long."""


def markdown(rows: dict[str, dict[str, Any]], facts: dict[str, str], drawing: str) -> str:
    """The page: ratios of a step's seconds; above 1 ours is faster. `drawing` is the file with the picture."""
    lines = [
        *HEAD.splitlines(),
        "",
        f"![PEFT's seconds of a step over ours, model by model]({drawing})",
        "",
        f"| model | layers here | the published half | PEFT uniform, s | {' | '.join(COLUMNS)} |",
        f"|---|---:|---:|---:|{'---:|' * len(COLUMNS)}",
        *(row_of(name, row) for name, row in rows.items()),
        "",
        f"*{', '.join(f'{key}: {value}' for key, value in facts.items())}*",
        "",
    ]
    return "\n".join(lines)


def row_of(name: str, row: dict[str, Any]) -> str:
    cells = []
    for theirs, ours in COLUMNS.values():
        middle, low, high = ratio(row, theirs, ours)
        cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    published = ", ".join(map(str, row["published_layers"]))
    seconds = statistics.median(row["arms"]["PEFT uniform"]["seconds"])
    return f"| {name} | {row['layers']} | {published} | {seconds:.2f} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sizes", nargs="*", help="of the table; all by default")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--json", type=Path, help="keeps what is measured there, size by size, and goes on from it"
    )
    parser.add_argument(
        "--write", type=Path, help="Markdown file to write the page to, and beside it the picture"
    )
    options = parser.parse_args()
    strays = [name for name in options.sizes if name not in SIZES]
    if strays:
        parser.error(f"no size {strays[0]!r}; there are {', '.join(SIZES)}")
    aletheia_kernels.tune_allocator()
    torch.set_num_threads(options.threads)
    facts = {key: value for key, value in machine_facts() if key != "system"}
    kept: dict[str, Any] = {"machine": facts, "versions": versions(), "sizes": {}}
    if options.json and options.json.exists():
        kept = json.loads(options.json.read_text(encoding="utf-8"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in options.sizes or SIZES:
            if name not in kept["sizes"]:
                if (kept["machine"], kept["versions"]) != (facts, versions()):
                    parser.error(
                        f"{options.json} holds figures of another machine or of other versions: give another file"
                    )
                kept["sizes"][name] = measure(SIZES[name], options.steps)
                if options.json:
                    files.write_text(options.json, json.dumps(kept, indent=1) + "\n", overwrite=True)
            print(row_of(name, kept["sizes"][name]), flush=True)
    if options.write:
        rows = {name: kept["sizes"][name] for name in SIZES if name in kept["sizes"]}
        drawing = options.write.with_suffix(".svg")
        files.write_text(options.write, markdown(rows, kept["machine"], drawing.name), overwrite=True)
        with matplotlib.rc_context(STYLE):
            picture(rows).savefig(drawing, metadata={"Date": None})


if __name__ == "__main__":
    main()
