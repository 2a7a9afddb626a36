"""Measures on this card where a whole LoRA projection as one kernel is faster, and keeps the choice for later runs.

    python benchmarks/tune.py

Otherwise the base product is the vendor library's and the low-rank part a kernel of its own. Shapes are those of
:mod:`benchmarks.shapes`; others are served without the one kernel. Without a card it says so and measures nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from aletheia_kernels.triton import lora, lora_fused, tuned
from aletheia_kernels.triton.cards import Card
from benchmarks.adapted import RANKS
from benchmarks.agreement import assert_agree
from benchmarks.shapes import CARD_SHAPES

# A gain below this is noise from one run to the next.
LEAST_GAIN = 1.03


class Projections:
    """The tensors of one group, and both ways to its outputs from a low-rank product that is already there."""

    def __init__(
        self, tokens: int, width: int, outs: tuple[int, ...], ranks: tuple[int, ...], device: torch.device
    ) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).div(shape[-1] ** 0.5)

        self.x = draw(tokens, width).bfloat16()
        self.weights = [draw(out, width).bfloat16() for out in outs]
        self.lora_As = [draw(rank, width) for rank in ranks]
        self.lora_Bs = [draw(out, rank) for out, rank in zip(outs, ranks, strict=True)]
        self.scalings = [2.0] * len(outs)
        self.h = lora.shrink(self.x, self.lora_As, 0.0, None)

    def composed(self) -> list[Tensor]:
        ys = [linear(self.x, weight) for weight in self.weights]
        lora.expand(self.h, self.lora_Bs, self.scalings, ys)
        return ys

    def fused(self, blocks: dict[str, int]) -> list[Tensor]:
        biases = [None] * len(self.weights)
        return lora_fused.fused_forward(
            self.x, self.weights, biases, self.h, self.lora_Bs, self.scalings, blocks
        )


def tune(projections: Projections, card: Card) -> tuple[float, float, dict[str, int]]:
    """Milliseconds of the composed form and of the best kernel; its block sizes, empty where it gains nothing."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    expected = projections.composed()
    composed = do_bench(projections.composed, return_mode="median")
    best, chosen = float("inf"), {}
    for blocks in lora_fused.candidates(card, projections.x.dtype):
        try:
            assert_agree(projections.fused(blocks), expected)
        except OutOfResources:
            continue
        time = do_bench(lambda blocks=blocks: projections.fused(blocks), return_mode="median")
        if time < best:
            best, chosen = time, blocks
    return composed, best, chosen if best * LEAST_GAIN < composed else {}


def main() -> None:
    if not torch.cuda.is_available():
        print("benchmarks/tune.py: no card (torch.cuda.is_available() is False), so nothing is measured")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    card, name = Card.of(device), tuned.card_name(device)
    table = Table("group", "composed ms", "one kernel ms", "chosen", title=name, title_justify="left")
    choices = {}
    for shape in CARD_SHAPES:
        for group, (width, outs) in shape.groups.items():
            for ranks in RANKS:
                projections = Projections(shape.tokens, width, outs, RANKS[ranks][group], device)
                composed, best, chosen = tune(projections, card)
                key = lora_fused.key(projections.x, projections.weights, projections.lora_As)
                choices[key] = chosen
                blocks = " × ".join(str(size) for size in chosen.values()) or "composed"
                table.add_row(f"{shape} {ranks} {group}", f"{composed:.3f}", f"{best:.3f}", blocks)
                del projections
    tuned.save(name, choices)
    Console().print(table)
    print(f"kept in {tuned.path(name)}")


if __name__ == "__main__":
    main()
