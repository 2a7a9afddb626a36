"""What the probe tells a score while it measures, and what it asks of it at the end.

Every collector hears of each batch's squared gradient norms. One that needs more says so by its type: an observer of
gradients is shown every weight's gradient, as the two factors whose product it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


class Collector(ABC):
    """A score in the making, batch after batch."""

    @abstractmethod
    def add_batch(self, norm_sq: Mapping[str, float], standard_error: Mapping[str, float]) -> None:
        """One batch is over: its squared gradient norms by parameter and, where estimated, their standard errors."""

    @property
    @abstractmethod
    def by_layer(self) -> tuple[float, ...]:
        """The score of each layer; larger matters more."""

    @property
    @abstractmethod
    def by_parameter(self) -> Mapping[str, float]:
        """The score of each weight, by parameter name; of weights without one, nothing."""

    @property
    @abstractmethod
    def stability(self) -> float | None:
        """Mean Spearman correlation of the layers' scores between single batches; None where there is none."""

    @property
    def meta(self) -> dict[str, Any]:
        """What else is to be known of this score."""
        return {}


@runtime_checkable
class GradientObserver(Protocol):
    """Sees the gradients of one backward pass, each of them once."""

    def weight(self, name: str, index: int, a: Tensor, b: Tensor) -> None:
        """The gradient aᵀ b of one matrix, laid out as the parameter is stored.

        Args:
            name: of the parameter.
            index: of the matrix in a 3-D parameter; 0 in a 2-D one.
            a: [tokens, rows of the matrix], in the dtype of the backward pass.
            b: [tokens, columns of the matrix], likewise.
        """

    def gradient(self, name: str, gradient: Tensor) -> None:
        """The whole gradient of a parameter that was not seen in products alone; dropped after this call."""
