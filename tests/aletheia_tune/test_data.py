from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aletheia_tune.data import (
    Collator,
    Fields,
    batches,
    collate,
    load_examples,
    pad_token_id,
)
from aletheia_tune.errors import UserError

CHATML = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
# Shows only the last assistant turn as it is, as templates that hide earlier thinking do.
REWRITING = (
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' and not loop.last %}{{ '...' }}"
    "{% else %}{% generation %}{{ message['content'] + '</s>' }}{% endgeneration %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
# Shows tools and calls, as templates of models that were trained on them do.
CALLING = (
    "{% if tools %}{{ '<s>tools\n' + tools | map(attribute='name') | join(' ') + '</s>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<s>' + message['role'] + '\n' }}"
    "{% if 'tool_calls' in message %}"
    "{% for call in message['tool_calls'] %}{{ 'call ' + call['function']['name'] }}{% endfor %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
REFUSING = "{{ raise_exception('roles must alternate') }}"


def byte_tokenizer(template: str | None = None, **special: str | None) -> PreTrainedTokenizerFast:
    """One token a byte, two for special tokens, and merges of white space that reach over a line break."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline, space = "Ċ", "Ġ"
    merges = [(newline, space), (space, space), (newline + space, space)]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"bos_token": "<s>", "eos_token": "</s>", **special}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
    fast.chat_template = template
    return fast


PLAIN = byte_tokenizer()
CHAT = byte_tokenizer(CHATML)


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_back(example, tokenizer) -> tuple[str, str]:
    """The example's text, and what of it is learned."""
    learned = [label for label in example["labels"] if label != -100]
    return tokenizer.decode(example["input_ids"]), tokenizer.decode(learned)


def only(source, tokenizer, **options) -> tuple[str, str]:
    (example,) = load_examples(source, tokenizer, **options)
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (-100, token)
    return read_back(example, tokenizer)


# What is learned


def test_a_pair_without_a_template_learns_the_completion_and_eos():
    record = {"prompt": "2+2=", "completion": "4"}
    assert only([record], PLAIN) == ("2+2=4</s>", "4</s>")


def test_a_pair_with_a_template_is_a_user_and_an_assistant_turn():
    record = {"prompt": "2+2=", "completion": "4"}
    assert only([record], CHAT) == ("<s>user\n2+2=</s>\n<s>assistant\n4</s>\n", "4</s>")


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT])
def test_a_token_that_would_reach_over_the_boundary_is_split_there(tokenizer):
    record = {"prompt": "def f():\n", "completion": "  return\n  1"}
    assert PLAIN("\n  ", add_special_tokens=False)["input_ids"] != [
        *PLAIN("\n", add_special_tokens=False)["input_ids"],
        *PLAIN("  ", add_special_tokens=False)["input_ids"],
    ]
    text, learned = only([record], tokenizer)
    assert learned == "  return\n  1</s>"
    assert "f():\n" in text


def test_text_is_learned_whole():
    assert only([{"text": "abc"}], CHAT) == ("abc</s>", "abc</s>")


def test_only_the_assistants_turns_are_learned():
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": ""},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e?"},
    ]
    text, learned = only([{"messages": turns}], CHAT)
    assert text == "".join(f"<s>{turn['role']}\n{turn['content']}</s>\n" for turn in turns)
    assert learned == "b</s>d</s>"


def test_bos_comes_first_when_the_tokenizer_puts_it_there():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    assert only([{"prompt": "a", "completion": "b"}], tokenizer) == ("<s>ab</s>", "b</s>")
    assert only([{"text": "a"}], tokenizer) == ("<s>a</s>", "<s>a</s>")


def test_eos_is_not_doubled():
    assert only([{"text": "abc</s>"}], PLAIN)[0] == "abc</s>"


def test_a_template_that_rewrites_turns_is_masked_by_its_own_marks():
    turns = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
        {"role": "assistant", "content": "d"},
    ]
    tokenizer = byte_tokenizer(REWRITING)
    text, learned = only([{"messages": turns}], tokenizer)
    assert "..." in text
    # The marks of this template are around the user's turns too: whatever it marks is learned.
    assert learned == "a?</s>c?</s>d</s>"
    unmarked = REWRITING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(UserError, match=r"train record 1: .*template rewrites.*generation"):
        load_examples([{"messages": turns}], byte_tokenizer(unmarked))


def test_a_conversation_that_begins_with_the_assistant_cannot_be_masked():
    with pytest.raises(UserError, match=r"assistant's is the first"):
        load_examples([{"messages": [{"role": "assistant", "content": "hello"}]}], CHAT)


def said(*turns: str) -> list[dict[str, str]]:
    """Messages from "user: a?", "assistant: b" and the like."""
    return [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns]


def test_of_a_pair_of_message_lists_the_completions_assistant_turns_are_learned():
    prompt = said("system: be brief", "user: a?", "assistant: b", "user: c?")
    completion = said("assistant: d", "user: e?", "assistant: f")
    text, learned = only([{"prompt": prompt, "completion": completion}], CHAT)
    assert text == only([{"messages": [*prompt, *completion]}], CHAT)[0]
    assert learned == "d</s>f</s>"
    fields = Fields(prompt="x", completion="y")
    assert only([{"x": prompt, "y": completion}], CHAT, fields=fields) == (text, learned)


def test_what_a_template_marks_is_learned_of_the_completion_alone():
    # A reply is shown as dots once there is another, so that only the marks tell them apart.
    template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}<s>{% generation %}"
        "{{ message['content'] if loop.last else '...' }}</s>{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
    )
    prompt = said("user: a?", "assistant: b", "user: c?")
    record = {"prompt": prompt, "completion": said("assistant: d", "user: e?", "assistant: f")}
    assert only([record], byte_tokenizer(template)) == ("a?<s>...</s>c?<s>...</s>e?<s>f</s>", "...</s>f</s>")
    with pytest.raises(UserError, match=r"cannot be told apart"):
        # Of the prompt itself the last reply is shown, so that nothing says where it ends in the whole.
        load_examples([{"prompt": prompt[:2], "completion": record["completion"]}], byte_tokenizer(template))


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"place": "Oslo"}}}
TOOLS = [{"name": "weather"}, {"name": "time"}]


def test_content_in_parts_is_their_text_joined():
    parts = [{"type": "text", "text": "a", "image": None}, {"type": "text", "text": "?"}]
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    in_parts = [
        {"role": "user", "content": parts},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
    ]
    assert load_examples([{"messages": in_parts}], CHAT) == load_examples([{"messages": turns}], CHAT)


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("content", [{"content": None}, {}, {"content": ""}])
def test_a_turn_that_calls_a_tool_says_something(content, tools):
    turns = [
        *said("user: a?"),
        {"role": "assistant", **content, "tool_calls": [CALL]},
        # As a dataset gives it back, whose turns all have the same fields.
        {"role": "tool", "content": "rain", "tool_calls": None},
        {"role": "assistant", "content": "wet", "tool_calls": []},
    ]
    calling = byte_tokenizer(CALLING)
    text, learned = only([{"messages": turns, "tools": tools}], calling)
    assert text.startswith(
        "<s>tools\nweather time</s>\n<s>user\na?</s>\n<s>assistant\ncall weather</s>\n<s>tool\nrain"
    )
    assert learned == "call weather</s>wet</s>"
    pair = {"prompt": turns[:3], "completion": turns[3:], "tools": tools}
    assert only([pair], calling) == (text, "wet</s>")
    assert only([{"messages": turns}], calling)[0] == text.removeprefix("<s>tools\nweather time</s>\n")


def test_truncation_is_from_the_right_and_counted():
    records = [{"prompt": "abc", "completion": "defg"}, {"prompt": "abcdefgh", "completion": "i"}]
    examples = load_examples(records, PLAIN, max_length=5)
    assert [read_back(example, PLAIN) for example in examples] == [("abcde", "de")]
    assert (examples.truncated, examples.dropped) == (2, 1)


def test_no_more_is_kept_than_the_model_has_positions_for():
    records = [{"prompt": "abc", "completion": "defg"}, {"prompt": "abcdefgh", "completion": "i"}]
    examples = load_examples(records, PLAIN, positions=5)
    assert examples == load_examples(records, PLAIN, max_length=5)
    assert (examples.most, examples.truncated, examples.dropped) == (5, 2, 1)
    assert load_examples(records, PLAIN, max_length=4, positions=5).most == 4
    with pytest.raises(UserError, match=r"take a model of more positions \(now 5\)"):
        load_examples(records[1:], PLAIN, positions=5)


def test_an_example_whose_only_label_is_the_first_token_is_dropped():
    # No token precedes the first, so nothing predicts it and the mean loss would be 0 / 0.
    examples = load_examples([{"text": "ab"}, {"text": "</s>"}], PLAIN)
    assert (len(examples), examples.dropped) == (1, 1)


@pytest.mark.parametrize("tokenizer", [PLAIN, CHAT])
@pytest.mark.parametrize(
    ("records", "max_length"),
    [
        ([{"prompt": "long prompt", "completion": "x"}], 4),
        ([{"prompt": "a", "completion": ""}], 100),
        ([{"text": ""}], 100),
    ],
)
def test_no_completion_tokens_left(tokenizer, records, max_length):
    with pytest.raises(
        UserError, match=r"no completion tokens after masking or truncation.*raise --max-length"
    ):
        load_examples(records, tokenizer, max_length=max_length)


def test_messages_without_an_assistant_leave_nothing():
    with pytest.raises(UserError, match="no completion tokens"):
        load_examples([{"messages": [{"role": "user", "content": "a"}]}], CHAT)


# Where it comes from


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"prompt": st.text(max_size=20), "completion": st.text(min_size=1, max_size=20)}
        ),
        min_size=1,
        max_size=5,
    )
)
def test_a_jsonl_file_gives_back_its_texts_in_order(tmp_path_factory, records):
    path = write(tmp_path_factory.mktemp("data") / "data.jsonl", *records)
    examples = load_examples(path, PLAIN, max_length=10_000)
    assert [read_back(example, PLAIN)[1] for example in examples] == [
        f"{record['completion'].removesuffix('</s>')}</s>" for record in records
    ]
    assert examples == load_examples(records, PLAIN, max_length=10_000)


def test_line_ends_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "data.jsonl"
    separators = "\u2028\x85"  # line breaks to str.splitlines, not to JSON
    path.write_bytes(
        b"\xef\xbb\xbf"
        + b'{"text": "a"}\r\n\n'
        + json.dumps({"text": separators}, ensure_ascii=False).encode()
    )
    assert [read_back(e, PLAIN)[0] for e in load_examples(path, PLAIN)] == ["a</s>", f"{separators}</s>"]


def test_a_datasets_dataset():
    from datasets import Dataset

    data = Dataset.from_list(
        [{"prompt": "a", "completion": "b", "id": 1}, {"prompt": "c", "completion": "d", "id": 2}]
    )
    assert [read_back(e, PLAIN) for e in load_examples(data, PLAIN)] == [
        ("ab</s>", "b</s>"),
        ("cd</s>", "d</s>"),
    ]
    with pytest.raises(UserError, match="train data is a mapping with fields 'train'"):
        load_examples({"train": data}, PLAIN)


@pytest.mark.parametrize(
    ("fields", "learned"),
    [
        (Fields(prompt="question", completion="answer"), "d</s>"),
        (Fields(text="text"), "a</s>"),
        (Fields(messages="chat"), "f</s>"),
        (None, "b</s>"),
    ],
)
def test_named_fields_and_detection(fields, learned):
    record = {
        "text": "a",
        "prompt": "",
        "completion": "b",
        "question": "c",
        "answer": "d",
        "chat": [{"role": "user", "content": "e"}, {"role": "assistant", "content": "f"}],
    }
    assert only([record], CHAT, fields=fields)[1] == learned


@pytest.mark.parametrize(
    "fields",
    [
        Fields(),
        Fields(prompt="p"),
        Fields(completion="c"),
        Fields(text="t", messages="m"),
        Fields("p", "c", "t"),
    ],
)
def test_fields_of_no_or_several_formats(fields):
    with pytest.raises(UserError, match="name either"):
        load_examples([{"p": "", "c": "x", "t": "", "m": []}], PLAIN, fields=fields)


def test_half_of_a_surrogate_pair_in_what_a_template_shows():
    turns = [*said("user: a"), {"role": "assistant", "tool_calls": [{"function": {"name": "\ud800"}}]}]
    with pytest.raises(UserError, match="train record 1: the conversation has a lone surrogate"):
        load_examples([{"messages": turns}], byte_tokenizer(CALLING))


# Bad input: one line, the file and the line number

GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (GOOD + b'{"prompt": "a", \n', r"line 2: broken JSON: .* at column"),
        (GOOD + b"\n\nnot json\n", r"line 4: broken JSON"),
        (GOOD + b'["a"]\n', r"line 2: not an object but a list"),
        (b"3\n", r"line 1: not an object but a number"),
        (b"null\n", r"line 1: not an object but null"),
        (GOOD + b'{"prompt": "\xff"}\n', r"line 2: not UTF-8 \(byte 13\)"),
        (b"[" * 100_000, r"line 1: broken JSON"),
        (GOOD + b'{"prompt": "a"}\n', r"line 2: no field 'completion', only fields 'prompt'"),
        (GOOD + b"{}\n", r"line 2: no field 'prompt', only no fields"),
        (
            GOOD + b'{"prompt": 1, "completion": "b"}\n',
            r"line 2: field 'prompt' is not a string but a number",
        ),
        (GOOD + b'{"prompt": "a", "completion": null}\n', r"line 2: field 'completion' .* but null"),
        (GOOD + b'{"prompt": true, "completion": ""}\n', r"line 2: field 'prompt' .* but a boolean"),
        (GOOD + b'{"prompt": "\\ud800", "completion": ""}\n', r"line 2: field 'prompt' has a lone surrogate"),
        (b'{"question": "a"}\n', r"line 1: unknown format with fields 'question'"),
        (b'{"messages": []}\n', r"line 1: field 'messages' is an empty list"),
        (b'{"messages": "hi"}\n', r"line 1: field 'messages' is not a list of messages but a string"),
        (b'{"messages": ["hi"]}\n', r"line 1: message 1 is not an object but a string"),
        (b'{"messages": [{"role": "user"}]}\n', r"line 1: message 1: no field 'content', only fields 'role'"),
        (
            b'{"messages": [{"role": "user", "content": {"text": "a"}}]}\n',
            r"message 1: field 'content' is not a string but an object",
        ),
        (
            b'{"messages": [{"role": "user", "content": ["a"]}]}\n',
            r"message 1: content 1 is not an object but a string",
        ),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]}\n',
            r"message 1: content 2 is of type 'image': only text can be learned from",
        ),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}\n',
            r"message 1: content 1: no field 'text', only fields 'type'",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": null}]}\n',
            r"message 1: field 'content' .* but null",
        ),
        (
            b'{"messages": [{"role": "user", "content": null, "tool_calls": [{}]}]}\n',
            r"message 1: field 'content' is not a string but null",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "", "tool_calls": {}}]}\n',
            r"message 1: field 'tool_calls' is not a list of objects but an object",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}\n',
            r"message 1: tool_calls 1 is not an object but a number",
        ),
        (
            b'{"messages": [{"role": "user", "content": ""}], "tools": "[1"}\n',
            r"line 1: field 'tools' is a string of broken JSON",
        ),
        (b'{"messages": [{"role": "user", "content": ""}], "tools": [1]}\n', r"tools 1 is not an object"),
        (
            GOOD + b'{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}\n',
            r"line 2: field 'prompt' is a list and 'completion' is a string: give both as strings or both as lists",
        ),
        (
            b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n',
            r"line 1: field 'completion' is a list and 'prompt' is a string",
        ),
        (b'{"prompt": [], "completion": []}\n', r"line 1: field 'prompt' is an empty list: give"),
        (
            b'{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant"}]}\n',
            r"line 1: completion message 1: no field 'content'",
        ),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{}]}]}\n',
            r"line 1: the chat template refuses the conversation",
        ),
    ],
)
def test_a_bad_file_is_one_line_with_the_line_number(tmp_path, content, said):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        load_examples(path, CHAT)
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_a_directory(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
        load_examples(tmp_path / "none.jsonl", PLAIN)
    with pytest.raises(UserError, match="is a directory"):
        load_examples(str(tmp_path), PLAIN)


def test_what_a_tokenizer_must_have():
    with pytest.raises(UserError, match="needs a chat template"):
        load_examples([{"messages": [{"role": "user", "content": "a"}]}], PLAIN)
    with pytest.raises(UserError, match=r"'prompt' needs a chat template.*: give .* as strings instead"):
        load_examples([{"prompt": said("user: a"), "completion": said("assistant: b")}], PLAIN)
    with pytest.raises(UserError, match="no eos token"):
        load_examples([{"text": "a"}], byte_tokenizer(eos_token=None))
    with pytest.raises(UserError, match=r"train record 1: the chat template refuses .*roles must alternate"):
        load_examples([{"prompt": "a", "completion": "b"}], byte_tokenizer(REFUSING))
    with pytest.raises(UserError, match="max length 1 is too short"):
        load_examples([{"text": "a"}], PLAIN, max_length=1)


def test_pad_token_id_falls_back_to_eos():
    assert pad_token_id(PLAIN) == PLAIN.eos_token_id
    assert pad_token_id(byte_tokenizer(pad_token="<s>")) == PLAIN.bos_token_id
    with pytest.raises(UserError, match="neither a pad nor an eos token"):
        pad_token_id(byte_tokenizer(eos_token=None))


# Batches


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_collate_pads_on_the_right_to_a_multiple_of_8(lengths):
    examples = [{"input_ids": list(range(1, n + 1)), "labels": [-100, *range(2, n + 1)]} for n in lengths]
    batch = collate(examples, pad_token_id=0)
    width = batch["input_ids"].shape[1]
    assert width % 8 == 0
    assert 0 <= width - max(lengths) < 8
    for row, (example, n) in enumerate(zip(examples, lengths, strict=True)):
        assert batch["input_ids"][row].tolist() == example["input_ids"] + [0] * (width - n)
        assert batch["labels"][row].tolist() == example["labels"] + [-100] * (width - n)
        assert batch["attention_mask"][row].tolist() == [1] * n + [0] * (width - n)
    for key, tensor in Collator(0)(examples).items():
        assert tensor.dtype == torch.int64
        assert torch.equal(tensor, batch[key])


@pytest.mark.parametrize(("positions", "width"), [(None, 16), (11, 11), (12, 12), (16, 16), (100, 16)])
def test_padding_stays_within_the_models_positions(positions, width):
    examples = [{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 11)]
    assert Collator(0, positions)(examples)["input_ids"].shape == (2, width)
    (batch,) = batches(examples, 2, 0, seed=0, count=1, positions=positions)
    assert batch["input_ids"].shape == (2, width)


def test_batches_are_a_seeded_shuffle_without_repeats():
    examples = [{"input_ids": [i, i], "labels": [i, i]} for i in range(1, 11)]

    def firsts(**options) -> list[list[int]]:
        return [batch["input_ids"][:, 0].tolist() for batch in batches(examples, 3, 0, **options)]

    three = firsts(seed=0, count=3)
    assert [len(batch) for batch in three] == [3, 3, 3]
    assert len({i for batch in three for i in batch}) == 9
    assert firsts(seed=0, count=2) == three[:2]
    assert firsts(seed=1, count=3) != three
    every = firsts(seed=0, count=99)
    assert sorted(i for batch in every for i in batch) == list(range(1, 11))
    with pytest.raises(UserError, match="must both be 1 or more"):
        batches(examples, 0, 0, seed=0, count=1)
