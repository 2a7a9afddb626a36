"""Training examples: records of text in, tokens with masked labels and padded batches out.

A record is an object in one of three formats, told from the first record unless `Fields` names them:

* ``{"prompt": str, "completion": str}``: only the completion is learned. With a chat template in the
  tokenizer the prompt becomes a user turn and the completion the assistant's; without one they are joined and
  ended with eos. Both may be lists of messages instead, of which the completion's assistant turns are learned.
* ``{"messages": [{"role": str, "content": str}, ...]}``: only the assistant's turns are learned.
* ``{"text": str}``: every token is learned, and the eos that is appended.

In a list of messages content may be a list of parts, ``{"type": "text", "text": str}``, which are joined. An
assistant's turn with ``tool_calls`` needs none, and the record's ``tools`` (a list, or the JSON of one) are given to
the chat template.

Or it is a text to classify, ``{"text": str, "label": str | int}``: `class_names` finds the classes of such a file, and
with them the class is learned and no token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeGuard

import torch
from jinja2 import TemplateError
from torch import Tensor

from aletheia_tune.errors import UserError
from aletheia_tune.number_types import is_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is no target, as `torch.nn.functional.cross_entropy` and transformers have it."""

PAD_MULTIPLE = 8
_GENERATION_KEYWORD = "generation %}"


@dataclass(frozen=True)
class _Conversation:
    """Turns, of which the assistant's from the one numbered ``first`` on are learned, and the tools they may call."""

    turns: list[Mapping[str, Any]]
    first: int = 0
    tools: list[Any] | None = None

    def learns(self, position: int) -> bool:
        return position >= self.first and _speaks(self.turns[position])


@dataclass(frozen=True)
class Fields:
    """The names of the fields of a record: ``prompt`` with ``completion``, or ``text``, or ``messages``."""

    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    messages: str | None = None


class Example(TypedDict):
    """One tokenised record: ``labels`` is ``input_ids`` where a token is to be learned and -100 elsewhere.

    Of a text to classify it is the number of its class.
    """

    input_ids: list[int]
    labels: list[int] | int


class Examples(list[Example]):
    """Tokenised records in the order of their source, with how many of them did not fit.

    Attributes:
        most: tokens that a record could have, ``max_length`` or what the model has positions for.
        truncated: records cut to so many.
        dropped: records left out because no token was left to learn.
    """

    def __init__(
        self, examples: Iterable[Example] = (), *, most: int, truncated: int = 0, dropped: int = 0
    ) -> None:
        super().__init__(examples)
        self.most = most
        self.truncated = truncated
        self.dropped = dropped


def load_examples(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 1024,
    positions: int | None = None,
    fields: Fields | None = None,
    name: str = "train",
    classes: Sequence[str] | None = None,
) -> Examples:
    """Reads, tokenises and labels every record of ``source``; the same input gives the same examples in the same order.

    Args:
        source: the path of a UTF-8 file with one JSON object a line (blank lines are skipped), a
            `datasets.Dataset`, or any iterable of dicts.
        tokenizer: with a chat template for ``messages``, with an eos token otherwise.
        max_length: tokens kept of a record, at least 2; what is longer loses its end.
        positions: tokens that the model has positions for, as `layers.positions_of` gives them: no more are kept.
        fields: the names of the fields; without it the format is told from the first record.
        name: what to call a source that is not a file in messages.
        classes: of texts to classify, as `class_names` gives them: every record has ``text`` and ``label``, and the
            tokenizer's special tokens stand around what is kept of the text.

    Returns:
        At least one example. Each has a label other than -100 after its first token, which no token precedes
        to predict it; a record without one is dropped and counted.

    Raises:
        UserError: with the file and the line number (or the source's name and the record's number, from 1): a
            missing or unreadable file, a directory, no record at all, a line that is not UTF-8, not JSON or
            not an object, a record without the fields, a field of another type, a chat template that refuses
            a conversation or cannot be masked, a label that is none of the classes; and when no example is left.
    """
    if max_length < 2:
        raise UserError(
            f"max length {max_length} is too short: a token and its successor are needed, pass 2 or more"
        )
    most = max_length if positions is None else min(max_length, positions)
    label = str(source) if isinstance(source, (str, os.PathLike)) else name
    records = _records(source, name)
    if classes is not None:
        return _classified(records, tokenizer, classes, most, label, _label_names(source))

    named = _check_fields(fields) if fields is not None else None
    examples = Examples(most=most)
    for where, record in records:
        if named is None:
            named = _detect(record, where)
        said = _conversation(record, named, tokenizer, where)
        if isinstance(said, str):
            ids, labels = _tokenise_text(said, tokenizer, label)
        elif tokenizer.chat_template is None:
            ids, labels = _tokenise_pair(said.turns, tokenizer, label)
        else:
            ids, labels = _tokenise_chat(said, tokenizer, where)
        examples.truncated += len(ids) > most
        ids, labels = ids[:most], labels[:most]
        if all(token == IGNORED for token in labels[1:]):
            examples.dropped += 1
        else:
            examples.append({"input_ids": ids, "labels": labels})
    if named is None:
        raise UserError(f"{label} is empty: it needs at least one record")
    if not examples:
        longer = "raise --max-length" if most == max_length else "take a model of more positions"
        raise UserError(
            f"{label}: no completion tokens after masking or truncation in any of its "
            f"{examples.dropped} records: check the fields or {longer} (now {most})"
        )
    return examples


def class_names(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    fields: Fields | None = None,
    *,
    name: str = "train",
) -> tuple[str, ...] | None:
    """The classes of texts to classify, whose numbers are their places: integers ascending, or strings in their order.

    Of a `datasets.Dataset` whose ``label`` is a ``ClassLabel`` they are the names of that, in its order.

    Args:
        source: as `load_examples` takes it. It is one to classify when its first record has ``text`` and ``label``, and
            neither ``prompt`` and ``completion`` nor ``messages``.
        fields: names that are given mean that the text is learned, whatever stands beside it.
        name: as `load_examples` takes it.

    Returns:
        The labels, an integer as its digits; None where there is nothing to classify.

    Raises:
        UserError: as `load_examples` raises it; a record without a label, or with one that is neither a string nor
            an integer; one label alone.
    """
    if fields is not None:
        return None
    named = _label_names(source)
    labels: set[str | int] = set()
    for where, record in _records(source, name):
        if not labels and not (_detect(record, where).text and "label" in record):
            return None
        labels.add(_class(record, where, named))
    if not labels:
        return None
    names = {str(one) for one in labels}
    if len(names) == 1:
        only = next(iter(names))
        label = str(source) if isinstance(source, (str, os.PathLike)) else name
        raise UserError(
            f"{label}: every label is {only!r}: a classifier needs at least two (--text-field text learns the texts)"
        )
    if named is not None:
        return named
    whole = all(isinstance(one, int) for one in labels)
    return tuple(sorted(names, key=int) if whole else sorted(names))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's pad token, or its eos where it has none (padding is masked either
    way).

    Raises:
        UserError: the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError("the tokenizer has neither a pad nor an eos token: set one of them")


def collate(
    examples: Sequence[Example], pad_token_id: int, positions: int | None = None
) -> dict[str, Tensor]:
    """One batch of examples, padded on the right to a multiple of 8 tokens.

    Args:
        positions: tokens that the model has positions for, as `load_examples` takes it: no padding goes beyond them.

    Returns:
        ``input_ids``, ``attention_mask`` (0 on padding) and ``labels`` (-100 on padding), each int64 [batch,
        tokens]; of texts to classify ``labels`` is [batch].
    """
    longest = max(len(example["input_ids"]) for example in examples)
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    if positions is not None:
        width = max(longest, min(width, positions))
    shape = (len(examples), width)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    classifies = isinstance(examples[0]["labels"], int)
    labels = torch.full(shape[:1] if classifies else shape, IGNORED, dtype=torch.int64)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        input_ids[row, :length] = torch.tensor(example["input_ids"], dtype=torch.int64)
        attention_mask[row, :length] = 1
        place = row if classifies else (row, slice(length))
        labels[place] = torch.tensor(example["labels"], dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass(frozen=True)
class Collator:
    """`collate` with its padding token and the model's positions, as a DataLoader or a Trainer takes it."""

    pad_token_id: int
    positions: int | None = None

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        return collate(examples, self.pad_token_id, self.positions)


def batches(
    examples: Sequence[Example],
    batch_size: int,
    pad_token_id: int,
    *,
    seed: int,
    count: int,
    positions: int | None = None,
) -> list[dict[str, Tensor]]:
    """The first ``count`` collated batches of the examples shuffled by ``seed``; fewer where the examples run out."""
    if batch_size < 1 or count < 1:
        raise UserError(f"batch size {batch_size} and number of batches {count} must both be 1 or more")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    starts = range(0, min(len(order), count * batch_size), batch_size)
    return [
        collate([examples[i] for i in order[start : start + batch_size]], pad_token_id, positions)
        for start in starts
    ]


def _records(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]], name: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every record after the words that say where it stands."""
    return _read_jsonl(Path(source)) if isinstance(source, (str, os.PathLike)) else _number(source, name)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.is_dir():
        raise UserError(f"{path} is a directory: give a jsonl file")
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: give a jsonl file") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    with stream:
        # Split at b"\n" alone: inside JSON strings, other line breaks that str.splitlines knows are ordinary text.
        for number, line in enumerate(stream, start=1):
            where = f"{path} line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: not UTF-8 (byte {error.start + 1}): save the file as UTF-8"
                ) from error
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: broken JSON: {error.msg} at column {error.colno}") from error
            except (RecursionError, ValueError) as error:  # nested too deep, or a number of too many digits
                raise UserError(f"{where}: broken JSON: {error}") from error
            yield where, _check_object(record, where)


def _number(source: Iterable[Mapping[str, Any]], name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(source, Mapping):
        raise UserError(f"{name} data is a mapping with {_listed(source)}: give one of its splits")
    for number, record in enumerate(source, start=1):
        where = f"{name} record {number}"
        yield where, _check_object(record, where)


def _check_object(record: object, where: str) -> Mapping[str, Any]:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: not an object but {_type_name(record)}: one JSON object a line is needed")
    return record


def _check_fields(fields: Fields) -> Fields:
    pair = fields.prompt is not None, fields.completion is not None
    formats = any(pair) + (fields.text is not None) + (fields.messages is not None)
    if formats != 1 or any(pair) != all(pair):
        raise UserError("name either a prompt and a completion field, or a text field, or a messages field")
    return fields


def _detect(record: Mapping[str, Any], where: str) -> Fields:
    if "prompt" in record and "completion" in record:
        return Fields(prompt="prompt", completion="completion")
    if "messages" in record:
        return Fields(messages="messages")
    if "text" in record:
        return Fields(text="text")
    raise UserError(
        f"{where}: unknown format with {_listed(record)}: prompt and completion, messages or text is needed, "
        "or the names of the fields"
    )


def _conversation(
    record: Mapping[str, Any], fields: Fields, tokenizer: PreTrainedTokenizerBase, where: str
) -> _Conversation | str:
    """The record as a text or as turns; a pair of strings is a user's turn and the assistant's."""
    if fields.text is not None:
        return _string(record, fields.text, where)
    if fields.messages is not None:
        turns = _messages(record, fields.messages, f"{where}: message", where)
        _require_template(tokenizer, fields.messages, "give prompt and completion", where)
        return _Conversation(turns, tools=_tools(record, where))
    assert fields.prompt is not None
    assert fields.completion is not None
    pair = (fields.prompt, fields.completion)
    listed = [name for name in pair if _is_list(_field(record, name, where))]
    if not listed:
        prompt, completion = (_string(record, name, where) for name in pair)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _Conversation(turns)
    if len(listed) == 1:
        (other,) = set(pair) - set(listed)
        raise UserError(
            f"{where}: field {listed[0]!r} is a list and {other!r} is {_type_name(record[other])}: give both as "
            "strings or both as lists of messages"
        )
    asked, answered = (_messages(record, name, f"{where}: {name} message", where) for name in pair)
    _require_template(tokenizer, fields.prompt, "give prompt and completion as strings", where)
    return _Conversation([*asked, *answered], first=len(asked), tools=_tools(record, where))


def _messages(record: Mapping[str, Any], field: str, each: str, where: str) -> list[Mapping[str, Any]]:
    turns = _field(record, field, where)
    if not _is_list(turns):
        raise UserError(f"{where}: field {field!r} is not a list of messages but {_type_name(turns)}")
    if not turns:
        raise UserError(f"{where}: field {field!r} is an empty list: give at least one message")
    return [_message(turn, f"{each} {number}") for number, turn in enumerate(turns, start=1)]


def _message(turn: object, where: str) -> dict[str, Any]:
    """A turn without fields that are null or an empty list, which a dataset gives every turn if any turn has more."""
    if not isinstance(turn, Mapping):
        raise UserError(f"{where} is not an object but {_type_name(turn)}")
    role = _string(turn, "role", where)
    calls = turn.get("tool_calls")
    if calls is not None:
        _objects(calls, "tool_calls", where)
    said = dict(turn)
    if turn.get("content") is not None or not (role == "assistant" and calls):
        said["content"] = _content(turn, where)
    return {key: value for key, value in said.items() if key == "content" or value not in (None, [])}


def _content(turn: Mapping[str, Any], where: str) -> str:
    """What a turn says, which may be spread over parts of type text."""
    if not _is_list(turn.get("content")):
        return _string(turn, "content", where)
    parts = _objects(turn["content"], "content", where)
    texts = []
    for number, part in enumerate(parts, start=1):
        each = f"{where}: content {number}"
        kind = _string(part, "type", each)
        if kind != "text":
            raise UserError(f"{each} is of type {kind!r}: only text can be learned from")
        texts.append(_string(part, "text", each))
    return "".join(texts)


def _tools(record: Mapping[str, Any], where: str) -> list[Any] | None:
    """What the turns may call, as a list or, because of columns of one type, as the JSON of one."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (RecursionError, ValueError) as error:
            raise UserError(f"{where}: field 'tools' is a string of broken JSON: {error}") from error
    return [dict(tool) for tool in _objects(tools, "tools", where)] if tools else None


def _objects(value: object, field: str, where: str) -> Sequence[Mapping[str, Any]]:
    if not _is_list(value):
        raise UserError(f"{where}: field {field!r} is not a list of objects but {_type_name(value)}")
    for number, each in enumerate(value, start=1):
        if not isinstance(each, Mapping):
            raise UserError(f"{where}: {field} {number} is not an object but {_type_name(each)}")
    return value


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _require_template(tokenizer: PreTrainedTokenizerBase, field: str, mend: str, where: str) -> None:
    if tokenizer.chat_template is None:
        raise UserError(
            f"{where}: field {field!r} needs a chat template, which this model's tokenizer lacks: {mend} instead"
        )


def _speaks(turn: Mapping[str, Any]) -> bool:
    return turn["role"] == "assistant" and bool(turn.get("content") or turn.get("tool_calls"))


def _label_names(source: object) -> tuple[str, ...] | None:
    """What the integers in ``label`` stand for, where the source is a `datasets.Dataset` that says so."""
    features = getattr(source, "features", None)
    names = getattr(features["label"], "names", None) if features and "label" in features else None
    return tuple(names) if names else None


def _class(record: Mapping[str, Any], where: str, named: Sequence[str] | None = None) -> str | int:
    """The label of a text to classify, an integer by its name where it has one."""
    label = _field(record, "label", where)
    if isinstance(label, str):
        return _string(record, "label", where)
    if not is_whole(label):
        raise UserError(f"{where}: field 'label' is neither a string nor an integer but {_type_name(label)}")
    if named is None:
        return label
    if not 0 <= label < len(named):
        raise UserError(
            f"{where}: label {label} has no name: leave out texts without one of the {len(named)} classes"
        )
    return named[label]


def _classified(
    records: Iterable[tuple[str, Mapping[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str],
    most: int,
    label: str,
    named: Sequence[str] | None,
) -> Examples:
    """Texts with the number of their class, cut to what both ``most`` and the tokenizer allow."""
    number_of = {name: number for number, name in enumerate(classes)}
    examples = Examples(most=min(most, tokenizer.model_max_length))
    for where, record in records:
        text, name = _string(record, "text", where), str(_class(record, where, named))
        if name not in number_of:
            known = ", ".join(map(repr, classes[:8])) + (", ..." if len(classes) > 8 else "")
            raise UserError(f"{where}: label {name!r} is none of the training data's: {known}")
        ids = tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > examples.most:
            # Not cut by hand: what stands at the end of every text has to stay there.
            ids = tokenizer(text, truncation=True, max_length=examples.most, verbose=False)["input_ids"]
            examples.truncated += 1
        if ids:
            examples.append({"input_ids": list(ids), "labels": number_of[name]})
        else:
            examples.dropped += 1
    if not examples:
        raise UserError(f"{label} has no text with a token in it: it needs at least one")
    return examples


def _field(record: Mapping[str, Any], field: str, where: str) -> Any:
    if field not in record:
        raise UserError(f"{where}: no field {field!r}, only {_listed(record)}")
    return record[field]


def _string(record: Mapping[str, Any], field: str, where: str) -> str:
    value = _field(record, field, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {field!r} is not a string but {_type_name(value)}")
    _check_text(value, f"{where}: field {field!r}")
    return value


def _check_text(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no text
        raise UserError(f"{what} has a lone surrogate at character {error.start + 1}") from error


def _tokenise_text(text: str, tokenizer: PreTrainedTokenizerBase, label: str) -> tuple[list[int], list[int]]:
    if not text:
        return [], []
    ids = _ended(_leading_bos(tokenizer) + _ids(text, tokenizer), tokenizer, label)
    return ids, list(ids)


def _tokenise_pair(
    turns: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, label: str
) -> tuple[list[int], list[int]]:
    prompt, completion = _pieces([turn["content"] for turn in turns], tokenizer)
    prompt = _leading_bos(tokenizer) + prompt
    if turns[1]["content"]:
        completion = _ended(completion, tokenizer, label)
    return prompt + completion, [IGNORED] * len(prompt) + completion


def _tokenise_chat(
    said: _Conversation, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    """Labels each turn to be learned that says something, from where a reply would be asked for to the end of the turn.

    The conversation is rendered up to each such turn, without and with it. Where both are the beginning of
    the whole, the turn is what lies between. A template that rewrites earlier turns breaks this; it may mark
    the assistant's tokens itself (``{% generation %}``), and cannot be masked if it does not.
    """
    whole = _template(said, tokenizer, where, tokenize=False)
    _check_text(whole, f"{where}: the conversation")
    cuts = [0]
    for position in range(len(said.turns)):
        if said.learns(position):
            if position == 0:  # nothing asked for it, and templates cannot render a conversation of no turns
                return _mask_by_template(said, whole, tokenizer, where)
            before = _asked(said, position, tokenizer, where)
            upto = _template(said, tokenizer, where, count=position + 1, tokenize=False)
            if not (upto.startswith(before) and whole.startswith(upto) and len(before) >= cuts[-1]):
                return _mask_by_template(said, whole, tokenizer, where)
            cuts += [len(before), len(upto)]
    cuts.append(len(whole))
    ids: list[int] = []
    labels: list[int] = []
    pieces = _pieces([whole[start:end] for start, end in pairwise(cuts)], tokenizer)
    for number, piece in enumerate(pieces):
        learned = _turn_end(piece, tokenizer) if number % 2 else 0
        ids += piece
        labels += piece[:learned] + [IGNORED] * (len(piece) - learned)
    return ids, labels


def _pieces(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The tokens of each of some texts that follow each other.

    They are those of the joined text where its tokens end where the pieces do. Where a token would reach
    across (a line break that ends the prompt and the spaces that begin the completion), each piece is
    tokenised by itself: at generation the prompt's tokens are fixed before the completion is there.
    """
    ids = _ids("".join(texts), tokenizer)
    cuts = [0]
    for count in range(1, len(texts)):
        head = _ids("".join(texts[:count]), tokenizer)
        if ids[: len(head)] != head:
            return [_ids(text, tokenizer) for text in texts]
        cuts.append(len(head))
    cuts.append(len(ids))
    return [ids[start:end] for start, end in pairwise(cuts)]


def _turn_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int:
    # Generation stops at eos. The line break that templates put after it is nobody's prediction, and being
    # always the same it would flatter the loss.
    if tokenizer.eos_token_id in ids:
        return len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    return len(ids)


def _mask_by_template(
    said: _Conversation, whole: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[int]]:
    # The template marks every turn of the assistant, the prompt's among them.
    prompt = _asked(said, said.first, tokenizer, where) if any(map(_speaks, said.turns[: said.first])) else ""
    if _GENERATION_KEYWORD not in str(tokenizer.chat_template) or not whole.startswith(prompt):
        raise UserError(
            f"{where}: the assistant's tokens cannot be told apart, because the chat template rewrites "
            "earlier turns or the assistant's is the first: give prompt and completion, or a template that "
            "marks them with {% generation %}"
        )
    encoded = _template(
        said,
        tokenizer,
        where,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    ids = list(encoded["input_ids"])
    marked = zip(ids, encoded["assistant_masks"], encoded["offset_mapping"], strict=True)
    return ids, [token if learned and span[0] >= len(prompt) else IGNORED for token, learned, span in marked]


def _asked(said: _Conversation, count: int, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The first ``count`` turns, to where the next is asked for."""
    text: str = _template(said, tokenizer, where, count=count, tokenize=False, add_generation_prompt=True)
    return text


def _template(
    said: _Conversation,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    *,
    count: int | None = None,
    **options: Any,
) -> Any:
    turns = [dict(turn) for turn in said.turns[:count]]
    try:
        return tokenizer.apply_chat_template(turns, tools=said.tools, **options)
    except (
        TemplateError,
        TypeError,
    ) as error:  # one that joins a content of null to a string has no word of its own
        raise UserError(f"{where}: the chat template refuses the conversation: {error}") from error


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # verbose=False: a record longer than the model's window is cut later, no cause for the tokenizer to warn.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # What the tokenizer would put before a text, without what it would put after it: a prompt goes on.
    framed = tokenizer("", verbose=False)["input_ids"]
    return list(framed[:1]) if framed and framed[0] == tokenizer.bos_token_id else []


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase, label: str) -> list[int]:
    if tokenizer.eos_token_id is None:
        raise UserError(f"{label}: the tokenizer has no eos token to end an example with: set one")
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, int(tokenizer.eos_token_id)]


def _listed(names: Iterable[object]) -> str:
    found = [repr(name) for name in names]
    shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    return f"fields {shown}" if found else "no fields"


def _type_name(value: object) -> str:
    if value is None:
        return "null"
    for kind, name in (
        (bool, "a boolean"),
        ((int, float), "a number"),
        (str, "a string"),
        (Mapping, "an object"),
        (Sequence, "a list"),
    ):
        if isinstance(value, kind):
            return name
    return f"a {type(value).__name__}"
