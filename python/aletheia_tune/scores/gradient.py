"""The published gradient score: how large is the gradient of a layer's parameters on the task.

    score(l) = Σ over batches b, Σ over floating-point parameter tensors p of layer l, ‖∂loss_b / ∂p‖₂

A sum of norms, neither the root of summed squares nor normalised by size nor averaged (arXiv 2604.15351, as its
authors' package computes it). This file only adds up; the squared norms come from the probe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from aletheia_tune.scores.collector import Collector


class GradientScore(Collector):
    """Sums gradient norms into scores by layer and by parameter.

    Args:
        layer_of: the layer index of every parameter tensor that counts, by name.
        num_layers: how many layers the model has.
    """

    def __init__(self, layer_of: Mapping[str, int], num_layers: int) -> None:
        self._layer_of = dict(layer_of)
        self._by_parameter = dict.fromkeys(layer_of, 0.0)
        self._by_batch: list[list[float]] = []
        self._variance = [0.0] * num_layers
        self._num_layers = num_layers

    @staticmethod
    def _term(norm_sq: float) -> tuple[float, float]:
        """What a squared norm adds to the score, and the derivative of the squared norm by that."""
        norm = math.sqrt(max(norm_sq, 0.0))
        return norm, 2.0 * norm

    def add_batch(self, norm_sq: Mapping[str, float], standard_error: Mapping[str, float]) -> None:
        """Adds one batch: squared gradient norms by parameter and, where they are estimates, their standard errors.

        The standard error of ‖g‖ follows from that of ‖g‖² to first order, d‖g‖ = d(‖g‖²) / (2 ‖g‖). Parameters of one
        batch share their random directions, so within a batch errors are added (an upper bound whatever the
        correlation); batches draw anew, so between batches their squares are.
        """
        layers, errors = [0.0] * self._num_layers, [0.0] * self._num_layers
        for name, squared in norm_sq.items():
            value, slope = self._term(squared)
            layer = self._layer_of[name]
            self._by_parameter[name] += value
            layers[layer] += value
            if slope > 0.0:
                errors[layer] += standard_error.get(name, 0.0) / slope
        self._by_batch.append(layers)
        self._variance = [total + error**2 for total, error in zip(self._variance, errors, strict=True)]

    @property
    def by_layer(self) -> tuple[float, ...]:
        """The score of each layer."""
        return tuple(map(math.fsum, zip(*self._by_batch, strict=True)))

    @property
    def by_parameter(self) -> dict[str, float]:
        """The sum over batches of what each parameter tensor adds."""
        return dict(self._by_parameter)

    @property
    def standard_error(self) -> tuple[float, ...]:
        """The standard error of each layer's score; zero where nothing was estimated."""
        return tuple(map(math.sqrt, self._variance))

    @property
    def stability(self) -> float | None:
        """Mean Spearman correlation of the layers' scores between single batches; None where there is none."""
        return stability(self._by_batch)


def stability(by_batch: Sequence[Sequence[float]]) -> float | None:
    """Mean Spearman correlation of all pairs of batches' scores; None of one batch, or where all scores are equal."""
    pairs = [
        spearman(first, second) for index, first in enumerate(by_batch) for second in by_batch[index + 1 :]
    ]
    known = [value for value in pairs if value is not None]
    return math.fsum(known) / len(known) if known else None


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation of two sequences (ties share their mean rank); None where one of them is constant."""
    a, b = ranks(first), ranks(second)
    mean = (len(a) - 1) / 2.0
    covariance = math.fsum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in a) * math.fsum((y - mean) ** 2 for y in b))
    return covariance / spread if spread > 0.0 else None


def ranks(values: Sequence[float]) -> list[float]:
    """The rank of every value, from 0 for the smallest; ties share their mean rank."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2.0
        for value in values
    ]
