"""The LoRA group on this card, forward and backward, beside PEFT, PEFT compiled, and the vendor library's products.

    python benchmarks/gpu.py [--json runs/gpu.json]

Outputs and gradients of all must agree before any is timed. Without a card it says so and times nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from aletheia_kernels import lora_group
from benchmarks.adapted import RANKS, Siblings
from benchmarks.agreement import assert_agree
from benchmarks.shapes import CARD_SHAPES

QUANTILES = (0.5, 0.25, 0.75)


class Group:
    """Linears of one input with PEFT's adapters, and other ways to compute the same from the same parameters."""

    def __init__(
        self, tokens: int, width: int, outs: Sequence[int], ranks: Sequence[int], device: torch.device
    ) -> None:
        self.peft = Siblings(width, outs).with_peft(ranks, torch.float32).to_empty(device=device)
        with torch.no_grad():
            for parameter in self.peft.parameters():
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        layers: list[Any] = [self.peft.get_submodule(name) for name in self.peft.names]
        self.weights = [layer.base_layer.weight for layer in layers]
        self.lora_As = [layer.lora_A["default"].weight for layer in layers]
        self.lora_Bs = [layer.lora_B["default"].weight for layer in layers]
        self.scalings = [layer.scaling["default"] for layer in layers]
        self.x = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
        self.dys = [torch.randn(tokens, out, device=device).bfloat16() for out in outs]
        self.leaves = [self.x, *self.lora_As, *self.lora_Bs]

    def ours(self, x: Tensor) -> list[Tensor]:
        return lora_group(
            x, self.weights, [None] * len(self.weights), self.lora_As, self.lora_Bs, self.scalings
        )

    def composed(self, x: Tensor) -> list[Tensor]:
        ys = []
        for weight, lora_A, lora_B, scaling in zip(
            self.weights, self.lora_As, self.lora_Bs, self.scalings, strict=True
        ):
            h = linear(x, lora_A.to(x.dtype))
            ys.append(torch.addmm(linear(x, weight), h, lora_B.to(x.dtype).T, alpha=scaling))
        return ys

    def arms(self) -> dict[str, Callable[[Tensor], list[Tensor]]]:
        return {
            "ours": self.ours,
            "PEFT eager": self.peft,
            "PEFT compiled": torch.compile(self.peft, dynamic=False, fullgraph=True),
            "vendor library": self.composed,
        }

    def step(self, arm: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """Outputs, and gradients of the input and the adapters."""
        outputs = arm(self.x)
        return [*outputs, *torch.autograd.grad(outputs, self.leaves, self.dys)]


def time_group(group: Group) -> dict[str, tuple[float, float, float]]:
    """Milliseconds of a forward and backward pass of each arm: median and quartiles."""
    from triton.testing import do_bench

    # Otherwise the compiler gives up on this function after eight shapes, and runs it eagerly.
    torch.compiler.reset()
    arms = group.arms()
    expected = group.step(arms["PEFT eager"])
    for arm in arms.values():
        assert_agree(group.step(arm), expected)
    return {
        name: do_bench(lambda arm=arm: group.step(arm), warmup=50, rep=300, quantiles=QUANTILES)
        for name, arm in arms.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the times to this file")
    wish = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: no card (torch.cuda.is_available() is False), so nothing is timed")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    card = torch.cuda.get_device_name(device)
    table = Table(title=f"{card}: forward and backward, ms (median, middle half)", title_justify="left")
    times: dict[str, Any] = {"card": card, "torch": torch.__version__, "groups": {}}
    for shape in CARD_SHAPES:
        for name, (width, outs) in shape.groups.items():
            for ranks in RANKS:
                torch.manual_seed(0)
                group = Group(shape.tokens, width, outs, RANKS[ranks][name], device)
                times["groups"][f"{shape}/{ranks}/{name}"] = found = time_group(group)
                if not table.columns:
                    for heading in ("group", *found):
                        table.add_column(heading, no_wrap=True)
                cells = (f"{median:.3f} ({low:.3f} to {high:.3f})" for median, low, high in found.values())
                table.add_row(f"{shape} {ranks} {name}", *cells)
                del group
    Console().print(table)
    if wish.json:
        wish.json.parent.mkdir(parents=True, exist_ok=True)
        wish.json.write_text(json.dumps(times, indent=1) + "\n")


if __name__ == "__main__":
    main()
