"""The pictures in docs/pictures: the page of the recorded race on word problems, and a plan as a terminal shows it.

    python -m tests.screenshots

The page needs Chromium. The terminal's pictures are rich's own, of the plans beside them; a test holds them to what the
command draws.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import TerminalTheme

from aletheia_tune.picture import draw
from aletheia_tune.plan import Plan
from aletheia_tune.referee import Verdict
from aletheia_tune.report import write_verdict
from tests import chromium

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
VERDICT = ROOT / "benchmarks" / "studies" / "results" / "gsm8k.json"
COMMAND = "aletheia race benchmarks/studies/tasks/gsm8k.toml --out runs/races/gsm8k"
# By file: the width of the page, the colour scheme, and how much of the page is shown.
SHOTS = {
    "race-desktop.png": (1200, "light", 1500),
    "race-desktop-dark.png": (1200, "dark", 1500),
    "race-phone.png": (360, "light", 1500),
    "race-phone-dark.png": (360, "dark", 1500),
}
# By file, the plan that it shows.
TERMINALS = {"plan.svg": "plan.json", "plan-top.svg": "plan-top.json"}
# Rich's own format without its fonts, which would be fetched from a server.
SVG = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px }}
.{unique_id}-title {{ font: bold 16px system-ui, sans-serif }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""
THEME = TerminalTheme(
    (24, 27, 32),
    (222, 226, 231),
    [(24, 27, 32), (240, 113, 120), (126, 202, 138), (230, 194, 87), (96, 165, 250), (208, 142, 214),
     (86, 190, 214), (222, 226, 231)],
)  # fmt: skip


def terminal(file: str) -> str:
    """What `aletheia plan --show` draws of a plan on a terminal of 80 columns, as an SVG without a request."""
    plan = Plan.from_json((PICTURES / file).read_text(encoding="utf-8"))
    console = Console(
        record=True, width=80, force_terminal=True, color_system="truecolor", file=io.StringIO()
    )
    draw(plan, console)
    return console.export_svg(
        title=f"aletheia plan {file} --show", theme=THEME, code_format=SVG, unique_id="plan"
    )


def page(directory: Path) -> Path:
    """The page of the recorded race."""
    place = directory / "report.html"
    write_verdict(place, Verdict.from_json(VERDICT.read_text(encoding="utf-8")), commands=[COMMAND])
    return place


def main() -> int:
    PICTURES.mkdir(exist_ok=True)
    for file, plan in TERMINALS.items():
        (PICTURES / file).write_text(terminal(plan), encoding="utf-8")
    if chromium.find() is None:
        print(
            f"screenshots: error: no browser: none of {', '.join(chromium.NAMES)} is there", file=sys.stderr
        )
        return 2
    with tempfile.TemporaryDirectory() as name:
        report = page(Path(name))
        widths = sorted({width for width, _, _ in SHOTS.values()})
        for scheme in chromium.SCHEME:
            visit = chromium.visit([(report, width) for width in widths], scheme)
            seen = dict(zip(widths, visit.layouts, strict=True))
            for file, (width, of, height) in SHOTS.items():
                if of == scheme:
                    shot = seen[width].image
                    shot = shot.crop((0, 0, shot.width, min(height, shot.height)))
                    # A palette, so that the file is small.
                    shot.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
                        PICTURES / file, optimize=True
                    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
