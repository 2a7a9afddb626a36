"""The examples as modules, and a directory with the names that the documents use."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def demo() -> Iterator[ModuleType]:
    """examples/demo.py, imported as Python runs it: with its own directory first on the path."""
    examples = str(Path(__file__).resolve().parents[2] / "examples")
    sys.path.insert(0, examples)
    try:
        yield importlib.import_module("demo")
    finally:
        sys.path.remove(examples)


@pytest.fixture
def users_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, train_file: Path, eval_file: Path
) -> Path:
    """The working directory of a user: a model DIR, train.jsonl and eval.jsonl, and reviews to classify."""
    (tmp_path / "DIR").symlink_to(tiny_model_dir)
    shutil.copy(train_file, tmp_path / "train.jsonl")
    shutil.copy(eval_file, tmp_path / "eval.jsonl")
    for name, count in (("reviews", 24), ("reviews-eval", 6)):
        rows = [{"text": "a b c" if at % 2 else "d e f", "label": at % 2} for at in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path
