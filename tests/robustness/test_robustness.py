"""The kill test and the soak in short: `make kill-test` and `make soak` are the same at length."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(script: str, json_file: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"tests.robustness.{script}", *arguments, "--json", str(json_file)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(json_file.read_text())


def test_killed_work_goes_on_to_the_same_adapters(tmp_path):
    found = run("kill", tmp_path / "kill.json", "--count", "4")
    assert found["lost"] == []
    assert set(found["tried"]["kill"]) == {"train", "cache", "race"}
    ways = ("in a write", "after a time", "one arm")
    assert sum(of.get(way, 0) for of in found["tried"]["kill"].values() for way in ways) == 4
    assert sum(of["ran out"] for of in found["tried"]["disk_full"].values()) == 3
    assert sum(of["stopped"] for of in found["tried"]["nan_batch"].values()) == 2


def test_nothing_grows(tmp_path):
    found = run("soak", tmp_path / "soak.json", "--steps", "60", "--cycles", "20")
    assert found["lost"] == []
    assert found["training"]["steps"] == 60
    assert found["two at once"]["adapters_as_alone"] == 2
