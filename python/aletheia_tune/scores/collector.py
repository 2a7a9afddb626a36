"""What the probe tells a score while it measures, and what it asks of it at the end.

Every collector hears of each batch's squared gradient norms. One that needs more says so by its type: an observer of
gradients is shown every weight's gradient, as the two factors whose product it is; an observer of the forward pass what
the layers put out and the linears take in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from aletheia_tune.errors import UserError


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
            b: [tokens, columns of the matrix], likewise; both in float32 where the loss was scaled for a float16 pass.
        """

    def gradient(self, name: str, gradient: Tensor) -> None:
        """The whole gradient of a parameter that was not seen in products alone; dropped after this call."""

    def discard(self) -> None:
        """The backward pass is run again: what was seen since the last whole batch is void."""


@runtime_checkable
class ForwardObserver(Protocol):
    """Sees what flows forward. It needs no gradients: where all collectors are such, no backward pass is run."""

    def begin(self, batch: Mapping[str, Any]) -> None:
        """The forward pass of a batch begins, or begins again: what was seen since the last whole batch is void."""

    def hidden(self, index: int, state: Tensor) -> None:
        """The hidden states [batch, tokens, hidden] under layer ``index``, or at the end those above the last one.

        As the layers hand them on: the norm that a model puts after its last layer is not in them.
        """

    def linear(self, name: str, x: Tensor) -> None:
        """The input [..., in] of a linear, by the name of its weight."""


def token_mask(batch: Mapping[str, Any]) -> Tensor:
    """Which tokens of a batch are no padding: bool [batch, tokens].

    Raises:
        UserError: an attention mask of another shape.
    """
    mask = batch.get("attention_mask")
    if mask is None:
        first = next(value for value in batch.values() if isinstance(value, Tensor))
        return torch.ones(first.shape[:2], dtype=torch.bool, device=first.device)
    if mask.dim() != 2:
        raise UserError(f"probe: attention_mask has shape {list(mask.shape)}; give one of [batch, tokens]")
    return mask.bool()
