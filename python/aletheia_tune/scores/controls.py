"""Choices of layers that know nothing of the task: what a score has to beat at the same number of layers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from aletheia_tune.errors import UserError


def top(num_layers: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """The layers nearest to the loss: of all choices of as many, the one with the shortest backward pass."""
    return tuple(range(num_layers - count, num_layers))


def bottom(num_layers: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """The layers nearest to the input."""
    return tuple(range(count))


def spaced(num_layers: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """Layers at even distances, the last one among them: the i-th of k is the last of the i-th of k equal parts."""
    return tuple((part + 1) * num_layers // count - 1 for part in range(count))


def at_random(num_layers: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """A draw without replacement, the same for the same seed."""
    return tuple(sorted(random.Random(seed).sample(range(num_layers), count)))


CONTROLS: dict[str, Callable[[int, int, int], Sequence[int]]] = {
    "top": top,
    "bottom": bottom,
    "spaced": spaced,
    "random": at_random,
}


def control_layers(control: str, num_layers: int, count: int, seed: int = 0) -> tuple[int, ...]:
    """The indices of the `count` layers that a control chooses, ascending.

    Args:
        control: one of `CONTROLS`.
        num_layers: layers of the model.
        count: how many to choose, at least 1 and at most all.
        seed: of "random".

    Raises:
        UserError: no such control.
    """
    if control not in CONTROLS:
        raise UserError(f"control {control!r} is unknown: choose one of {', '.join(CONTROLS)}")
    return tuple(CONTROLS[control](num_layers, count, seed))
