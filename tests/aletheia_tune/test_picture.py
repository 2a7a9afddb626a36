"""The picture of a plan in a terminal: what its characters say without colour, at 80 columns and at fewer."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from aletheia_tune.errors import UserError
from aletheia_tune.picture import MOST_LAYERS, draw
from aletheia_tune.plan import ModulePlan, Plan

MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
SCORES = [1.0, 3.0, 2.0, 4.0, 0.5, 8.0]


def plan(layers=(2, 3, 5), names=MODULES, scores=SCORES, num_layers=6, **meta) -> Plan:
    """Rank 4 at the first module of a layer, 8 at the next, and so on; layer 3 has no mlp.down_proj."""
    modules = {
        f"model.layers.{layer}.{name}": ModulePlan(4 * (index + 1), 8.0)
        for layer in layers
        for index, name in enumerate(names)
        if (layer, name) != (3, "mlp.down_proj")
    }
    known = {} if scores is None else {"layer_scores": scores}
    return Plan(modules, num_layers, "model.layers", meta={**known, **meta})


def drawn(of: Plan, width: int = 80, **options) -> str:
    stream = io.StringIO()
    draw(of, Console(file=stream, width=width, **options))
    return stream.getvalue()


def rows(text: str) -> dict[int, list[str]]:
    """The cells of each layer's row."""
    found = (re.match(r" *(\d+)  (.*)", line) for line in text.splitlines())
    return {int(row[1]): row[2].split() for row in found if row}


def test_a_row_a_layer_with_its_score_its_bar_and_its_ranks():
    text = drawn(plan())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["layer", "score", "q", "k", "v", "o", "gate", "up", "down"]
    cells = rows(text)
    assert list(cells) == list(range(6))
    ranks = ["4", "8", "12", "16", "20", "24"]
    assert cells[5][0] == "8.000"
    assert cells[5][2:] == [*ranks, "28"]
    assert cells[3][2:] == [*ranks, "-"]
    assert cells[4][2:] == ["-"] * 7
    bars = {layer: row[1] for layer, row in cells.items()}
    assert {layer: set(bar) for layer, bar in bars.items()} == {
        layer: {"█" if layer in (2, 3, 5) else "░"} for layer in range(6)
    }
    longest = len(bars[5])
    assert longest >= 8
    assert [len(bars[layer]) for layer in range(6)] == [round(longest * score / 8) for score in SCORES]


def test_the_ranks_are_summed_up():
    assert "3 of 6 layers, 20 modules: ranks 4 to 28" in drawn(plan())
    assert "1 of 6 layers, 2 modules: 1 of rank 4, 1 of rank 8" in drawn(plan(layers=[2], names=MODULES[:2]))


def test_the_layers_under_the_lowest_adapter_are_marked():
    text = drawn(plan())
    marked = [line for line in text.splitlines() if line.rstrip().endswith("no graph")]
    assert [int(line.split()[0]) for line in marked] == [0, 1]
    assert "layers 0 to 1 run without a graph: the backward pass ends at layer 2" in text
    everywhere = drawn(plan(layers=range(6)))
    assert "graph" not in everywhere


def test_a_pipe_gets_no_escape_and_no_color_is_obeyed(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert "\x1b" not in drawn(plan())
    coloured = drawn(plan(), force_terminal=True, color_system="standard")
    assert "\x1b[36m" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    without = drawn(plan(), force_terminal=True, color_system="standard")
    assert not re.search(r"\x1b\[[\d;]*(3|4|9|10)\d[\d;]*m", without)
    assert re.sub(r"\x1b\[[\d;]*m", "", without) == drawn(plan())


@pytest.mark.parametrize("width", [40, 48, 60, 80, 132])
def test_it_fits_where_it_is_shown(width):
    text = drawn(plan(), width)
    assert max(map(len, text.splitlines()[:7])) <= width
    assert set(rows(text)) == set(range(6))
    if width < 60:
        assert rows(text)[5][2:] == ["4", "to", "28"]
        assert rows(text)[4][2:] == ["-"]


def test_where_only_ascii_can_be_written():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    draw(plan(), Console(file=stream, width=80))
    stream.seek(0)
    text = stream.read()
    assert "#####" in text
    assert "...." in text


@pytest.mark.parametrize("scores", [None, [1.0], "abcdef", [1.0, None, 2.0, 3.0, 4.0, 5.0]])
def test_without_a_score_for_each_layer_there_are_no_bars(scores):
    text = drawn(plan(scores=scores))
    assert not set("█░") & set(text)
    assert rows(text)[2] == ["4", "8", "12", "16", "20", "24", "28"]


def test_scores_of_zero_and_below_draw_nothing():
    assert "░" not in drawn(plan(scores=[0.0] * 6)).split("adapted")[0].rpartition("\n")[0]
    assert rows(drawn(plan(scores=[-1.0, 3.0, 2.0, 4.0, 0.5, 8.0])))[0][0] == "-1.000"


def test_names_that_end_alike_are_told_apart():
    text = drawn(plan(names=("attn.c_attn", "attn.c_proj", "mlp.c_proj")))
    assert text.split()[2:5] == ["c_attn", "attn.c_proj", "mlp.c_proj"]


def test_what_a_terminal_would_obey_is_not_passed_on():
    text = drawn(plan(names=("mlp.\x1b]0;owned\x07up", "mlp.[red]down")))
    assert not set("\x1b\x07") & set(text)
    assert "?]0;owned?up" in text
    assert "[red]down" in text


def test_too_many_layers_are_refused():
    with pytest.raises(UserError, match="are not drawn"):
        drawn(plan(scores=None, num_layers=MOST_LAYERS + 1))
