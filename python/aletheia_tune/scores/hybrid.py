"""A score in the style of Hybrid-LoRA (arXiv 2605.18822): which linears matter *and* would be ill served by rank r.

    score(W) = rank(saliency(W)) · rank(1 − energy share(W))

each rank among all the weights, from 1 / n for the lowest to 1. The paper's own formula is not public; this is
one with the same two ingredients. A layer's score is the sum over its linears.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aletheia_tune.scores.collector import Collector
from aletheia_tune.scores.energy import Energy
from aletheia_tune.scores.gradient import ranks, stability
from aletheia_tune.scores.saliency import Saliency, sum_by_layer


class Hybrid(Collector):
    """Combines what a saliency and an energy share, told of the same batches, have found.

    Args:
        saliency: of every weight.
        energy: of the same weights.
        layer_of: their layers.
        num_layers: how many layers the model has.
    """

    def __init__(
        self, saliency: Saliency, energy: Energy, layer_of: Mapping[str, int], num_layers: int
    ) -> None:
        self._saliency = saliency
        self._energy = energy
        self._layer_of = dict(layer_of)
        self._num_layers = num_layers

    def add_batch(self, norm_sq: Mapping[str, float], standard_error: Mapping[str, float]) -> None:
        """Nothing: the saliency and the energy share hear of each batch themselves."""

    @property
    def by_layer(self) -> tuple[float, ...]:
        """The sum over each layer's weights."""
        return tuple(sum_by_layer(self.by_parameter, self._layer_of, self._num_layers))

    @property
    def by_parameter(self) -> dict[str, float]:
        """The score of each weight, in (0, 1]."""
        return _product(self._saliency.by_parameter, self._energy.by_parameter)

    @property
    def stability(self) -> float | None:
        """Mean Spearman correlation of the layers' scores between single batches; None where there is none."""
        batches = zip(self._saliency.batches, self._energy.batches, strict=True)
        return stability(
            [sum_by_layer(_product(*batch), self._layer_of, self._num_layers) for batch in batches]
        )

    @property
    def meta(self) -> dict[str, Any]:
        """The rank."""
        return self._energy.meta


def _product(saliency: Mapping[str, float], share: Mapping[str, float]) -> dict[str, float]:
    names = list(saliency)
    important = ranks([saliency[name] for name in names])
    outside = ranks([-share[name] for name in names])
    return {
        name: (i + 1) / len(names) * (o + 1) / len(names)
        for name, i, o in zip(names, important, outside, strict=True)
    }
