"""What counts as a number in values from a file or a caller: a bool never does, nor does what no float can hold."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from aletheia_tune.errors import UserError


def is_whole(value: object) -> bool:
    """Whether it is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether it is an integer or a float that is finite as a float."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_kinds(settings: Any) -> None:
    """Holds the fields of a dataclass that are declared int, float or bool to it, and where it says so to None.

    Raises:
        UserError: a value of another kind, as callers and TOML may give.
    """
    for field in dataclasses.fields(settings):
        value, kind = getattr(settings, field.name), str(field.type).removesuffix(" | None")
        if kind in _KINDS and value is not None:
            fits, name = _KINDS[kind]
            if not fits(value):
                raise UserError(f"{field.name} is {value!r}: give {name}")


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


# By the annotation, which is text in modules that postpone its evaluation.
_KINDS = {
    "int": (is_whole, "a whole number"),
    "float": (_is_real, "a number"),
    "bool": (_is_switch, "true or false"),
}
