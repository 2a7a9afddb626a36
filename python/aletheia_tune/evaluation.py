"""Loss, and a classifier's accuracy, on examples that were held out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
                # What a position puts out is for the token after it.
                labels = F.pad(labels[:, 1:], (0, 1), value=-100)
                wanted = labels != -100
                logits, labels = _labelled_logits(model, batch, wanted), labels[wanted]
            total += F.cross_entropy(logits.float(), labels, reduction="sum").item()
            count += len(labels)
    if count == 0:
        raise UserError("the held-out examples have no labelled token after the first")
    return total / count, None if right is None else right / count


def _labelled_logits(model: nn.Module, batch: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """Logits of the wanted positions, [rows, vocabulary]; those of all would be the largest tensor of a run.

    The output embedding is given the wanted positions as one sequence, where it is a module that reads all of them.
    """
    taken = False

    def take(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        nonlocal taken
        taken = bool(given) and given[0].shape[:-1] == wanted.shape
        return (given[0][wanted][None], *given[1:]) if taken else None

    head = getattr(model, "get_output_embeddings", lambda: None)()
    with contextlib.ExitStack() as undo:
        if isinstance(head, nn.Module):
            undo.callback(head.register_forward_pre_hook(take).remove)
        logits: Tensor = model(**batch, use_cache=False).logits
    return logits[0] if taken else logits[wanted]


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with kept_layout(model):
            yield
    finally:
        model.train(was_training)
