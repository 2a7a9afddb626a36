"""What pages and notebooks show runs as it stands there, in its order; the site builds without a warning."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from aletheia_tune.cli import app

ROOT = Path(__file__).resolve().parents[2]
# Its libraries are imported by PEFT wherever they are installed, which takes seconds: it runs beside tests/quantised.
QUANTISED = ROOT / "docs" / "how-to" / "quantised.md"
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
PAGES = [
    *(ROOT / "docs" / name for name in ("tutorial.md", "serving.md")),
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
    *NOTEBOOKS,
]
if importlib.util.find_spec("bitsandbytes") is None:
    PAGES.remove(QUANTISED)
# Python, and plain blocks of `aletheia` commands. What is marked as sh is for a reader: it takes a machine or an hour.
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def cells(notebook: Path) -> list[dict[str, Any]]:
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


def blocks(page: Path) -> list[tuple[str, str]]:
    if page in NOTEBOOKS:
        return [("python", "".join(cell["source"])) for cell in cells(page) if cell["cell_type"] == "code"]
    found = FENCED.findall(page.read_text(encoding="utf-8"))
    return [(language, block) for language, block in found if language in ("python", "")]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_their_order(page, users_directory):
    names: dict[str, Any] = {"__name__": page.stem}
    for language, block in blocks(page):
        if language == "python":
            exec(compile(block, page.name, "exec"), names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "aletheia", line
            finished = CliRunner().invoke(app, arguments)
            assert finished.exit_code == 0, f"{line}\n{finished.output}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_a_notebook_is_kept_without_what_a_run_left_in_it(notebook):
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    names = [cell["id"] for cell in content["cells"]]
    assert len(set(names)) == len(names)
    for cell in content["cells"]:
        assert re.fullmatch(r"[\w-]{1,64}", cell["id"])
        assert cell["cell_type"] in ("markdown", "code")
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)


def test_there_are_blocks_to_run():
    assert {language for page in PAGES for language, _ in blocks(page)} == {"python", ""}
    assert NOTEBOOKS


def test_the_site_builds_without_a_warning(tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs").with_suffix("")
        built_page = tmp_path / "site" / ("" if place.name == "index" else place) / "index.html"
        assert built_page.is_file(), page
    reference = (tmp_path / "site" / "reference" / "operators" / "index.html").read_text(encoding="utf-8")
    assert "Ranks may differ from projection to projection" in reference
