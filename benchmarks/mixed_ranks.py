"""What unequal ranks cost: q, k, v of ranks 8, 64, 16 against what uniform 16 and uniform 64 would have them cost.

    python benchmarks/mixed_ranks.py [--rounds N]

Time grows with a group's adapter parameters, Σ rank (in + out). The line through the uniform groups of the same shapes,
taken in turn in one run, says what the mixed group should take: a ratio above 1 is paid for the ranks being unequal.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from aletheia_kernels import tune_allocator
from benchmarks.shapes import PASSES, SHAPES, Shape
from benchmarks.test_lora_group import MIXED, Case, Group

RANKS = ((16, 16, 16), MIXED["qkv"], (64, 64, 64))


def passes(group: Group) -> dict[str, Callable[[], object]]:
    def backward(outputs: object) -> object:
        return torch.autograd.grad(outputs, group.leaves, group.dys, retain_graph=True)

    def forward() -> object:
        with torch.no_grad():
            return group.ours()

    kept = group.ours()
    return dict(zip(PASSES, (forward, lambda: backward(kept), lambda: backward(group.ours())), strict=True))


def seconds(shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Per pass, the fastest of each rank choice, taken in turn."""
    groups = [passes(Group(Case(shape, "qkv", ranks))) for ranks in RANKS]
    taken: dict[str, list[list[float]]] = {which: [[] for _ in RANKS] for which in PASSES}
    for _ in range(rounds):
        for which in PASSES:
            for index, group in enumerate(groups):
                start = time.perf_counter()
                group[which]()
                taken[which][index].append(time.perf_counter() - start)
    return {which: [min(times) for times in each] for which, each in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    tune_allocator()
    table = Table(title=f"lora_group on q, k, v, {torch.get_num_threads()} threads: ms, fastest of {rounds}")
    for column in ("model", "pass", "16,16,16", "8,64,16", "64,64,64", "expected", "ratio"):
        table.add_column(column, justify="left" if column in ("model", "pass") else "right")
    for shape in SHAPES:
        low, mixed, high = (Case(shape, "qkv", ranks).parameters for ranks in RANKS)
        for which, (t_low, t_mixed, t_high) in seconds(shape, rounds).items():
            expected = t_low + (t_high - t_low) * (mixed - low) / (high - low)
            figures = [f"{1e3 * t:.2f}" for t in (t_low, t_mixed, t_high, expected)]
            table.add_row(shape.name, which, *figures, f"{t_mixed / expected:.3f}")
    Console(width=110, highlight=False).print(table)


if __name__ == "__main__":
    main()
