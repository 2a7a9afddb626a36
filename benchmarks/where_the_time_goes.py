"""The tables and the picture of docs/where-the-time-goes.md, made from results of step.py.

    python benchmarks/step.py MODEL_DIR --profile --compiled --json tuned.json
    python benchmarks/step.py MODEL_DIR --profile --allocator default --json default.json
    python benchmarks/where_the_time_goes.py tuned.json default.json

The page has tables and a picture for every instruction set of which benchmarks/results holds a run; a result says which
it is of. The second one is optional; of it only PEFT's arms are shown, which alone ran there without tune_allocator().
Parts are timed in one step under the profiler, which costs something itself: each arm's are scaled to add up to its
median.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from step import FROZEN, PARTS, UNIFORM

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = DOCS / "where-the-time-goes.md"

# Arms in the order shown.
LABELS = {
    "peft_fp32": "PEFT, fp32 adapters",
    "peft_bf16": "PEFT, bf16 adapters",
    "peft_compiled": "PEFT, torch.compile",
    "naive": "hand-written autograd",
    "ours_uniform": "ours, every layer",
    "ours_upper_half": "ours, upper half",
    "ours_aletheia": "ours, Aletheia plan",
    FROZEN: "frozen, no adapters",
}
# Parts in the order stacked, in colours that stay apart for the colour-blind (Paul Tol's "bright" scheme).
COLOURS = dict(
    zip(
        (*(part for part, _ in PARTS), "activation, other"),
        ("#4477aa", "#66ccee", "#ccbb44", "#228833", "#ee6677", "#bbbbbb"),
        strict=True,
    )
)
# What a result must have beside the arms.
FIGURES = (
    "floor_s",
    "low_rank_s",
    "low_rank_floor_s",
    "exact",
    "allocator",
    "threads",
    "machine",
    "instruction_set",
)
STYLE: dict[Any, Any] = {"svg.hashsalt": "aletheia", "font.family": "DejaVu Sans", "font.size": 10}


@dataclass(frozen=True)
class Row:
    """One arm of one run."""

    label: str
    arm: dict[str, Any]
    parts: dict[str, float]  # seconds, adding up to the arm's median
    floor: float  # the run's products alone, seconds
    times_ours: float | None  # over ours_uniform of the same run
    loss_error: float | None  # the largest over steps, of an arm that trains what the exact one does


def load(path: Path) -> dict[str, Any]:
    """A result that may be shown; ends the program with one line where there is none."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        arms = {**run["arms"], FROZEN: run["frozen"]}
        refusal, unprofiled = run["objection"], [name for name, arm in arms.items() if not arm["parts_s"]]
        missing = [name for name in FIGURES if name not in run]
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path}: not a result of step.py --json: {error}")
    if missing:
        sys.exit(f"{path}: not a result of this step.py: no {', '.join(missing)}")
    if refusal is not None:
        sys.exit(f"{path}: no speed is shown: {refusal}")
    if unprofiled:
        sys.exit(f"{path}: no parts of {', '.join(unprofiled)}: run step.py with --profile")
    return {**run, "arms": arms}


def rows(run: dict[str, Any], names: list[str], suffix: str = "") -> list[Row]:
    """The named arms of a run; the suffix tells runs apart."""
    given = []
    for name in names:
        arm = run["arms"][name]
        scale = arm["median_s"] / sum(arm["parts_s"].values())
        ours = run["arms"].get("ours_uniform")
        errors = [abs(loss - true) for loss, true in zip(arm["losses"], run["exact"]["losses"], strict=True)]
        given.append(
            Row(
                LABELS[name] + suffix,
                arm,
                {part: arm["parts_s"].get(part, 0.0) * scale for part in COLOURS},
                run["floor_s"],
                arm["median_s"] / ours["median_s"] if ours else None,
                max(errors) if name in UNIFORM else None,
            )
        )
    return given


def _steps(run: dict[str, Any]) -> int:
    """Of each arm, without the first, which is not counted."""
    return len(run["exact"]["losses"]) - 1


def markdown(lines: list[tuple[str, ...]]) -> str:
    head, *body = ("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join((head, "|---|" + "---:|" * (len(lines[0]) - 1), *body))


def tables(shown: list[Row], run: dict[str, Any], untuned: dict[str, Any] | None) -> str:
    steps = f"{_steps(run)} steps" + (f", untuned of {_steps(untuned)}" if untuned else "")
    notes = (
        f"{run['threads']} threads, {run['machine']} with {run['instruction_set']}; median of {steps}. "
        f"The products alone take {run['floor_s']:.2f} s; the low-rank work of our operators takes "
        f"{run['low_rank_s'] / run['low_rank_floor_s']:.2f} times its FLOPs at the products' rate (timed between "
        'the steps and after them). "÷ products" and "÷ ours" compare within one run.'
    )
    columns = (
        "s a step (middle half)",
        "÷ products",
        "÷ ours",
        "peak MiB",
        "page faults",
        "loss off float32's",
    )
    steps_table: list[tuple[str, ...]] = [("arm", *columns)]
    parts_table: list[tuple[str, ...]] = [("seconds of a step", *COLOURS)]
    for row in shown:
        median, (low, high) = row.arm["median_s"], row.arm["quartiles_s"]
        steps_table.append(
            (
                row.label,
                f"{median:.2f} ({low:.2f} to {high:.2f})",
                f"{median / row.floor:.2f}",
                "–" if row.times_ours is None else f"{row.times_ours:.2f}",
                f"{row.arm['peak_mb']:,.0f}",
                f"{row.arm['faults']:,.0f}",
                "–" if row.loss_error is None else f"≤ {row.loss_error:.4f}",
            )
        )
        parts_table.append((row.label, *(f"{row.parts[part]:.2f}" for part in COLOURS)))
    return "\n\n".join((notes, markdown(steps_table), markdown(parts_table)))


def picture(groups: list[list[Row]]) -> Figure:
    """Stacked bars, a group a run, each group under the line of its own run's products."""
    count = sum(len(group) for group in groups)
    height = 0.36 * (count + 0.8 * (len(groups) - 1)) + 1.5
    figure = Figure(figsize=(8.4, height), facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    y, ticks, line = 0.0, [], None
    for group in groups:
        top = y - 0.5
        for row in group:
            left = 0.0
            for part, colour in COLOURS.items():
                width = row.parts[part]
                axes.barh(
                    y, width, 0.72, left, color=colour, edgecolor="white", linewidth=0.4,
                    label=None if ticks else part,
                )  # fmt: skip
                left += width
            axes.annotate(f"{left:.2f} s", (left, y), xytext=(4, 0), textcoords="offset points", va="center")
            ticks.append((y, row.label))
            y += 1
        line = axes.vlines(group[0].floor, top, y - 0.5, colors="black", linestyles="dashed", linewidth=1.2)
        y += 0.8
    if line is not None:
        line.set_label("products alone")
    axes.set_yticks([at for at, _ in ticks], [label for _, label in ticks])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(row.arm["median_s"] for group in groups for row in group))
    axes.set_xlabel("seconds a step")
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def rewrite(page: Path, instruction_set: str, table: str) -> None:
    """Replaces what stands between the instruction set's marks."""
    opening, closing = f"<!-- {instruction_set} -->", f"<!-- /{instruction_set} -->"
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(opening)
    _, end, after = rest.partition(closing)
    if not (begin and end):
        sys.exit(f"{page}: no {opening} followed by {closing}")
    page.write_text(f"{before}{opening}\n{table}\n{closing}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tuned", type=Path, metavar="JSON", help="of step.py --profile --json")
    parser.add_argument(
        "default", type=Path, nargs="?", metavar="JSON", help="the same with --allocator default"
    )
    options = parser.parse_args()
    tuned = load(options.tuned)
    if tuned["allocator"] != "tuned":
        parser.error(f"{options.tuned} is of the {tuned['allocator']} allocator; expected tuned")
    default: dict[str, Any] | None = None
    groups = [rows(tuned, [name for name in LABELS if name in tuned["arms"]])]
    if options.default:
        default = load(options.default)
        if default["allocator"] != "default":
            parser.error(f"{options.default} is of the {default['allocator']} allocator; expected default")
        if any(default[key] != tuned[key] for key in ("threads", "machine", "instruction_set")):
            parser.error(f"{options.default} was not run on the machine and threads of {options.tuned}")
        names = [name for name in LABELS if name in default["arms"] and name.startswith("peft")]
        groups.insert(0, rows(default, names, ", untuned"))

    table = tables([row for group in groups for row in group], tuned, default)
    rewrite(PAGE, tuned["instruction_set"], table)
    with matplotlib.rc_context(STYLE):
        picture(groups).savefig(DOCS / f"{PAGE.stem}-{tuned['instruction_set']}.svg", metadata={"Date": None})
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
