"""What a command says at its end: words for a person, or one JSON object for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any


def answer(as_json: bool, values: Mapping[str, Any], say: Callable[[], None]) -> None:
    """Print ``values`` as JSON on one line, what is not finite as null; or let ``say`` speak."""
    if as_json:
        print(json.dumps(_plain(values), allow_nan=False))
    else:
        say()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
