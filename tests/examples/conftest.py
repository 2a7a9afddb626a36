"""The examples as modules."""

from __future__ import annotations

import importlib
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
