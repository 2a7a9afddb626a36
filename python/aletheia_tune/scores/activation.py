"""Activation norms: how large is what a layer puts out (Act-LoRA's score), and what a linear takes in.

    score(l) = mean over the tokens of all batches of ‖hidden state above layer l‖₂
    score(W) = mean over the tokens of all batches of ‖x‖₂ of the linear y = W x

Padding counts where its rows cannot be told from others, as in a linear that sees only some of the tokens. Stacked
experts have no score: their inputs are no module's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aletheia_tune.scores.collector import Collector, token_mask
from aletheia_tune.scores.gradient import stability

_Means = Mapping[Any, tuple[float, int]]  # by layer or weight, a sum of norms and how many


class Activation(Collector):
    """Means of norms, in float32 at least.

    Args:
        weights: names of the linears' weights.
        num_layers: how many layers the model has.
    """

    def __init__(self, weights: Iterable[str], num_layers: int) -> None:
        self._weights = tuple(weights)
        self._num_layers = num_layers
        self._mask = torch.empty(0)
        self._tokens = 0
        self._seen: dict[int | str, list[tuple[Tensor, int]]] = {}
        self._batches: list[_Means] = []

    def begin(self, batch: Mapping[str, Any]) -> None:
        """A batch begins, or begins again."""
        self._seen.clear()
        self._mask = token_mask(batch).flatten()
        self._tokens = int(self._mask.sum())

    def hidden(self, index: int, state: Tensor) -> None:
        """Adds what layer ``index`` - 1 puts out."""
        if index > 0:
            self._add(index - 1, state)

    def linear(self, name: str, x: Tensor) -> None:
        """Adds what a linear takes in."""
        self._add(name, x)

    def _add(self, key: int | str, x: Tensor) -> None:
        norms = torch.linalg.vector_norm(
            x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32)
        ).flatten()
        if norms.shape == self._mask.shape:
            part = torch.where(self._mask, norms, 0.0).sum(), self._tokens
        else:
            part = norms.sum(), norms.numel()
        self._seen.setdefault(key, []).append(part)

    def add_batch(self, norm_sq: Mapping[str, float], standard_error: Mapping[str, float]) -> None:
        """One batch is over."""
        self._batches.append(
            {
                key: (math.fsum(total.item() for total, _ in parts), sum(count for _, count in parts))
                for key, parts in self._seen.items()
            }
        )
        self._seen.clear()

    @property
    def by_layer(self) -> tuple[float, ...]:
        """The mean norm of each layer's output; 0 of a layer that did not run."""
        return tuple(self._layers(self._batches))

    @property
    def by_parameter(self) -> dict[str, float]:
        """The mean norm of each linear's input, by its weight; 0 of one that did not run."""
        return {name: _mean(self._batches, name) for name in self._weights}

    @property
    def stability(self) -> float | None:
        """Mean Spearman correlation of the layers' scores between single batches; None where there is none."""
        return stability([self._layers([batch]) for batch in self._batches])

    def _layers(self, batches: Sequence[_Means]) -> list[float]:
        return [_mean(batches, layer) for layer in range(self._num_layers)]


def _mean(batches: Sequence[_Means], key: int | str) -> float:
    sums = [batch[key] for batch in batches if key in batch]
    count = sum(count for _, count in sums)
    return math.fsum(total for total, _ in sums) / count if count else 0.0
