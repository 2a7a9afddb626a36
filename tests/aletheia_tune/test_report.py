"""The page of a race: it stands alone, says what the race found, and reads without seeing the figures."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from aletheia_tune import figures, report
from aletheia_tune.environment import machine_facts
from aletheia_tune.errors import UserError
from aletheia_tune.metrics import EvalRecord
from aletheia_tune.plan import make_plan
from aletheia_tune.race import ArmResult, RaceResult
from aletheia_tune.report import write_report
from aletheia_tune.scores import ModuleScore, Scores
from aletheia_tune.worth import Tariff
from tests import race_case
from tests.race_case import LAYERS


@pytest.fixture
def scores() -> Scores:
    return race_case.scores()


@pytest.fixture
def result() -> RaceResult:
    return race_case.result()


class Page(HTMLParser):
    """Text, attributes and the nesting of a page; fails on tags that do not match."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.cells: list[str] = []
        self.styles: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles.append(data)
            return
        self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def write(tmp_path, result: RaceResult, **kwargs) -> str:
    path = tmp_path / "report.html"
    options = {"title": "T", "question": "Q & A?", "commands": ["make run", "aletheia plan --layers 50%"]}
    write_report(path, result, **{**options, **kwargs})
    return path.read_text(encoding="utf-8")


@pytest.fixture
def html(tmp_path, result) -> str:
    return write(tmp_path, result, facts=machine_facts())


@pytest.fixture
def page(html) -> Page:
    return Page(html)


def test_nothing_is_fetched_and_nothing_runs(page):
    fetched = {"src", "srcset", "data", "poster", "action", "background", "xlink:href"}
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base"}
        assert not fetched & set(attributes)
        assert not [name for name in attributes if name.startswith("on")]
        if "href" in attributes:
            assert attributes["href"].startswith("#")
        for value in attributes.values():
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target.startswith("#")
    css = "".join(page.styles)
    assert css
    assert "@import" not in css
    assert "url(" not in css


def test_identifiers_are_unique_and_references_meet_one(page):
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    references = {attributes["href"][1:] for _, attributes in page.elements if "href" in attributes}
    for _, attributes in page.elements:
        for value in attributes.values():
            references.update(re.findall(r"url\(#([^)]*)\)", value or ""))
    assert references
    assert references <= set(identifiers)


def test_every_figure_has_a_name_and_text_that_is_text(page):
    labels = [attributes.get("aria-label") for tag, attributes in page.elements if tag == "svg"]
    assert len(labels) == 5
    assert len(set(labels)) == 5
    assert all(label and len(label) > 40 for label in labels)
    assert all(attributes.get("role") == "img" for tag, attributes in page.elements if tag == "svg")
    assert sum(tag == "figcaption" for tag, _ in page.elements) == 5
    assert {"down_proj", "q_proj", "11", "step"} <= {text.strip() for text in page.text}


def test_colours_are_the_pages_own(html):
    svgs = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    used = set(re.findall(r"var\((--[\w-]+)\)", "".join(svgs)))
    light, dark = re.search(r":root \{(.*?)\}.*?dark\) \{\s*:root \{(.*?)\}", html, flags=re.DOTALL).groups()
    assert {"--ink", "--chosen", "--rest", "--cell", "--arm-2"} <= used
    for variable in set(figures.CSS_VARIABLES.values()):
        assert f"{variable}:" in light
        assert f"{variable}:" in dark
    painted = re.findall(r"(?:fill|stroke): ([^;\"]+)", "".join(svgs))
    assert set(painted) <= {f"var({variable})" for variable in used} | {"none"}


def test_the_table_is_the_races(page, result):
    table = result.cells()
    for cell in (*table.header, *(cell for row in table.rows for cell in row)):
        assert cell in page.cells
    labels = {attributes.get("data-label") for tag, attributes in page.elements if tag == "td"}
    assert set(table.header[1:]) <= labels


def test_names_are_escaped(html, page):
    assert "Aletheia <plan>" not in html
    assert "Aletheia <plan> & kernels" in page.cells


def test_the_verdict_has_the_figures_and_the_limits(page):
    text = " ".join(" ".join(page.text).split())
    assert "each step 1.60 times as fast" in text  # 4.0 s against 2.5 s a step
    assert "each step 1.25 times as fast" in text  # 4.0 s against 3.2 s
    assert "28 s in all, its probe of 8 s included" in text  # 8 steps of 2.5 s, and 7.5 s
    assert "32 s in all" in text
    assert all(loss in text for loss in ("1.4321", "1.4333", "1.4555"))
    assert "One seed, 8 steps of 4 examples, one learning rate (0.0003) for every arm" in text


def test_the_probe_is_charged_to_the_planned_arm_alone(page):
    label = next(
        a["aria-label"] for tag, a in page.elements if tag == "svg" and "wall-clock" in a["aria-label"]
    )
    assert (
        "PEFT, uniform r=16: 32 s; uniform r=16, our kernels: 26 s; Aletheia <plan> & kernels: 28 s" in label
    )


def test_the_chosen_layers_and_ranks_are_told(page, scores):
    labels = " ".join(attributes["aria-label"] for tag, attributes in page.elements if tag == "svg")
    chosen = sorted(sorted(range(LAYERS), key=lambda layer: -scores.layers[layer])[: LAYERS // 2])
    assert f"Chosen layers: {', '.join(map(str, chosen))}." in labels
    assert "6 of rank 4, 3 of rank 11" in labels
    assert "".join(page.text).count("★") == len(chosen) + 1  # and once in the caption


def test_a_race_whose_losses_disagree_gives_no_speed(tmp_path, result):
    last = result.arms[-1]
    other = replace(
        last, training=replace(last.training, evals=(EvalRecord(0, 0.0, 5.0), *last.training.evals[1:]))
    )
    html = write(tmp_path, replace(result, arms=(*result.arms[:-1], other)))
    assert "No speed is read off this race" in html
    assert "times as fast" not in html


def test_a_disturbed_machine_is_owned_up_to(tmp_path, result):
    assert "something else used the machine" not in write(tmp_path, result)
    last = result.arms[-1]
    slow = replace(last.training.history[3], step_seconds=40.0)
    training = replace(last.training, history=(*last.training.history[:3], slow, *last.training.history[4:]))
    disturbed = replace(result, arms=(*result.arms[:-1], replace(last, training=training)))
    assert "Of all steps, 1 took more than 4 times" in write(tmp_path, disturbed, overwrite=True)


def test_a_speed_has_its_spread_over_the_turns(tmp_path, result):
    assert "1.60 times as fast (1.60 to 1.60 in single turns)" in write(tmp_path, result)
    first = result.arms[0]
    slow = tuple(replace(record, step_seconds=6.0) for record in first.training.history[:4])
    training = replace(first.training, history=(*slow, *first.training.history[4:]))
    moody = replace(result, arms=(replace(first, training=training), *result.arms[1:]))
    # Medians of 5 s and 2.5 s; 6 s in the turn of the first four steps, 4 s in the other.
    assert "2.00 times as fast (1.60 to 2.40 in single turns)" in write(tmp_path, moody, overwrite=True)


def test_where_the_time_of_a_step_goes(page):
    label = next(a["aria-label"] for tag, a in page.elements if tag == "svg" and "Where" in a["aria-label"])
    assert "PEFT, uniform r=16: forward 1 s, backward 2 s, update 1 s" in label
    assert "Aletheia <plan> & kernels: forward 0.625 s, backward 1.25 s, update 0.625 s" in label


def test_steps_that_were_not_timed_in_parts_are_not_shown(tmp_path, result):
    def untimed(one: ArmResult) -> ArmResult:
        history = tuple(
            replace(record, forward_seconds=None, backward_seconds=None) for record in one.training.history
        )
        return replace(one, training=replace(one.training, history=history))

    html = write(tmp_path, replace(result, arms=tuple(map(untimed, result.arms))))
    assert "Where the time of a step goes" not in html


def test_what_the_saving_is_worth(tmp_path, result):
    cells = Page(write(tmp_path, result)).cells
    assert {"hours for 1,000 steps", "hours saved in 1,000 steps"} <= set(cells)
    # 4 s a step less 2.5 s.
    start = cells.index("0.694")
    assert cells[start - 1 : start + 2] == ["Aletheia <plan> & kernels", "0.694", "0.417"]
    assert not any("money" in cell or "kWh" in cell for cell in cells)

    cells = Page(write(tmp_path, result, tariff=Tariff(3.0, 500.0), overwrite=True)).cells
    start = cells.index("0.694")
    assert cells[start : start + 4] == ["0.694", "0.417", "1.25", "0.208"]
    assert {"money saved, at the price given", "kWh saved, at the power given"} <= set(cells)


def test_the_commands_that_made_the_plan_come_first_and_are_safe_to_paste(tmp_path, result):
    last = result.arms[-1]
    meta = {
        **last.plan.meta,
        "probe": {**last.plan.meta["probe"], "command": ["aletheia", "probe", "--train", "my data.jsonl"]},
        "command": ["aletheia", "plan", "--out", "x; rm -rf ~", "$(reboot)"],
    }
    arms = (*result.arms[:-1], replace(last, plan=replace(last.plan, meta=meta)))
    page = Page(write(tmp_path, replace(result, arms=arms), commands=["aletheia compare"]))
    shown = next(text for text in page.text if "aletheia probe" in text)
    assert shown.splitlines() == [
        "aletheia probe --train 'my data.jsonl'",
        "aletheia plan --out 'x; rm -rf ~' '$(reboot)'",
        "aletheia compare",
    ]
    for command in ("aletheia plan", ["reboot"], [], None, 3):
        meta["command"] = command
        assert report._made_by(arms[-1].plan) == ["aletheia probe --train 'my data.jsonl'"]


def test_the_commands_and_the_machine_stand_there(html, page):
    assert "make run\naletheia plan --layers 50%" in "".join(page.text)
    for name, value in machine_facts():
        assert name in page.cells
        assert value in page.cells
    assert "torch 2.13.0" in html
    assert any(
        "PEFT's own forward; attention in training: the model's own: kernels are off" in cell
        and "head and loss over all rows: kernels are off" in cell
        for cell in page.cells
    )


def test_modules_of_one_last_name_are_told_apart(tmp_path, result):
    modules = {
        f"transformer.h.{layer}.{name}": ModuleScore(layer, 1.0 + layer, 32, 32, "mlp")
        for layer in range(2)
        for name in ("attn.c_proj", "mlp.c_proj", "mlp.c_fc")
    }
    scores = Scores(
        "aletheia", (1.0, 2.0), modules, "transformer.h", {"seconds": 1.0, "batches": 1, "tokens": 8}
    )
    gpt2 = replace(result, arms=(result.arms[0], replace(result.arms[1], plan=make_plan(scores, layers=50))))
    text = {part.strip() for part in Page(write(tmp_path, gpt2)).text}
    assert {"attn.c_proj", "mlp.c_proj", "c_fc"} <= text


def test_plans_that_were_made_without_scores_show_ranks_alone(tmp_path, result):
    page = Page(write(tmp_path, replace(result, arms=result.arms[:2])))
    labels = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert any(label.startswith("LoRA rank by layer") for label in labels)
    assert not any(label.startswith("Score of each") for label in labels)
    assert "probe" not in page.cells


def test_an_existing_page_stays_unless_told(tmp_path, result):
    before = write(tmp_path, result)
    with pytest.raises(UserError, match="exists"):
        write(tmp_path, result, title="other")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before
    assert "<h1>other</h1>" in write(tmp_path, result, title="other", overwrite=True)


def test_more_curves_than_can_be_told_apart_are_refused():
    curves = [figures.Curve(str(i), [0, 1], [1, 2]) for i in range(7)]
    with pytest.raises(ValueError, match="7 curves"):
        figures.loss_curves(curves, x_label="x", y_label="y", label="l")
