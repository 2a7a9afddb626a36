"""Step times of plans that the cost model has never seen, predicted and measured.

Task R1's shape: SmolLM2-135M, 4 sequences of 512 random tokens, the second half of each labelled, bf16, AdamW. The
calibration's own handful of plans and 12 others, of other depths, ranks and modules, are timed in turn, so that what
slows the machine slows both; the prices are fitted to the former alone and predict the latter. The mean error has to
be 10 % or less.

    python benchmarks/cost_model.py runs/demo-cache/SmolLM2-135M-Instruct --json cost_model.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from aletheia_kernels import tune_allocator
from aletheia_tune.cost import (
    Batch,
    ModelShape,
    calibration_plans,
    fit,
    interleaved,
    predict,
    timed_plans,
)
from aletheia_tune.loading import load_model
from aletheia_tune.plan import ModulePlan, Plan

ALLOWED = 0.10


def unseen_plans(shape: ModelShape) -> dict[str, Plan]:
    """Twelve plans by layers, kinds of module and ranks; none is one of the calibration's."""
    count = shape.num_layers

    def plan(
        layers: Iterable[int], rank: int, ends: tuple[str, ...] = (), kind: str = "", other: int = 0
    ) -> Plan:
        """``rank`` where the name's end or the kind fits (or neither is given), ``other`` elsewhere."""
        chosen, modules = set(layers), {}
        for name, module in shape.modules.items():
            fits = name.endswith(ends) if ends else kind in ("", module.kind)
            own = rank if fits else other
            if module.layer in chosen and own:
                modules[name] = ModulePlan(own, 2.0 * own)
        return Plan(modules, count, shape.layer_path)

    everywhere = range(count)
    return {
        "all layers, rank 8": plan(everywhere, 8),
        "all layers, rank 32": plan(everywhere, 32),
        "all layers, attention 8, MLP 48": plan(everywhere, 8, kind="attention", other=48),
        "all layers, q and v, rank 16": plan(everywhere, 16, ("q_proj", "v_proj")),
        "all layers, MLP only, rank 16": plan(everywhere, 16, kind="mlp"),
        "every other layer, rank 16": plan(range(0, count, 2), 16),
        "upper two thirds, rank 16": plan(range(count // 3, count), 16),
        "upper third, rank 64": plan(range(count - count // 3, count), 64),
        "upper half, attention only, rank 32": plan(range(count // 2, count), 32, kind="attention"),
        "top layer, rank 16": plan([count - 1], 16),
        "middle third, rank 24": plan(range(count // 3, count - count // 3), 24),
        "upper 0.8, down projections, rank 128": plan(range(count // 5, count), 128, ("down_proj",)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model_dir")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of every plan")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    tune_allocator()
    model, _ = load_model(options.model_dir)
    batch = Batch(options.batch, options.length)
    shape = ModelShape.of(model)
    known, plans = calibration_plans(shape), unseen_plans(shape)
    assert not any(plan.modules == seen.modules for plan in plans.values() for seen in known.values())
    with timed_plans(model, [*known.values(), *plans.values()], batch) as timed:
        kept = [each.kept_bytes() for each in timed[: len(known)]]
        records = interleaved(timed, options.rounds)
    calibration = fit(shape, batch, known, records[: len(known)], kept)

    rows = []
    for (name, plan), record in zip(plans.items(), records[len(known) :], strict=True):
        predicted = predict(plan, calibration)
        measured = statistics.median(phases.seconds for phases in record)
        rows.append(
            {
                "plan": name,
                "predicted_s": predicted.seconds,
                "measured_s": measured,
                "samples_s": [phases.seconds for phases in record],
                "error": predicted.seconds / measured - 1,
                "parts_s": predicted.seconds_by_part,
                "bytes": predicted.bytes,
            }
        )
    mean = statistics.mean(abs(row["error"]) for row in rows)
    table = Table(title=f"{options.batch} x {options.length} tokens: seconds a step")
    for column in ("plan", "predicted", "measured", "error"):
        table.add_column(column, justify="left" if column == "plan" else "right")
    for row in rows:
        table.add_row(
            row["plan"], f"{row['predicted_s']:.3f}", f"{row['measured_s']:.3f}", f"{row['error']:+.1%}"
        )
    console = Console(width=100, highlight=False)
    console.print(table)
    console.print(f"mean error {mean:.1%} on {len(rows)} plans never calibrated on (allowed {ALLOWED:.0%})")
    if options.json:
        result = {"mean_error": mean, "plans": rows, "calibration": json.loads(calibration.to_json())}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if mean <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
