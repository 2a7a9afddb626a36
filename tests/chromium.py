"""Pages in headless Chromium: how they look in a colour scheme, at several widths, and what the console says.

They stand in frames of the widths that are asked for, side by side in a page of our own, whose script reads how each
was laid out. A window could not do it: it is never narrower than some 500 pixels.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from html import unescape
from pathlib import Path

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 120
HEIGHT = 9000  # pixels of a frame, more than any page needs
SCHEME = {"dark": "0", "light": "1"}  # Blink's numbers

_FRAMES = """<!DOCTYPE html><html><head><meta charset="utf-8"><title>frames</title></head>
<body style="margin:0;background:#888">%s
<script>
addEventListener("load", () => {
  const seen = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument.documentElement;
    return {
      width: page.clientWidth,
      content: page.scrollWidth,
      height: Math.ceil(page.querySelector("main").getBoundingClientRect().bottom),
      dark: frame.contentWindow.matchMedia("(prefers-color-scheme: dark)").matches,
    };
  });
  document.body.dataset.seen = JSON.stringify(seen);
});
</script></body></html>
"""


def find() -> str | None:
    """The browser's program, or None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass(frozen=True)
class Layout:
    """How a page was laid out in one frame.

    Attributes:
        width: of the frame in pixels.
        content: width that its content takes; more than ``width`` where a reader would have to scroll sideways.
        height: of its content.
        dark: whether the page was told of a preference for dark.
        image: what it looks like.
    """

    width: int
    content: int
    height: int
    dark: bool
    image: Image.Image


@dataclass(frozen=True)
class Visit:
    """The pages in the order asked for, and what the browser's console said."""

    layouts: tuple[Layout, ...]
    console: tuple[str, ...]


def visit(pages: Sequence[tuple[Path, int]], scheme: str) -> Visit:
    """Open each page in a frame of a width, all in the "light" or all in the "dark" scheme.

    Raises:
        RuntimeError: the browser failed, with the end of what it said.
    """
    program = find()
    if program is None:
        raise RuntimeError(f"no browser: none of {', '.join(NAMES)} is on the path")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        widths = [width for _, width in pages]
        places = [sum(widths[:index]) for index in range(len(widths))]
        frames = "".join(
            f'<iframe src="{page.resolve().as_uri()}" style="position:absolute;top:0;border:0;left:{place}px;'
            f'width:{width}px;height:{HEIGHT}px"></iframe>'
            for place, (page, width) in zip(places, pages, strict=True)
        )
        (directory / "frames.html").write_text(_FRAMES % frames, encoding="utf-8")
        shot = directory / "shot.png"
        command = [
            program,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", "--hide-scrollbars", "--allow-file-access-from-files"),
            *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000", "--dump-dom"),
            f"--blink-settings=preferredColorScheme={SCHEME[scheme]}",
            f"--user-data-dir={directory / 'profile'}",
            f"--window-size={sum(widths)},{HEIGHT}",
            f"--screenshot={shot}",
            (directory / "frames.html").as_uri(),
        ]
        ran = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env={**os.environ, "HOME": name},
            check=False,
        )
        seen = re.search(r'data-seen="([^"]*)"', ran.stdout)
        if ran.returncode != 0 or seen is None or not shot.is_file():
            raise RuntimeError(f"{program} ended with {ran.returncode}: {ran.stderr[-2000:]}")
        image = Image.open(shot).convert("RGB")
        layouts = tuple(
            Layout(
                width=one["width"],
                content=one["content"],
                height=one["height"],
                dark=one["dark"],
                image=image.crop((place, 0, place + width, min(one["height"], HEIGHT))),
            )
            for place, width, one in zip(places, widths, json.loads(unescape(seen[1])), strict=True)
        )
    return Visit(layouts, tuple(line for line in ran.stderr.splitlines() if "CONSOLE" in line))
