"""What counts as a number in values from a file or a caller: a bool never does, nor does what no float can hold."""

from __future__ import annotations

import math


def is_whole(value: object) -> bool:
    """Whether it is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether it is an integer or a float that is finite as a float."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
