"""What befalls a training at a step: callbacks, and acts on the model for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback


class AtStep(TrainerCallback):
    """Does something to the model when a step, counted from 1, begins."""

    def __init__(self, step: int, act: Callable[[Any], None]) -> None:
        self.step = step
        self.act = act

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.act(model)


class Killed(BaseException):
    """What nothing in the package catches."""


def die(_: Any) -> None:
    raise Killed


def interrupt(_: Any) -> None:
    raise KeyboardInterrupt


def break_weights(model: Any) -> None:
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).fill_(float("nan"))
