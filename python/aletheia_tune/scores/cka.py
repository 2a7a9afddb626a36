"""How much a layer changes the geometry of the hidden states (layer-wise CKA, arXiv 2602.05988).

With R_l [samples, hidden] the state above layer l of one token an example, centred over the samples,

    score(l) = 1 − CKA(R_{l−1}, R_l),    CKA(X, Y) = ‖Xᵀ Y‖²_F / (‖Xᵀ X‖_F ‖Yᵀ Y‖_F)

in float32 at least, the denominator clamped at 1e-12. A module has the score of its weight's layer. Three
things differ from the authors': R_L is taken before the model's final norm, dropout is on where the model has any, and
encoders pool as decoders do, not the first token.

The published pooling takes each example's last token. Where every example ends alike (a newline, an end-of-text
token), the state under layer 0 is then the same for all and says nothing: "last-content" takes the last token before
the ending that all examples of a batch share, "mean" the mean over an example's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from aletheia_kernels import weight_grad_norm_sq
from aletheia_tune.errors import UserError
from aletheia_tune.scores.collector import Collector, token_mask
from aletheia_tune.scores.gradient import stability

Pooling = Literal["last", "last-content", "mean"]
_FEWEST = 3  # of two centred samples one is the other's negative, and every CKA is 1


class Cka(Collector):
    """Keeps one state an example and layer, and compares them at the end.

    Args:
        layer_of: the layers of the modules' weights, by name.
        num_layers: how many layers the model has.
        pooling: which token stands for an example.

    Raises:
        UserError: no such pooling.
    """

    def __init__(self, layer_of: Mapping[str, int], num_layers: int, pooling: Pooling) -> None:
        if pooling not in get_args(Pooling):
            raise UserError(
                f"probe: pooling {pooling!r} is not known; use one of {', '.join(get_args(Pooling))}"
            )
        self._layer_of = dict(layer_of)
        self._num_layers = num_layers
        self._pooling = pooling
        self._mask = torch.empty(0)
        self._last: Tensor | None = None
        self._seen: dict[int, Tensor] = {}
        self._batches: list[list[Tensor]] = []

    def begin(self, batch: Mapping[str, Any]) -> None:
        """A batch begins, or begins again."""
        self._seen.clear()
        self._mask = token_mask(batch)
        if self._pooling != "mean":
            back = _shared_ending(batch, self._mask) if self._pooling == "last-content" else 0
            # How many tokens of its example are left from each on; padding repeats what its neighbour has.
            left = self._mask.flip(1).cumsum(1).flip(1)
            self._last = ((left == back + 1) & self._mask).int().argmax(1)

    def hidden(self, index: int, state: Tensor) -> None:
        """Keeps one state an example."""
        wide = torch.promote_types(state.dtype, torch.float32)
        if self._last is not None:
            pooled = state[torch.arange(len(state), device=state.device), self._last].to(wide)
        else:
            mask = self._mask[..., None]
            pooled = torch.where(mask, state, 0.0).sum(1, dtype=wide) / mask.sum(1)
        self._seen[index] = pooled

    def linear(self, name: str, x: Tensor) -> None:
        """Nothing: this score knows layers alone."""

    def add_batch(self, norm_sq: Mapping[str, float], standard_error: Mapping[str, float]) -> None:
        """One batch is over."""
        missing = set(range(self._num_layers + 1)) - self._seen.keys()
        if missing:
            raise UserError(
                f"probe: method 'cka' saw no output of layer {max(min(missing) - 1, 0)}; all have to run"
            )
        self._batches.append([self._seen[index] for index in range(self._num_layers + 1)])
        self._seen.clear()

    @property
    def by_layer(self) -> tuple[float, ...]:
        """1 − CKA of each layer's input and output.

        Raises:
            UserError: fewer than three examples.
        """
        samples = sum(len(batch[0]) for batch in self._batches)
        if samples < _FEWEST:
            raise UserError(
                f"probe: method 'cka' was given {samples} example(s); it tells layers apart from {_FEWEST} on"
            )
        return tuple(_changes([torch.cat(states) for states in zip(*self._batches, strict=True)]))

    @property
    def by_parameter(self) -> dict[str, float]:
        """The score of each weight's layer."""
        layers = self.by_layer
        return {name: layers[layer] for name, layer in self._layer_of.items()}

    @property
    def stability(self) -> float | None:
        """Mean Spearman correlation of the scores between batches of three examples or more; None without two such."""
        return stability([_changes(batch) for batch in self._batches if len(batch[0]) >= _FEWEST])

    @property
    def meta(self) -> dict[str, Any]:
        """The pooling, and how many examples."""
        return {"pooling": self._pooling, "samples": sum(len(batch[0]) for batch in self._batches)}


def _changes(states: Sequence[Tensor]) -> list[float]:
    centred = [state - state.mean(0) for state in states]
    own = [weight_grad_norm_sq(x, x).sqrt() for x in centred]
    return [
        1.0 - (weight_grad_norm_sq(x, y) / (own_x * own_y).clamp(min=1e-12)).item()
        for (x, y), (own_x, own_y) in zip(pairwise(centred), pairwise(own), strict=True)
    ]


def _shared_ending(batch: Mapping[str, Any], mask: Tensor) -> int:
    """How many last tokens all examples of a batch have in common; of each example at least one token is left."""
    ids = batch.get("input_ids")
    if ids is None or len(ids) < 2:
        raise UserError(
            "probe: pooling 'last-content' finds the ending that examples share: give input_ids of at least two a batch"
        )
    endings = zip(*(reversed(row[real].tolist()) for row, real in zip(ids, mask, strict=True)), strict=False)
    shared = 0
    for tokens in endings:
        if len(set(tokens)) > 1:
            break
        shared += 1
    return min(shared, int(mask.sum(1).min()) - 1)
