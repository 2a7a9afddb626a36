"""A plan as a picture for a terminal: a row for each layer with its score as a bar and the rank of each module."""

from __future__ import annotations

from collections import Counter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from aletheia_tune.errors import UserError
from aletheia_tune.plan import Plan

MOST_LAYERS = 1000
# Wider bars say no more; narrower ones no longer tell layers apart.
_WIDEST, _NARROWEST = 40, 8
_LEFT_OUT = "-"
_ENDING = "_proj"
_IN_FULL = "full"
# More ranks than these are told by the lowest and the highest.
_FEW = 3
_NO_GRAPH = "no graph"


def draw(plan: Plan, console: Console) -> None:
    """Print the plan, layer 0 at the top, as wide as the console.

    A full bar is an adapted layer, a dotted one is left out, and both are as long as the layer's score; there are none
    for a plan that was made without scores. Every column of ranks is a module of the layer, "-" where it has no
    adapter, "full" where its own weight is trained. Where the columns do not fit there is one, with the lowest and the
    highest rank. The layers under the lowest adapter are marked "no graph": nothing of them is kept for the backward
    pass, which ends above them. Colour repeats what the characters say.

    Raises:
        UserError: a plan of more than `MOST_LAYERS` layers.
    """
    if plan.num_layers > MOST_LAYERS:
        raise UserError(f"the plan has {plan.num_layers:,} layers: more than {MOST_LAYERS:,} are not drawn")
    full, dotted = ("#", ".") if console.options.ascii_only else ("█", "░")
    scores = plan.layer_scores
    ranks = _ranks(plan)
    lowest = min(plan.layers)
    columns = _columns(ranks)
    fixed = len("layer") + (2 + 9 if scores else 0) + (2 + len(_NO_GRAPH) if lowest else 0)
    least = fixed + (2 + _NARROWEST if scores else 0)
    if least + sum(2 + width for width in columns.values()) > console.width:
        ranks = {layer: {"rank": _range(of)} for layer, of in ranks.items()}
        columns = _columns(ranks)
    room = console.width - fixed - sum(2 + width for width in columns.values()) - 2
    width = max(min(room, _WIDEST), 1)

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    table.add_column("layer", justify="right", no_wrap=True)
    if scores:
        table.add_column("score", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, min_width=width)
    for name in columns:
        table.add_column(Text(name), justify="right", no_wrap=True)
    if lowest:
        table.add_column("", no_wrap=True)
    highest = max(scores) if scores else 0.0
    for layer in range(plan.num_layers):
        adapted = layer in ranks
        style = "" if adapted else "dim"
        cells = [Text(str(layer), style)]
        if scores:
            length = max(round(width * scores[layer] / highest), 1) if scores[layer] > 0 else 0
            bar = Text((full if adapted else dotted) * length, "cyan" if adapted else "dim")
            cells += [Text(f"{scores[layer]:#.4g}", style), bar]
        cells += [Text(ranks.get(layer, {}).get(name, _LEFT_OUT), style) for name in columns]
        if lowest:
            cells.append(Text(_NO_GRAPH if layer < lowest else "", "dim"))
        table.add_row(*cells)
    console.print(table)
    for line in _legend(plan, full if scores else "", dotted, lowest):
        console.print(Text(line), soft_wrap=False)


def _ranks(plan: Plan) -> dict[int, dict[str, str]]:
    """By layer and module, only where there is an adapter; of names that all end in "_proj", what is before it."""
    places = {name: (layer, _printable(short)) for name, (layer, short) in plan.places().items()}
    if all(short.endswith(_ENDING) for _, short in places.values()):
        places = {name: (layer, short.removesuffix(_ENDING)) for name, (layer, short) in places.items()}
    ranks: dict[int, dict[str, str]] = {}
    for name, module in plan.modules.items():
        layer, short = places[name]
        ranks.setdefault(layer, {})[short] = str(module.rank)
    for name in plan.full:
        layer, short = places[name]
        ranks.setdefault(layer, {})[short] = _IN_FULL
    return ranks


def _columns(ranks: dict[int, dict[str, str]]) -> dict[str, int]:
    """Every module's name in the order of the first layer that has most, and the width of its column."""
    widths: dict[str, int] = {}
    for of in sorted(ranks.values(), key=len, reverse=True):
        for name, rank in of.items():
            widths[name] = max(widths.get(name, len(name)), len(rank))
    return widths


def _range(of: dict[str, str]) -> str:
    ranks = sorted((rank for rank in of.values() if rank != _IN_FULL), key=int)
    told = [ranks[0] if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"] if ranks else []
    return ", ".join([*told, *([_IN_FULL] if len(ranks) < len(of) else [])])


def _legend(plan: Plan, full: str, dotted: str, lowest: int) -> list[str]:
    counts = Counter(module.rank for module in plan.modules.values())
    if len(counts) <= _FEW:
        ranks = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(counts.items()))
    else:
        ranks = f"ranks {min(counts)} to {max(counts)}"
    in_full = f", {len(plan.full)} trained in full" if plan.full else ""
    lines = [f"{len(plan.layers)} of {plan.num_layers} layers, {len(plan.modules)} modules: {ranks}{in_full}"]
    if full:
        lines.insert(0, f"{full * 2} adapted   {dotted * 2} left out   {_LEFT_OUT} no adapter")
    if lowest:
        under = "layer 0 runs" if lowest == 1 else f"layers 0 to {lowest - 1} run"
        lines.append(f"{under} without a graph: the backward pass ends at layer {lowest}")
    return lines


def _printable(text: str) -> str:
    """A name from a file, without what a terminal would obey."""
    return "".join(character if character.isprintable() else "?" for character in text)
