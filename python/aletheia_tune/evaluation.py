"""Loss, and a classifier's accuracy, on examples that were held out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from aletheia_tune.data import Collator, Example
from aletheia_tune.errors import UserError
from aletheia_tune.quantised import kept_layout


def held_out_loss(
    model: nn.Module, examples: Sequence[Example], collator: Collator, batch_size: int
) -> float:
    """The loss that `held_out` gives."""
    return held_out(model, examples, collator, batch_size)[0]


@torch.no_grad()
def held_out(
    model: nn.Module, examples: Sequence[Example], collator: Collator, batch_size: int
) -> tuple[float, float | None]:
    """Mean cross entropy, in nats per label over all examples (not a mean of batch means), and a classifier's accuracy.

    A language model's labels are tokens, a classifier's the classes of texts; accuracy is the share of texts whose own
    class has the largest logit. The model runs in eval mode and is left in the mode it was in. Examples of like length
    share a batch.
    """
    device = next(model.parameters()).device
    ordered = sorted(examples, key=lambda example: len(example["input_ids"]), reverse=True)
    total, count = 0.0, 0
    right: int | None = None
    with _eval_mode(model):
        for start in range(0, len(ordered), batch_size):
            batch = {
                name: tensor.to(device)
                for name, tensor in collator(ordered[start : start + batch_size]).items()
            }
            labels = batch.pop("labels")
            if labels.dim() == 1:
                logits = model(**batch).logits
                right = (right or 0) + int((logits.argmax(-1) == labels).sum())
            else:
                logits, labels = model(**batch, use_cache=False).logits[:, :-1], labels[:, 1:]
            labelled = labels != -100
            # Only the labelled rows go to fp32: all of them would be the largest tensor of the run.
            total += F.cross_entropy(logits[labelled].float(), labels[labelled], reduction="sum").item()
            count += int(labelled.sum())
    if count == 0:
        raise UserError("the held-out examples have no labelled token after the first")
    return total / count, None if right is None else right / count


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with kept_layout(model):
            yield
    finally:
        model.train(was_training)
