"""Backward passes of a depth drawn step by step: below the drawn layer adapters act, and get no gradient.

The idea is DropBP's (arXiv 2402.17812), to leave out parts of the backward pass at random, in its simplest form: all
layers under a boundary are left out, so they keep no activations either. Their adapters' ``requires_grad`` is off for
the step; with nothing to train below it, autograd builds no graph there and the gradients stay None, for which
optimizers pass a parameter over, moments and all.

A layer that is reached with probability q has q times the full pass's gradient in expectation. Divided by q where it is
reached (`DepthSampler.reweight`), its expectation is the full pass's. That matters where the size of a gradient does:
to SGD, and to the clipping of its norm. Adam's updates do not depend on the scale of a parameter's gradients, and a
parameter that is passed over has no zeros in its moments, so there it changes the clipping alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from aletheia_tune.errors import UserError
from aletheia_tune.layers import find_layers
from aletheia_tune.number_types import is_finite, is_whole


def check_odds(odds: Mapping[int, float]) -> None:
    """Raises UserError unless `odds` maps layers to finite odds that are not negative and not all 0."""
    for layer, odd in odds.items():
        if not is_whole(layer) or layer < 0:
            raise UserError(f"sampled depth: {layer!r} is no index of a layer: give whole numbers from 0")
        if not is_finite(odd) or odd < 0:
            raise UserError(f"sampled depth: the odds of layer {layer} are {odd}: give 0 or more")
    if not any(odds.values()):
        raise UserError("sampled depth: no layer has odds above 0")


class DepthSampler:
    """Draws how deep the next backward pass goes; made by `sampled_depth`.

    Attributes:
        generator: of the draws.
    """

    def __init__(
        self, trainable: list[tuple[int, nn.Parameter]], odds: Mapping[int, float], seed: int
    ) -> None:
        self._trainable = trainable
        self._boundaries = sorted(odds)
        self._odds = torch.tensor([float(odds[layer]) for layer in self._boundaries], dtype=torch.float64)
        total = math.fsum(odds.values())
        self._reached = {
            layer: math.fsum(odd for boundary, odd in odds.items() if boundary <= layer) / total
            for layer in {layer for layer, _ in trainable}
        }
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> int:
        """The lowest layer that the next backward pass trains, drawn with the odds; adapters below it rest."""
        boundary = self._boundaries[int(torch.multinomial(self._odds, 1, generator=self.generator))]
        for layer, parameter in self._trainable:
            parameter.requires_grad_(layer >= boundary)
        return boundary

    def reweight(self) -> None:
        """Divide every gradient by the probability that its layer is reached; once a step, after its backward passes.

        Over the draws the gradients then are in expectation those of the full pass.
        """
        for layer, parameter in self._trainable:
            if parameter.grad is not None:
                parameter.grad.div_(self._reached[layer])


@contextmanager
def sampled_depth(model: nn.Module, odds: Mapping[int, float], seed: int) -> Iterator[DepthSampler]:
    """Backward passes of sampled depth while inside the context; on exit every adapter is trainable again.

    What enters the first layer must need no gradient, or the passes are cut at the boundary by nothing: under
    gradient checkpointing, use it together with `cut_prefix`.

    Args:
        model: a causal language model whose trainable parameters are all in its layers, bare or in PEFT.
        odds: by the index of a layer, how often it is the lowest one trained, in any unit.
        seed: of the draws.

    Yields:
        DepthSampler: whose `draw` is to be called before each step's forward pass, and whose `reweight` may be after
            its backward pass.

    Raises:
        UserError: odds that cannot be meant, of a layer above all adapters, or under which the lowest adapters would
            never be trained.
    """
    check_odds(odds)
    layers = find_layers(model).layers
    trainable = [
        (index, parameter)
        for index, layer in enumerate(layers)
        for parameter in layer.parameters()
        if parameter.requires_grad
    ]
    adapted = [index for index, _ in trainable]
    if not adapted:
        raise UserError("sampled depth: no parameter of the layers is trainable")
    possible = [layer for layer, odd in odds.items() if odd > 0]
    if max(possible) > max(adapted):
        raise UserError(
            f"sampled depth: above layer {max(possible)} nothing is trained: "
            f"the highest adapted layer is {max(adapted)}"
        )
    if min(possible) > min(adapted):
        raise UserError(
            f"sampled depth: the adapters of layer {min(adapted)} would never be trained: "
            f"give odds to it or to a layer below, or leave it out of the plan"
        )
    try:
        yield DepthSampler(trainable, odds, seed)
    finally:
        for _, parameter in trainable:
            parameter.requires_grad_(True)
