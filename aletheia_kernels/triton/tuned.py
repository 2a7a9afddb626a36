"""What measurements on this card chose: one JSON file a card and version of Triton, kept between runs.

It lies in ``$ALETHEIA_CACHE/triton/VERSION``, or in ``~/.cache/aletheia-kernels/triton/VERSION``, under the card's own
name, since two cards of one architecture may choose differently, and so may two compilers for one card. Where nothing
was measured, nothing is chosen.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton


def card_name(device: torch.device) -> str:
    """The device's name as files are named, ``nvidia-h100-80gb-hbm3``; ``cpu`` or ``meta`` where there is no card."""
    if device.type != "cuda":
        return device.type
    return _name_of_index(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _name_of_index(index: int) -> str:
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(index).lower()).strip("-")


def path(card: str) -> Path:
    """The file of the card with this name, for the Triton that is imported."""
    root = os.environ.get("ALETHEIA_CACHE") or os.path.join(
        os.path.expanduser("~"), ".cache", "aletheia-kernels"
    )
    return Path(root) / "triton" / triton.__version__ / f"{card}.json"


def choice(card: str, key: str) -> dict[str, Any] | None:
    """What was chosen under ``key`` for the card; None where nothing was measured."""
    return _read(path(card)).get(key)


def save(card: str, choices: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds choices to the card's file, over those of the same keys. A reader sees the old file or the new one whole."""
    file = path(card)
    file.parent.mkdir(parents=True, exist_ok=True)
    _read.cache_clear()
    merged = {**_read(file), **choices}
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w") as target:
            json.dump(merged, target, indent=1, sort_keys=True)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise
    _read.cache_clear()


# Read once a process: a choice is looked up in every call.
@cache
def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(
            f"{file} cannot be read ({error}) and is not used: delete it, or tune anew", stacklevel=3
        )
        return {}
    try:
        found = json.loads(text)
        if isinstance(found, dict) and all(isinstance(value, dict) for value in found.values()):
            return found
    except ValueError:
        pass
    warnings.warn(f"{file} holds no choices and is not used: delete it, or tune anew", stacklevel=3)
    return {}
