"""Saliency: to first order, how far the loss moves where single weights are taken away.

    score(W) = mean over batches b and over the entries of W of |W ⊙ ∂loss_b / ∂W|

the importance from which GoRA sets ranks (arXiv 2502.12171); a layer's score is the sum over its linears. GoRA takes
the gradient accumulated over its batches and so would have to hold it; here the mean is taken after the absolute value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from aletheia_tune.scores.collector import Collector
from aletheia_tune.scores.gradient import stability

_BLOCK = 1 << 20  # entries of the gradient that are made at a time


class Saliency(Collector):
    """Mean |W ⊙ G| of every weight, in float32 at least, from blocks of gradient rows.

    Args:
        weights: the weights of the linears and the stacked experts, by name: [rows, columns] or [experts, rows,
            columns]; looked up each time that one is needed, so that quantised ones may be dequantised then.
        layer_of: their layers.
        num_layers: how many layers the model has.
    """

    def __init__(self, weights: Mapping[str, Tensor], layer_of: Mapping[str, int], num_layers: int) -> None:
        self._weights = weights
        self._sizes = {name: weight.numel() for name, weight in weights.items()}
        self._layer_of = dict(layer_of)
        self._num_layers = num_layers
        self._sums: dict[str, list[Tensor]] = {}
        self.batches: list[dict[str, float]] = []
        """By batch, the mean of every weight."""

    def weight(self, name: str, index: int, a: Tensor, b: Tensor) -> None:
        """Adds one matrix, of gradient aᵀ b."""
        if name not in self._weights:
            return
        stored = self._weights[name].detach()
        matrix = stored[index] if stored.dim() == 3 else stored
        wide = torch.promote_types(b.dtype, torch.float32)
        b = b.to(wide)
        step = max(_BLOCK // matrix.shape[1], 1)
        for start in range(0, matrix.shape[0], step):
            rows = slice(start, start + step)
            self._add(name, (a[:, rows].T.to(wide) @ b).mul_(matrix[rows]))

    def gradient(self, name: str, gradient: Tensor) -> None:
        """Adds a whole weight."""
        if name in self._weights:
            wide = torch.promote_types(gradient.dtype, torch.float32)
            self._add(name, gradient.to(wide) * self._weights[name].detach())

    def _add(self, name: str, product: Tensor) -> None:
        self._sums.setdefault(name, []).append(product.abs_().sum())

    def discard(self) -> None:
        """Forgets what was added since the last batch."""
        self._sums.clear()

    def add_batch(self, norm_sq: Mapping[str, float], standard_error: Mapping[str, float]) -> None:
        """One batch is over."""
        self.batches.append(
            {
                name: math.fsum(part.item() for part in self._sums.get(name, ())) / size
                for name, size in self._sizes.items()
            }
        )
        self.discard()

    @property
    def by_layer(self) -> tuple[float, ...]:
        """The sum over each layer's weights."""
        return tuple(sum_by_layer(self.by_parameter, self._layer_of, self._num_layers))

    @property
    def by_parameter(self) -> dict[str, float]:
        """The mean over batches of each weight's mean."""
        return {
            name: math.fsum(batch[name] for batch in self.batches) / len(self.batches)
            for name in self._weights
        }

    @property
    def stability(self) -> float | None:
        """Mean Spearman correlation of the layers' scores between single batches; None where there is none."""
        return stability([sum_by_layer(batch, self._layer_of, self._num_layers) for batch in self.batches])


def sum_by_layer(values: Mapping[str, float], layer_of: Mapping[str, int], num_layers: int) -> list[float]:
    """The sum of each layer's values."""
    layers: list[list[float]] = [[] for _ in range(num_layers)]
    for name, value in values.items():
        layers[layer_of[name]].append(value)
    return [math.fsum(values) for values in layers]
