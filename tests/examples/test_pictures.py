"""The pictures in the documents: made from what is here, nothing fetched, and told to who does not see them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests import screenshots

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)]*)\)")


@pytest.mark.parametrize("file", screenshots.TERMINALS)
def test_the_terminals_picture_is_what_the_command_draws(file):
    picture = (screenshots.PICTURES / file).read_text(encoding="utf-8")
    assert picture == screenshots.terminal(screenshots.TERMINALS[file])
    assert "@font-face" not in picture
    assert not re.search(r"url\((?!#)|href", picture)


@pytest.mark.parametrize("file", screenshots.SHOTS)
def test_the_pages_pictures_are_there_at_their_width(file):
    width, _, height = screenshots.SHOTS[file]
    with Image.open(screenshots.PICTURES / file) as picture:
        assert picture.width == width
        assert 500 < picture.height <= height
    assert (screenshots.PICTURES / file).stat().st_size < 300_000


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.stem)
def test_every_picture_is_there_and_has_words_for_it(document):
    for words, target in PICTURE.findall(document.read_text(encoding="utf-8")):
        assert len(words) > 10, target
        assert (document.parent / target).is_file(), target


def test_every_picture_is_shown():
    shown = {
        (document.parent / target).resolve()
        for document in DOCUMENTS
        for _, target in PICTURE.findall(document.read_text(encoding="utf-8"))
    }
    made = {screenshots.PICTURES / name for name in (*screenshots.SHOTS, *screenshots.TERMINALS)}
    assert made <= shown
