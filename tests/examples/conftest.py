"""The tiny model and its data, as the tests of the package have them, and the examples as modules."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

_HERE = Path(__file__).resolve().parent


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_tiny = _load("tiny_model_fixtures", _HERE.parent / "aletheia_tune" / "conftest.py")
tiny_model_dir, train_file, eval_file = _tiny.tiny_model_dir, _tiny.train_file, _tiny.eval_file


@pytest.fixture(scope="session")
def demo() -> Iterator[ModuleType]:
    """examples/demo.py, imported as Python runs it: with its own directory first on the path."""
    examples = str(_HERE.parents[1] / "examples")
    sys.path.insert(0, examples)
    try:
        yield importlib.import_module("demo")
    finally:
        sys.path.remove(examples)
