"""The page as people meet it: with a screen reader, in the dark, on a phone; and in a browser, where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from aletheia_tune.referee import Verdict
from aletheia_tune.report import write_report, write_verdict
from aletheia_tune.worth import Tariff
from tests import accessibility, chromium, race_case

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "benchmarks" / "studies" / "results" / "gsm8k.json"
PHONE, DESKTOP = 360, 1200
GROUND = {"light": (0xFF, 0xFF, 0xFF), "dark": (0x14, 0x17, 0x1B)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The page of `aletheia compare` and that of `aletheia race`, with everything on them that there can be."""
    directory = tmp_path_factory.mktemp("pages")
    compared, raced = directory / "compare.html", directory / "race.html"
    write_report(
        compared,
        race_case.result(),
        title="A plan beside uniform LoRA",
        question="Is it faster?",
        commands=["aletheia compare --model DIR --train 'my data.jsonl' --eval eval.jsonl --plan plan.json"],
        facts=[("processor", "an abacus")],
        tariff=Tariff(2.5, 300.0),
    )
    verdict = Verdict.from_json(RECORDED.read_text(encoding="utf-8"))
    write_verdict(
        raced, verdict, commands=["aletheia race TASK.toml --out runs/race"], tariff=Tariff(2.5, 300.0)
    )
    return {"compare": compared, "race": raced}


@pytest.mark.parametrize("name", ["compare", "race"])
def test_nobody_stumbles(pages, name):
    assert accessibility.problems(pages[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("--muted: #5b626d", "--muted: #9a9fa8", "in the light scheme"),
        ("--muted: #a4acb8", "--muted: #5b626d", "in the dark scheme"),
        ("--ink: #e8eaed", "--ink: #1b1e23", "text 'A plan beside uniform LoRA' has a contrast of"),
        ("--panel: #f5f6f8", "--panel: #8a8f98", "label 'speed-up' has a contrast of"),
        ("--rest: #848c98", "--rest: #d5d9df", "--rest has a contrast of"),
        ("--cell: #0072b2", "--cell: #001a2b", "text '11' has a contrast of"),
        ("aria-label=", "data-label-of=", "<svg> has no name"),
        ('role="img"', 'role="presentation"', "is not said to be an image"),
        ('<html lang="en">', "<html>", "does not say its language"),
        ("<title>A plan beside uniform LoRA</title>", "", "has no title"),
        ("<h2>", "<h3>", "level 3 follows one of level 1"),
        ('scope="row"', "", "does not say what it is the head of"),
        ("</main>", '<img src="https://example.org/a.png" alt="a"></main>', "has src="),
        ("</main>", "<script>1</script></main>", "could make a request"),
        ("</main>", '<p><a href="https://example.org">a</a></p></main>', "leads to"),
        (", initial-scale=1", ", initial-scale=1, user-scalable=no", "cannot be enlarged"),
    ],
)
def test_what_somebody_would_stumble_over_is_found(pages, old, new, says):
    html = pages["compare"].read_text(encoding="utf-8")
    assert old in html
    changed = html.replace(old, new).replace("</h2>", "</h3>" if new == "<h3>" else "</h2>")
    found = accessibility.problems(changed)
    assert any(says in problem for problem in found), found


def test_contrast_is_wcags():
    assert accessibility.contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    grey = (0x77 / 255,) * 3
    assert accessibility.contrast(grey, (1, 1, 1)) == pytest.approx(4.48, abs=0.005)
    assert accessibility.contrast((1, 0, 0), (1, 1, 1)) == pytest.approx(4.0, abs=0.005)


def test_a_style_that_the_check_cannot_read_does_not_pass(pages):
    html = pages["compare"].read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="is not read here"):
        accessibility.problems(html.replace("figure { margin: 0;", "figure > svg { margin: 0;"))
    with pytest.raises(ValueError, match="is not read here"):
        accessibility.problems(html.replace("--ink: #1b1e23", "--ink: rebeccapurple"))


browser = pytest.mark.skipif(
    chromium.find() is None, reason=f"no browser: none of {', '.join(chromium.NAMES)} is on the path"
)


@browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page_on_a_phone_and_on_a_desk(pages, scheme):
    frames = [(page, width) for page in pages.values() for width in (PHONE, DESKTOP)]
    visit = chromium.visit(frames, scheme)
    # The page forbids itself every request, so a try would stand here, with every other error.
    assert visit.console == ()
    for (page, width), layout in zip(frames, visit.layouts, strict=True):
        assert layout.dark == (scheme == "dark")
        assert layout.width == width
        assert layout.content <= width, f"{page.name} at {width} pixels has to be scrolled sideways"
        assert 1000 < layout.height < chromium.HEIGHT
        assert layout.image.getpixel((1, 1)) == GROUND[scheme]
        assert len(layout.image.getcolors(1 << 20)) > 100


@browser
def test_a_request_would_be_noticed(pages, tmp_path):
    html = pages["compare"].read_text(encoding="utf-8")
    page = tmp_path / "asks.html"
    page.write_text(html.replace("</main>", '<img src="http://127.0.0.1:9/a.png" alt="a"></main>'))
    (line,) = chromium.visit([(page, PHONE)], "light").console
    assert "http://127.0.0.1:9/a.png" in line
    assert "Content Security Policy" in line
