"""The examples of a batch in one row without padding, and what all of them begin with in it once.

Chat templates begin every example with the same tokens: those of a system message. A causal model's states of them are
the same in every example (`shared_keys`), so the row has them before the first example alone. Positions go on behind
them in each of the others, and a mask says what a token sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from aletheia_tune.data import IGNORED, Example
from aletheia_tune.shared_keys import shared_mask


@dataclass(frozen=True)
class PackingCollator:
    """Packed batches, as a DataLoader or a Trainer takes them.

    Attributes:
        share: whether what the examples of a batch begin with is in it once.
    """

    share: bool

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `labels` and `position_ids` [1, length] int64, with `attention_mask` where something is shared.

        The mask is boolean [1, 1, length, length]. Without one an example begins where positions start again at 0.
        """
        common = common_beginning(examples) if self.share else 0
        first, *others = examples
        rests = [first, *(_from(common, other) for other in others)]
        batch: dict[str, Tensor] = DataCollatorWithFlattening()(rests)
        if common:
            ends = list(accumulate(len(rest["input_ids"]) for rest in rests))
            starts = torch.tensor(ends[:-1])
            batch["position_ids"][:, ends[0] :] += common
            batch["attention_mask"] = shared_mask(common, starts, ends[-1])
        return batch


def common_beginning(examples: Sequence[Example]) -> int:
    """How many tokens all examples begin with, fewer than the shortest has.

    The last of them is followed by another token in each example, so its prediction must be one that is not learned:
    they end before the token that precedes an example's first label.
    """
    if len(examples) < 2:
        return 0
    columns = zip(*(example["input_ids"] for example in examples), strict=False)
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return min(same, *map(_unlearned, examples))


def _from(start: int, example: Example) -> Example:
    labels = example["labels"]
    assert not isinstance(labels, int)
    return {"input_ids": example["input_ids"][start:], "labels": labels[start:]}


def _unlearned(example: Example) -> int:
    labels = example["labels"]
    assert not isinstance(labels, int)
    return next((i for i, label in enumerate(labels[1:]) if label != IGNORED), len(labels) - 1)


def tokens_in(batch: dict[str, Tensor]) -> int:
    """Tokens that the examples of a packed batch have, each with its beginning."""
    positions = batch["position_ids"][0]
    ends = positions.diff(append=positions.new_full((1,), -1)) != 1
    return int((positions[ends] + 1).sum())
