"""How many batches a probe needs until its choice of layers is steady: every score, several seeds of the batches.

    python benchmarks/studies/probe_batches.py runs/demo-cache/SmolLM2-135M-Instruct \\
        runs/studies/code-train.jsonl --out runs/races/probe-code

The batches are those that a race's probe draws: 4 examples each, drawn anew by every seed. Two seeds agree in the share
of the layers that both choose; two blind choices of half the layers share a half of them. Each probe is kept in the
output directory as it ends, so a study that was stopped goes on; `tables.py DIR` takes it into docs/studies.md.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from aletheia_tune import files
from aletheia_tune.data import batches, load_examples, pad_token_id
from aletheia_tune.environment import machine_facts
from aletheia_tune.layers import positions_of
from aletheia_tune.loading import load_model
from aletheia_tune.probe import probe_all
from aletheia_tune.recipe import Recipe

FORMAT = "aletheia-probe-batches"
METHODS = ("aletheia", "fisher", "saliency", "energy", "activation", "cka")
COUNTS = (1, 2, 5, 10)
SEEDS = (0, 1, 2)
BATCH_SIZE = Recipe.probe_batch_size
MAX_LENGTH = 512


def measure(model_path: str, train: str, out: Path) -> dict[str, Any]:
    """Every probe that is not there yet; then all of them as one result."""
    console = Console(stderr=True)
    out.mkdir(parents=True, exist_ok=True)
    wanted = {
        (seed, count): out / f"seed-{seed}-batches-{count}.json" for seed, count in product(SEEDS, COUNTS)
    }
    missing = {key: place for key, place in wanted.items() if not place.is_file()}
    if missing:
        model, tokenizer = load_model(model_path)
        positions = positions_of(model)
        examples = load_examples(train, tokenizer, max_length=MAX_LENGTH, positions=positions)
        left, done, started = sum(count for _, count in missing), 0, time.perf_counter()
        for (seed, count), place in missing.items():
            chosen = batches(
                examples,
                BATCH_SIZE,
                pad_token_id(tokenizer),
                seed=seed,
                count=count,
                positions=positions,
            )
            found = probe_all(model, chosen, METHODS, seed=seed)
            scores = {
                name: {"layers": list(one.layers), "stability": one.meta["stability"]}
                for name, one in found.items()
            }
            files.write_text(place, json.dumps(scores), overwrite=True)
            done += count
            rest = (time.perf_counter() - started) / done * (left - done)
            console.print(
                f"seed {seed}, {count} batches: {done} of {left} batches, {rest:,.0f} s left", highlight=False
            )
    return {
        "format": FORMAT,
        "machine": dict(machine_facts()),
        "model": Path(model_path).name,
        "train": Path(train).name,
        "batch_size": BATCH_SIZE,
        "probes": [
            {"seed": seed, "batches": count, "scores": json.loads(place.read_text(encoding="utf-8"))}
            for (seed, count), place in wanted.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("--out", type=Path, required=True)
    wanted = parser.parse_args()
    result = measure(wanted.model, wanted.train, wanted.out)
    files.write_text(wanted.out / "verdict.json", json.dumps(result, indent=1) + "\n", overwrite=True)


if __name__ == "__main__":
    main()
