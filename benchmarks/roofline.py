"""What each operator moves and multiplies, beside the least it could and beside PEFT, and the times that follow.

    python benchmarks/roofline.py [--json FILE] [--markdown docs/roofline.md]

Nothing here was timed. Bytes, FLOPs and launches are counted from what runs on the meta device, forward and backward:
our kernels state theirs where they are launched (:mod:`aletheia_kernels.triton.launch`), PyTorch's operations are
traced (:mod:`benchmarks.traffic`), PEFT's adapters as PEFT builds and runs them (:mod:`benchmarks.adapted`). A time is
predicted as the sum over launches of the longer of bytes over bandwidth and FLOPs over rate, plus a fixed overhead a
launch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from aletheia_kernels import triton
from benchmarks import predicted_step
from benchmarks.adapted import RANKS, empty, experts_counts, group_counts, mlp_counts
from benchmarks.shapes import CARD_SHAPES, Shape
from benchmarks.traffic import (
    OVERHEAD_S,
    RATES,
    Cost,
    Rate,
    counting,
    others,
    products,
    total_bytes,
    total_flops,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "roofline.md"
BEGIN, END = "<!-- made by benchmarks/roofline.py -->\n", "<!-- end -->\n"
HEADINGS = (
    "operator",
    "GFLOP",
    "ours MB",
    "least MB",
    "ours ÷ least (worst group)",
    "PEFT MB",
    "PEFT bf16 MB",
    "launches ours / PEFT",
    *(f"{rate.card} ms ours / PEFT, predicted" for rate in RATES),
)


@dataclass(frozen=True)
class Row:
    """One operator of one layer.

    Attributes:
        base: the vendor library's products of the frozen weights, and what else every arm runs alike.
        around: what ours adds to them.
        least: bytes that whatever stands around the products cannot do without.
        peft: all that PEFT runs, its products included; plain torch where PEFT has no such operator.
        peft_bf16: the same with adapters kept in bfloat16.
        parts: what is moved over the least, for each part that the operator is called for by itself.
    """

    name: str
    base: list[Cost]
    around: list[Cost]
    least: int
    peft: list[Cost]
    peft_bf16: list[Cost]
    parts: dict[str, float] = field(default_factory=dict)

    def beyond_base(self, costs: list[Cost]) -> int:
        return total_bytes(costs) - total_bytes(self.base)

    @property
    def figures(self) -> dict[str, Any]:
        return {
            "bytes": total_bytes(self.around),
            "least_bytes": self.least,
            "peft_bytes": self.beyond_base(self.peft),
            "peft_bf16_bytes": self.beyond_base(self.peft_bf16),
            "flops": total_flops(self.around),
            "base_bytes": total_bytes(self.base),
            "base_flops": total_flops(self.base),
            "parts": self.parts,
            "launches": len(self.base) + len(self.around),
            "peft_launches": len(self.peft),
            "predicted_s": {rate.card: rate.seconds(self.base + self.around) for rate in RATES},
            "predicted_peft_s": {rate.card: rate.seconds(self.peft) for rate in RATES},
        }

    @property
    def _worst(self) -> str:
        if len(self.parts) < 2:
            return ""
        name, ratio = max(self.parts.items(), key=lambda part: part[1])
        return f" ({name} {ratio:.2f})"

    @property
    def cells(self) -> list[str]:
        f = self.figures

        def megabytes(key: str) -> str:
            return f"{f[key] / 1e6:,.0f}"

        return [
            self.name,
            f"{f['flops'] / 1e9:,.1f}",
            megabytes("bytes"),
            megabytes("least_bytes"),
            f"{f['bytes'] / f['least_bytes']:.2f}" + self._worst,
            megabytes("peft_bytes"),
            megabytes("peft_bf16_bytes"),
            f"{f['launches']} / {f['peft_launches']}",
            *(
                f"{f['predicted_s'][rate.card] * 1e3:.2f} / {f['predicted_peft_s'][rate.card] * 1e3:.2f}"
                for rate in RATES
            ),
        ]


SIZE, MASTER = 2, 4


def least_of_group(tokens: int, width: int, outs: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    """Around the products x Wᵀ, which leave y, and dy W, which leaves dx.

    Forward reads x and adds to y; backward reads dy and x and adds to dx. A and B are read by both and their gradients
    written. h and g need not leave the chip.
    """
    wide = tokens * SIZE * ((width + 2 * sum(outs)) + (sum(outs) + width + 2 * width))
    return wide + 3 * MASTER * sum(rank * (width + out) for rank, out in zip(ranks, outs, strict=True))


def least_of_mlp(shape: Shape, ranks: tuple[int, ...]) -> int:
    """As for the two groups, where passes over one tensor are one pass.

    Forward adds to gate and up and writes their product, which its adapter's A takes on the way; backward reads
    dproduct, gate and up and writes dgate and dup, which the adapters' B take on the way.
    """
    hidden, ffn = shape.hidden, shape.ffn
    forward = hidden + 2 * 2 * ffn + ffn + 2 * hidden
    backward = hidden + 3 * ffn + 2 * ffn + hidden + 2 * hidden
    return shape.tokens * SIZE * (forward + backward) + 3 * MASTER * sum(ranks) * (hidden + ffn)


def least_of_experts(shape: Shape, ranks: tuple[int, int]) -> int:
    rows, experts = shape.tokens * shape.experts_per_token, shape.experts
    both = ((shape.hidden, 2 * shape.ffn, ranks[0]), (shape.ffn, shape.hidden, ranks[1]))
    return sum(least_of_group(rows, width, (out,), (0,)) for width, out, _ in both) + sum(
        3 * MASTER * experts * rank * (width + out) for width, out, rank in both
    )


def _gradient_norms(shape: Shape) -> Row:
    """Every linear of a layer in one call, beside plain torch, which makes each gradient and then its norm."""
    xs, dys, least = [], [], 0
    for width, outs in shape.groups.values():
        x = empty(shape.tokens, width)
        xs += [x] * len(outs)
        dys += [empty(shape.tokens, out) for out in outs]
        least += shape.tokens * SIZE * (width + sum(outs))
    with counting() as ours:
        triton.operators().weight_grad_norms_sq(xs, dys)
    with counting() as plain:
        for x, dy in zip(xs, dys, strict=True):
            torch.linalg.vector_norm(dy.T @ x, dtype=torch.float32)
    return Row(f"{shape.name.lower()}/weight_grad_norms_sq", [], ours.costs, least, plain.costs, plain.costs)


def _groups(shape: Shape, ranks: str) -> Row:
    """Every group of linears of a layer."""
    row = Row(f"{shape.name.lower()}/{ranks}/lora_group", [], [], 0, [], [])
    for group, (width, outs) in shape.groups.items():
        counts = group_counts(shape.tokens, width, outs, RANKS[ranks][group])
        least = least_of_group(shape.tokens, width, outs, RANKS[ranks][group])
        around = others(counts.ours)
        row = Row(
            row.name,
            row.base + products(counts.ours),
            row.around + around,
            row.least + least,
            row.peft + counts.peft,
            row.peft_bf16 + counts.peft_bf16,
            row.parts | {group: total_bytes(around) / least},
        )
    return row


def _mlp(shape: Shape, ranks: str) -> Row:
    own = (*RANKS[ranks]["gate_up"], *RANKS[ranks]["down"])
    counts = mlp_counts(shape, own)
    name = f"{shape.name.lower()}/{ranks}/lora_gated_mlp"
    around = others(counts.ours)
    return Row(name, products(counts.ours), around, least_of_mlp(shape, own), counts.peft, counts.peft_bf16)


def _experts(shape: Shape, ranks: str) -> Row:
    own = RANKS[ranks]["experts"]
    frozen, counts = experts_counts(shape, own)
    name = f"{shape.name.lower()}/{ranks}/lora_experts"
    return Row(name, frozen, others(counts.ours), least_of_experts(shape, own), counts.peft, counts.peft_bf16)


def rows(shapes: tuple[Shape, ...] = CARD_SHAPES) -> Iterator[Row]:
    """Every operator at every shape and choice of ranks."""
    for shape in shapes:
        for ranks in RANKS:
            yield _groups(shape, ranks)
            yield _experts(shape, ranks) if shape.experts else _mlp(shape, ranks)
        yield _gradient_norms(shape)


STEP_SHAPE = next(shape for shape in CARD_SHAPES if shape.name == "Llama-3.1-8B")
STEP_RANK = 16
ARM_NAMES = {"peft": "PEFT", "peft_bf16": "PEFT, bf16 adapters", "ours": "ours"}


@cache
def _arms() -> dict[str, list[Cost]]:
    return predicted_step.arms(STEP_SHAPE, STEP_RANK)


def steps(rate: Rate) -> dict[str, float]:
    """Predicted seconds of a whole step, by arm."""
    return {name: rate.seconds(costs) for name, costs in _arms().items()}


STEP_HEADINGS = (
    "arm",
    "launches",
    "GB moved",
    "TFLOP",
    *(f"{rate.card} ms, predicted" for rate in RATES),
    "÷ PEFT, uniform, on H100, predicted",
)


def step_cells() -> Iterator[list[str]]:
    seconds = {rate.card: steps(rate) for rate in RATES}
    for name, costs in _arms().items():
        form, part = name.split(", ")
        yield [
            f"{ARM_NAMES[form]}, {part}",
            f"{len(costs):,}",
            f"{total_bytes(costs) / 1e9:,.0f}",
            f"{total_flops(costs) / 1e12:,.0f}",
            *(f"{seconds[rate.card][name] * 1e3:,.0f}" for rate in RATES),
            f"{seconds['H100'][name] / seconds['H100']['peft, uniform']:.2f}",
        ]


def _table(headings: tuple[str, ...], cells: list[list[str]]) -> str:
    lines = [" | ".join(headings), " | ".join(["---", *["---:"] * (len(headings) - 1)])]
    return "\n".join(f"| {line} |" for line in [*lines, *(" | ".join(row) for row in cells)]) + "\n"


def markdown(counted: list[Row]) -> str:
    """The tables of docs/roofline.md."""
    step = f"{STEP_SHAPE} on {STEP_SHAPE.tokens:,} tokens, rank {STEP_RANK} on all linears"
    operators = _table(HEADINGS, [row.cells for row in counted])
    return "\n".join(
        [operators, f"A whole step of {step} (**predicted**):\n", _table(STEP_HEADINGS, list(step_cells()))]
    )


def write_page(page: Path, tables: str) -> None:
    """Puts the tables between the page's marks."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + tables + END + rest.split(END)[1])


def figures(counted: list[Row]) -> dict[str, Any]:
    """What ``--json`` writes; whatever is predicted says so in its key."""
    return {
        "operators": {row.name: row.figures for row in counted},
        "predicted_step_s": {rate.card: steps(rate) for rate in RATES},
        "assumed": {
            "overhead_s": OVERHEAD_S,
            **{rate.card: {"bytes_per_s": rate.bandwidth, "flops_per_s": rate.flops} for rate in RATES},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="write the tables between PAGE's marks")
    options = parser.parse_args()

    counted = list(rows())
    if options.json:
        options.json.write_text(json.dumps(figures(counted), indent=1) + "\n")
    if options.markdown:
        write_page(options.markdown, markdown(counted))
    console = Console(width=200 if not sys.stdout.isatty() else None)
    for title, headings, cells in (
        (
            "Operators, forward and backward: counted bytes around the base products, predicted times",
            HEADINGS,
            [row.cells for row in counted],
        ),
        (
            f"A step of {STEP_SHAPE}, {STEP_SHAPE.tokens:,} tokens, rank {STEP_RANK}: predicted",
            STEP_HEADINGS,
            list(step_cells()),
        ),
    ):
        table = Table(title=title)
        for index, heading in enumerate(headings):
            table.add_column(heading, justify="right" if index else "left")
        for row in cells:
            table.add_row(*row)
        console.print(table)
    console.print(f"Predicted, not measured: {OVERHEAD_S * 1e6:.0f} µs a launch assumed.")


if __name__ == "__main__":
    main()
