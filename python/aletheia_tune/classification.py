"""Sequence classifiers: which models are such, which of their parts are new, and how one is loaded for given classes.

Beside its backbone a classifier has a head, which is drawn at random where the checkpoint is of a bare encoder or of a
language model. A plan chooses among the backbone's layers; the head is trained with every plan and saved beside the
adapters (PEFT's ``modules_to_save``), because nobody could draw the same one again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers.utils import logging

from aletheia_tune.data import Fields, class_names, pad_token_id
from aletheia_tune.errors import UserError
from aletheia_tune.layers import bare_model, full_modules, positions_of

if TYPE_CHECKING:
    from peft.utils import ModulesToSaveWrapper
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def is_classifier(model: nn.Module) -> bool:
    """Whether a model, bare or in PEFT, gives one row of logits for a whole text."""
    return type(bare_model(model)).__name__.endswith("ForSequenceClassification")


def head_modules(model: nn.Module) -> list[str]:
    """The names of the modules that a classifier has beside its backbone, without those that hold no weight.

    BERT has one (``classifier``), Llama (``score``), DeBERTa two (``pooler``, ``classifier``); a model that is no
    classifier has none.
    """
    bare: Any = bare_model(model)
    if not is_classifier(bare):
        return []
    return [
        name
        for name, module in bare.named_children()
        if name != bare.base_model_prefix and any(True for _ in module.parameters())
    ]


def full_beside_head(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """What PEFT trains in full (`layers.full_modules`), by name in ``model``, without a classifier's head."""
    head = head_modules(model)
    heads = [wrapper for name, wrapper in full_modules(bare_model(model)).items() if name in head]
    return {name: wrapper for name, wrapper in full_modules(model).items() if wrapper not in heads}


def class_of(model: nn.Module) -> tuple[str, ...] | None:
    """The names of a classifier's classes in the order of their numbers; None for another model."""
    if not is_classifier(model):
        return None
    names = bare_model(model).config.id2label
    return tuple(names[number] for number in sorted(names))


def in_order_of(model_dir: str | os.PathLike[str], classes: Sequence[str]) -> tuple[str, ...]:
    """The classes as a checkpoint's head numbers them, where it names the same ones; otherwise as they are."""
    known = _names_in(str(model_dir))
    return known if sorted(known) == sorted(classes) else tuple(classes)


def numbered_classes(
    model_dir: str | os.PathLike[str], source: str | os.PathLike[str], fields: Fields | None = None
) -> tuple[str, ...] | None:
    """`data.class_names` of the data, in the order of `in_order_of`; None where there is nothing to classify."""
    found = class_names(source, fields)
    return None if found is None else in_order_of(model_dir, found)


def _names_in(source: str) -> tuple[str, ...]:
    try:
        names = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False).id2label
    except (OSError, ValueError, KeyError):  # `load_model` says what is wrong
        return ()
    return tuple(str(names[number]) for number in sorted(names or {}))


@contextlib.contextmanager
def errors_alone() -> Iterator[None]:
    """Of what transformers logs, its errors alone."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def load_classifier(
    source: str, tokenizer: PreTrainedTokenizerBase, classes: Sequence[str], seed: int, **options: Any
) -> PreTrainedModel:
    """A classifier from a checkpoint, with the checkpoint's head if it has one of as many classes, else with a new one.

    The tokenizer's limit of a text's length is lowered to the model's, and the model is told how batches are padded,
    which decoders need to find the last token of a text.

    Args:
        source: directory, or name on the hub.
        tokenizer: of the model.
        classes: names, whose places are their numbers; at least two (`in_order_of`: as the checkpoint numbers them).
        seed: of a new head; the global random state stays as it was.
        options: of `from_pretrained`.

    Raises:
        UserError: the checkpoint has a head for another number of classes, or for these in another order, or lacks
            weights of the backbone, which a saved adapter would not hold.
    """
    ordered = in_order_of(source, classes)
    if ordered != tuple(classes):
        raise UserError(
            f"the checkpoint numbers its classes {', '.join(ordered)}: give them in this order, here and to the data"
        )
    # What is missing is told below, and what is new is meant to be.
    with errors_alone(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            source,
            id2label=dict(enumerate(classes)),
            label2id={name: number for number, name in enumerate(classes)},
            problem_type="single_label_classification",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    other = sorted(str(key) for key, *_ in info["mismatched_keys"])
    if other:
        raise UserError(
            f"the checkpoint's {other[0]} is not for the data's {len(classes)} classes: give data with its classes, or "
            "a model without a head"
        )
    head = head_modules(model)
    lost = sorted(key for key in info["missing_keys"] if key.partition(".")[0] not in head)
    if lost:
        raise UserError(
            f"the checkpoint lacks {lost[0]} (of {len(lost)} weights under the head of {type(model).__name__}), which "
            "would be drawn anew at every load: give a checkpoint that has them"
        )
    config = model.config.get_text_config()
    config.pad_token_id = pad_token_id(tokenizer)
    most = positions_of(model)
    if most is None:  # without a table that ends, what the backbone was made for
        most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int):
        tokenizer.model_max_length = min(tokenizer.model_max_length, most)
    return model
