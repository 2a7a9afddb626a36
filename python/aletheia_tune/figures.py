"""Figures for pages: matplotlib drawings as inline SVG in the page's own font and colours.

Every colour is drawn as a marker value and becomes a CSS variable in the SVG, so that one drawing serves the
light and the dark page. The variables that the page must define are those of `CSS_VARIABLES`.
"""

from __future__ import annotations

import io
import itertools
import re
import statistics
import xml.etree.ElementTree as ElementTree
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

# 4.2 in = 302 pt: less than the column of a phone, so that text grows there too.
_WIDTH_INCHES = 4.2
_ROW_POINTS = 13.0

# Marker colours, one per CSS variable: values that nothing else in a drawing has.
_INK, _MUTED, _GRID, _CHOSEN, _REST, _CELL, _PAGE = (f"#0{i}0a0b" for i in range(7))
_ARMS = tuple(f"#1{i}0a0b" for i in range(6))
MOST_CURVES = len(_ARMS)
CSS_VARIABLES: dict[str, str] = {
    _INK: "--ink",
    _MUTED: "--muted",
    _GRID: "--grid",
    _CHOSEN: "--chosen",
    _REST: "--rest",
    _CELL: "--cell",
    _PAGE: "--page",
    **{marker: f"--arm-{i}" for i, marker in enumerate(_ARMS)},
}
# The report's light colours, for a figure without a page.
_LIGHT = {
    "--ink": "#1b1e23",
    "--muted": "#5b626d",
    "--grid": "#d5d9df",
    "--arm-0": "#4a4f57",
    "--arm-1": "#d55e00",
    "--arm-2": "#0072b2",
}
_DASHES: tuple[tuple[float, tuple[float, ...]], ...] = (
    (0, ()),
    (0, (5, 2)),
    (0, (1.5, 1.5)),
    (0, (6, 2, 1.5, 2)),
    (0, (8, 3)),
    (0, (3, 1, 1, 1)),
)
_MARKERS = ("o", "s", "^", "D", "v", "P")

_STYLE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "aletheia",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "text.color": _INK,
    "xtick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.color": _MUTED,
    "ytick.labelcolor": _INK,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Curve:
    """One arm's line: ``x`` and ``loss`` of equal length, in the order drawn."""

    name: str
    x: Sequence[float]
    loss: Sequence[float]


def score_bars(scores: Sequence[float], chosen: Sequence[int], *, label: str) -> str:
    """Bars of ``scores`` by layer, layer 0 at the top; the layers in ``chosen`` are stronger and starred."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _layer_rows(len(scores))
        marked = set(chosen)
        for layer, score in enumerate(scores):
            colour = _CHOSEN if layer in marked else _REST
            axes.barh(layer, score, height=0.72, color=colour, linewidth=0)
            if layer in marked:
                axes.annotate(
                    "★", (score, layer), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8
                )
        axes.set_xlim(0, max(scores, default=1.0) * 1.08 or 1.0)
        axes.set_xlabel("score")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        return _inline_svg(figure, label)


def rank_grid(ranks: dict[tuple[int, str], int], num_layers: int, *, label: str) -> str:
    """A grid of LoRA ranks, layers down, modules across; ``ranks[layer, module]`` only where there is one."""
    columns = list(dict.fromkeys(module for _, module in ranks))
    largest = max(ranks.values(), default=1)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _layer_rows(num_layers)
        for layer, (column, module) in itertools.product(range(num_layers), enumerate(columns)):
            rank = ranks.get((layer, module))
            corner, side = (column - 0.46, layer - 0.44), (0.92, 0.88)
            if rank is None:
                axes.add_patch(Rectangle(corner, *side, facecolor="none", edgecolor=_GRID, linewidth=0.6))
                continue
            # The tint stays pale enough for the number on it to be read on both pages.
            tint = 0.15 + 0.4 * rank / largest
            axes.add_patch(Rectangle(corner, *side, facecolor=_CELL, alpha=tint, linewidth=0))
            axes.text(column, layer, str(rank), ha="center", va="center_baseline", fontsize=8.5)
        axes.set_xlim(-0.6, max(len(columns), 1) - 0.4)
        axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
        axes.tick_params(axis="both", length=0)
        axes.spines[:].set_visible(False)
        return _inline_svg(figure, label)


def loss_curves(
    curves: Sequence[Curve], *, x_label: str, y_label: str, label: str, target: float | None = None
) -> str:
    """Lines of loss against ``x``, told apart by colour, dash and marker alike, and a level that they are to reach.

    At most `MOST_CURVES`.
    """
    if len(curves) > MOST_CURVES:
        raise ValueError(f"{len(curves)} curves in one figure; {MOST_CURVES} can be told apart")
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, 3.3), layout="constrained")
        axes = figure.subplots()
        for i, curve in enumerate(curves):
            # Arms that learn alike lie on each other: earlier ones are drawn wider, to show from beneath.
            width = 1.6 + 1.6 * (len(curves) - 1 - i) / max(len(curves) - 1, 1)
            axes.plot(
                curve.x,
                curve.loss,
                color=_ARMS[i],
                linestyle=_DASHES[i],
                linewidth=width,
                marker=_MARKERS[i],
                markersize=width + 3,
                label=curve.name,
            )
        if target is not None:
            axes.axhline(target, color=_MUTED, linewidth=1, linestyle=(0, (2, 2)), label="target")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        axes.grid()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
        figure.legend(loc="outside upper left", ncols=1, fontsize=10, handlelength=3.2, borderaxespad=0)
        return _inline_svg(figure, label)


def loss_strips(rows: Sequence[tuple[str, Sequence[float]]], *, x_label: str, label: str) -> str:
    """A row for each named arm, the first at the top, with a mark for each of its losses and a bar at their mean."""
    with matplotlib.rc_context(_STYLE):
        height = 0.26 * len(rows) + 0.7
        figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
        axes = figure.subplots()
        for row, (_, losses) in enumerate(rows):
            axes.plot(losses, [row] * len(losses), color=_ARMS[2], marker="o", markersize=5, linestyle="none")
            mean = statistics.fmean(losses)
            axes.plot([mean, mean], [row - 0.32, row + 0.32], color=_ARMS[0], linewidth=2)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(x_label)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        return _inline_svg(figure, label)


def step_parts(rows: Sequence[tuple[str, Mapping[str, float]]], *, label: str) -> str:
    """For each named arm, the first at the top, a bar of its step's seconds by part, and the name above the bar."""
    parts = list(dict.fromkeys(part for _, seconds in rows for part in seconds))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, 0.55 * len(rows) + 1.0), layout="constrained")
        axes = figure.subplots()
        lefts = [0.0] * len(rows)
        for part, colour in zip(parts, (_ARMS[2], _ARMS[1], _ARMS[0]), strict=True):
            widths = [seconds.get(part, 0.0) for _, seconds in rows]
            # A gap in the page's own colour, so that parts are told apart without theirs.
            axes.barh(range(len(rows)), widths, left=lefts, height=0.4, color=colour, label=part)
            lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
            axes.vlines(
                lefts,
                [row - 0.2 for row in range(len(rows))],
                [row + 0.2 for row in range(len(rows))],
                color=_PAGE,
                linewidth=1.5,
            )
        for row, (name, _) in enumerate(rows):
            axes.annotate(name, (0, row - 0.24), xytext=(1, 0), textcoords="offset points", va="bottom")
        axes.set_ylim(len(rows) - 0.6, -0.75)
        axes.set_xlim(0, max(lefts, default=1.0) * 1.02 or 1.0)
        axes.set_yticks([])
        axes.set_xlabel("seconds of a step")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        figure.legend(loc="outside upper left", ncols=3, fontsize=10, handlelength=1.2, borderaxespad=0)
        return _inline_svg(figure, label)


def frontier(points: Sequence[tuple[float, float]], *, chosen: tuple[float, float] | None, label: str) -> str:
    """Score kept over step time, both in shares of the uniform plan's; ``chosen`` is starred."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_INCHES, 3.0), layout="constrained")
        axes = figure.subplots()
        costs, kept = zip(*sorted(points), strict=True)
        axes.plot(costs, kept, color=_ARMS[2], linewidth=1.6, marker="o", markersize=4)
        axes.plot([1.0], [1.0], color=_ARMS[0], marker="s", markersize=6, linestyle="none")
        axes.annotate("uniform", (1.0, 1.0), xytext=(-6, -12), textcoords="offset points", ha="right")
        if chosen is not None:
            axes.annotate("★", chosen, ha="center", va="center", fontsize=15, color=_ARMS[1])
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("predicted step time, share of uniform's")
        axes.set_ylabel("score kept")
        axes.set_ylim(bottom=0)
        axes.grid()
        axes.spines[["top", "right"]].set_visible(False)
        return _inline_svg(figure, label)


def standalone(svg: str) -> str:
    """An inline figure as a file of its own: in its namespace, with the colours of the light page."""
    variables = ";".join(f"{variable}:{colour}" for variable, colour in _LIGHT.items())
    style = f"<style>svg{{{variables};background:#ffffff}} text{{font-family:system-ui,sans-serif}}</style>"
    head, end, body = svg.partition(">")
    return head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1) + end + style + body + "\n"


def _layer_rows(num_layers: int) -> tuple[Figure, Axes]:
    # One row height for every figure of layers: side by side, their rows line up.
    height = num_layers * _ROW_POINTS / 72
    margins = {"left": 0.5, "right": 0.15, "bottom": 0.75, "top": 0.1}  # inches
    total = height + margins["bottom"] + margins["top"]
    figure = Figure(figsize=(_WIDTH_INCHES, total))
    axes = figure.add_axes(
        (
            margins["left"] / _WIDTH_INCHES,
            margins["bottom"] / total,
            1 - (margins["left"] + margins["right"]) / _WIDTH_INCHES,
            height / total,
        )
    )
    axes.set_ylim(num_layers - 0.5, -0.5)
    axes.set_yticks(range(num_layers), [str(layer) for layer in range(num_layers)], fontsize=8.5)
    axes.set_ylabel("layer", labelpad=7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _inline_svg(figure: Figure, label: str) -> str:
    """The figure as an ``<svg>`` element for an HTML page: named for screen readers, identifiers unique by
    its label, no namespace, metadata or style sheet of its own."""
    stream = io.StringIO()
    FigureCanvasSVG(figure).print_svg(stream)
    root = ElementTree.fromstring(stream.getvalue())
    prefix = f"f{zlib.crc32(label.encode()):08x}-"
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name in list(element.attrib):
            value = element.attrib.pop(name)
            if name == "id":
                value = prefix + value
            elif name.endswith("href"):
                value = "#" + prefix + value.removeprefix("#")
            element.set(name.rpartition("}")[2], re.sub(r"url\(#", f"url(#{prefix}", value))
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag in ("metadata", "style")]:
            parent.remove(child)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    svg = ElementTree.tostring(root, encoding="unicode")
    for marker, variable in CSS_VARIABLES.items():
        svg = svg.replace(marker, f"var({variable})")
    return svg
