"""Gradient energy inside rank r: how much of a weight's gradient an update of rank r could follow.

For the gradient G = aᵀ b of a weight, a random Ω [columns, r] and Q an orthonormal basis of the columns of G Ω,

    share(W) = Σ over batches ‖Qᵀ G‖² / Σ over batches ‖G‖²

(the randomised range finder of Halko, Martinsson and Tropp, arXiv 0909.4061, without oversampling). It is a *lower
bound* of the best share of rank r, Σ_{i ≤ r} σ_i² / Σ σ_i², and equals it where G has no more than rank r. A layer's
share is that of all its linears together. Neither G nor Qᵀ G is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from aletheia_kernels import weight_grad_norm_sq
from aletheia_tune.scores.collector import Collector
from aletheia_tune.scores.gradient import stability
from aletheia_tune.scores.saliency import sum_by_layer


class Energy(Collector):
    """The share of every weight's gradient energy that r random directions find, in float32 at least.

    Args:
        weights: the weights of the linears and the stacked experts, by name.
        layer_of: their layers.
        num_layers: how many layers the model has.
        rank: r; of a matrix with fewer rows or columns, as many as it has.
        seed: of Ω, which is drawn anew for every matrix and batch.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        layer_of: Mapping[str, int],
        num_layers: int,
        rank: int,
        seed: int,
    ) -> None:
        self._weights = tuple(weights)
        self._layer_of = dict(layer_of)
        self._num_layers = num_layers
        self._rank = rank
        self._generator = torch.Generator().manual_seed(seed)
        self._found: dict[str, list[Tensor]] = {}
        self._inside: list[dict[str, float]] = []
        self._total: list[dict[str, float]] = []

    def weight(self, name: str, index: int, a: Tensor, b: Tensor) -> None:
        """Adds one matrix, of gradient aᵀ b."""
        if name in self._weights:
            wide = torch.promote_types(a.dtype, torch.float32)
            a, b = a.to(wide), b.to(wide)
            q = self._basis(lambda omega: a.T @ (b @ omega), a.shape[1], b)
            self._add(name, weight_grad_norm_sq(b, a @ q))

    def gradient(self, name: str, gradient: Tensor) -> None:
        """Adds a whole weight."""
        if name in self._weights:
            g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            q = self._basis(lambda omega: g @ omega, g.shape[-2], g)
            self._add(name, torch.linalg.vector_norm(q.mT @ g).square())

    def _basis(self, times: Callable[[Tensor], Tensor], rows: int, like: Tensor) -> Tensor:
        columns = like.shape[-1]
        omega = torch.randn(columns, min(self._rank, rows, columns), generator=self._generator)
        return torch.linalg.qr(times(omega.to(like))).Q

    def _add(self, name: str, inside: Tensor) -> None:
        self._found.setdefault(name, []).append(inside)

    def discard(self) -> None:
        """Forgets what was added since the last batch."""
        self._found.clear()

    def add_batch(self, norm_sq: Mapping[str, float], standard_error: Mapping[str, float]) -> None:
        """One batch is over; the squared norms are the whole energy."""
        self._inside.append(
            {name: math.fsum(part.item() for part in self._found.get(name, ())) for name in self._weights}
        )
        self._total.append({name: norm_sq.get(name, 0.0) for name in self._weights})
        self.discard()

    @property
    def by_layer(self) -> tuple[float, ...]:
        """The share of each layer."""
        return tuple(self._layers(self._inside, self._total))

    @property
    def by_parameter(self) -> dict[str, float]:
        """The share of each weight."""
        return self._shares(self._inside, self._total)

    @property
    def batches(self) -> list[dict[str, float]]:
        """By batch, the share of every weight."""
        return [self._shares([i], [t]) for i, t in zip(self._inside, self._total, strict=True)]

    @property
    def stability(self) -> float | None:
        """Mean Spearman correlation of the layers' shares between single batches; None where there is none."""
        return stability([self._layers([i], [t]) for i, t in zip(self._inside, self._total, strict=True)])

    @property
    def meta(self) -> dict[str, Any]:
        """The rank."""
        return {"rank": self._rank}

    def _shares(
        self, inside: Sequence[Mapping[str, float]], total: Sequence[Mapping[str, float]]
    ) -> dict[str, float]:
        return {
            name: _share([batch[name] for batch in inside], [batch[name] for batch in total])
            for name in self._weights
        }

    def _layers(
        self, inside: Sequence[Mapping[str, float]], total: Sequence[Mapping[str, float]]
    ) -> list[float]:
        found, whole = (
            zip(*(sum_by_layer(batch, self._layer_of, self._num_layers) for batch in batches), strict=True)
            for batches in (inside, total)
        )
        return [_share(i, t) for i, t in zip(found, whole, strict=True)]


def _share(inside: Sequence[float], total: Sequence[float]) -> float:
    # Without a gradient there is nothing to follow. Rounding may lift a full share above 1.
    whole = math.fsum(total)
    return min(math.fsum(inside) / whole, 1.0) if whole > 0.0 else 0.0
