"""Training that shrinks: from one step on the upper layers alone learn, over a prefix frozen with its adapters.

The adapters of the lower layers act in the forward pass as they did, but are constants from then on: the backward pass
ends at the lowest layer that still learns, their optimizer state is gone, and what the prefix puts out for an example
is the same in every later step, so that it can be kept.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from aletheia_tune.errors import UserError
from aletheia_tune.layers import find_layers
from aletheia_tune.plan import Plan, share_of_layers
from aletheia_tune.prefix import PrefixCut, cut_prefix
from aletheia_tune.prefix_cache import PrefixCache


def lowest_kept(plan: Plan, share: float) -> int:
    """The index of the lowest layer of the upper ``share`` percent, under which the plan has adapters to freeze.

    Raises:
        UserError: the plan adapts none of these layers, or none below them.
    """
    lowest = plan.num_layers - share_of_layers(plan.num_layers, share)
    kept = f"shrinking to {share:g}% of the layers keeps those from {lowest} up"
    if plan.layers[-1] < lowest:
        raise UserError(f"{kept}, and the plan adapts none of them: give a larger share")
    if plan.layers[0] >= lowest:
        raise UserError(f"{kept}, and the plan adapts none below: give a smaller share")
    return lowest


class Shrinking(TrainerCallback):
    """Shrinks a training when its step has come; as a context, it gives everything back on exit.

    Attributes:
        cut, cache: those in force: before the step the ones that were given, afterwards its own.

    Args:
        model: whose adapters are trained.
        lowest: index of the lowest layer that goes on learning.
        after: share of all steps that comes first, in percent.
        cut: in force at first, undone by whoever made it if the training never shrinks.
        cache: likewise.
        keep: makes a cache over a cut; None for none. What it keeps of the shrunk training is deleted on exit, as no
            other run has these adapters.
    """

    def __init__(
        self,
        model: nn.Module,
        lowest: int,
        after: float,
        cut: PrefixCut,
        cache: PrefixCache | None,
        keep: Callable[[PrefixCut], PrefixCache] | None,
    ) -> None:
        self.cut, self.cache = cut, cache
        self._model, self._lowest, self._after, self._keep = model, lowest, after, keep
        self._frozen: list[nn.Parameter] = []

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        # A training that goes on from a checkpoint may begin beyond the step.
        if not self._frozen and state.global_step >= math.ceil(state.max_steps * self._after / 100):
            self.shrink(optimizer)

    def shrink(self, optimizer: torch.optim.Optimizer) -> None:
        """Freeze the adapters of the lower layers, forget their optimizer state, and cut and cache what is frozen.

        To be called between two steps.
        """
        if self.cache is not None:
            self.cache.remove()
            self.cache = None
        self.cut.remove()
        for layer in list(find_layers(self._model).layers)[: self._lowest]:
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.requires_grad_(False)
                    parameter.grad = None
                    optimizer.state.pop(parameter, None)
                    self._frozen.append(parameter)
        self.cut = cut_prefix(self._model)
        if self._keep is not None:
            self.cache = self._keep(self.cut)

    def __enter__(self) -> Shrinking:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._frozen:
            return
        if self.cache is not None:
            self.cache.remove()
            if self.cache.directory is not None:
                shutil.rmtree(self.cache.directory, ignore_errors=True)
        self.cut.remove()
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()
