"""The LoRA group on this card, forward and backward, beside every form of PEFT and the vendor library's products.

    python benchmarks/gpu.py [--json runs/gpu.json]

PEFT takes part with float32 and with bfloat16 adapters, eager and compiled. Outputs and gradients of all must agree
before any is timed; then the arms take turns, a few tens of milliseconds each, so that a card that slows down does so
for all. Without a card it says so and times nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
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

TURNS = 8
# Milliseconds of one turn.
WARMUP, TIMED = 10, 40

Step = Callable[[], list[Tensor]]


class Group:
    """Linears of one input with PEFT's adapters, and other ways to compute the same from the same values."""

    def __init__(
        self, tokens: int, width: int, outs: Sequence[int], ranks: Sequence[int], device: torch.device
    ) -> None:
        self.peft, self.peft_bf16 = (
            Siblings(width, outs).with_peft(ranks, masters).to_empty(device=device)
            for masters in (torch.float32, torch.bfloat16)
        )
        with torch.no_grad():
            for parameter in self.peft.parameters():
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            for rounded, parameter in zip(self.peft_bf16.parameters(), self.peft.parameters(), strict=True):
                rounded.copy_(parameter)
        layers = layers_of(self.peft)
        self.weights = [layer.base_layer.weight for layer in layers]
        self.lora_As, self.lora_Bs = factors_of(self.peft)
        self.scalings = [layer.scaling["default"] for layer in layers]
        self.x = torch.randn(tokens, width, device=device).bfloat16().requires_grad_()
        self.dys = [torch.randn(tokens, out, device=device).bfloat16() for out in outs]

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

    def steps(self, compiler: str = "inductor") -> dict[str, Step]:
        """A forward and a backward pass of each arm: outputs, gradients of the input and of the adapters."""
        rounded_As, rounded_Bs = factors_of(self.peft_bf16)
        rounded = [self.x, *rounded_As, *rounded_Bs]
        masters = [self.x, *self.lora_As, *self.lora_Bs]

        def step(forward: Callable[[Tensor], list[Tensor]], leaves: list[Tensor]) -> Step:
            def run() -> list[Tensor]:
                outputs = forward(self.x)
                return [*outputs, *torch.autograd.grad(outputs, leaves, self.dys)]

            return run

        def compiled(module: nn.Module) -> Any:
            return torch.compile(module, dynamic=False, fullgraph=True, backend=compiler)

        return {
            "ours": step(self.ours, masters),
            "PEFT fp32": step(self.peft, masters),
            "PEFT bf16": step(self.peft_bf16, rounded),
            "PEFT fp32 compiled": step(compiled(self.peft), masters),
            "PEFT bf16 compiled": step(compiled(self.peft_bf16), rounded),
            "vendor library": step(self.composed, masters),
        }


def layers_of(module: Siblings) -> list[Any]:
    """PEFT's layers in the order of the linears."""
    return [module.get_submodule(name) for name in module.names]


def factors_of(module: Siblings) -> tuple[list[Tensor], list[Tensor]]:
    """Every linear's A, and every linear's B."""
    layers = layers_of(module)
    return (
        [layer.lora_A["default"].weight for layer in layers],
        [layer.lora_B["default"].weight for layer in layers],
    )


def time_in_turns(steps: dict[str, Step], time: Callable[[Step], list[float]]) -> dict[str, list[float]]:
    """What ``time`` measures of each step, turn after turn, every step once a turn."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, step in steps.items():
            found[name] += time(step)
    return found


def time_group(group: Group) -> dict[str, tuple[float, float, float]]:
    """Milliseconds of a forward and backward pass of each arm: median and quartiles."""
    from triton.testing import do_bench

    # Otherwise the compiler gives up on this function after eight shapes, and runs it eagerly.
    torch.compiler.reset()
    steps = group.steps()
    expected = steps["PEFT fp32"]()
    for step in steps.values():
        assert_agree(step(), expected)
    times = time_in_turns(steps, lambda step: do_bench(step, warmup=WARMUP, rep=TIMED, return_mode="all"))
    found = {}
    for name, milliseconds in times.items():
        low, median, high = statistics.quantiles(milliseconds, n=4)
        found[name] = (median, low, high)
    return found


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
