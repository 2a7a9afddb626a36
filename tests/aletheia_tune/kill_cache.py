"""Kills a training while it builds its prefix cache, at random points, and trains again on what the dead process left.

    python tests/aletheia_tune/kill_cache.py --count 200

Every other process is killed from outside after a random time, the rest by themselves in the middle of a write to the
cache's files. Each time the adapter trained on the remains must be, bit by bit, the one trained without a cache.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from aletheia_tune import prefix_store
from aletheia_tune.prefix import cut_prefix
from aletheia_tune.prefix_cache import cache_prefix

EXAMPLES, BATCH, LENGTH, EPOCHS = 24, 4, 12, 2


def train(directory: Path | None) -> bytes:
    """The adapter after all epochs, in float32; with a cache in `directory` if one is given."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3]),
    ).train()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    ids = torch.randint(1, 61, (EXAMPLES, LENGTH))
    lengths = torch.randint(4, LENGTH + 1, (EXAMPLES, 1))
    mask = (torch.arange(LENGTH) < lengths).long()
    cut = cut_prefix(model)
    cache = None if directory is None else cache_prefix(model, cut, directory)
    for _ in range(EPOCHS):
        for order in torch.randperm(EXAMPLES).split(BATCH):
            labels = ids[order].masked_fill(mask[order] == 0, -100)
            model(input_ids=ids[order], attention_mask=mask[order], labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    if cache is not None:
        assert cache.reason == ""
        assert cache.hits + cache.stored == EPOCHS * EXAMPLES
        cache.remove()
    return b"".join(bytes(prefix_store.bytes_of(adapter)) for adapter in adapters)


def forked(act: Callable[[], object]) -> int:
    """The process id of a child that does this and exits with 0, or 1 after an exception."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        act()
        code = 0
    finally:
        os._exit(code)


def killed_while_writing(directory: Path, writes: int, share: float) -> None:
    """Train for so many writes to the cache's files; of the next, a share is done when the process dies."""
    writes_left = writes
    write = prefix_store._write

    def write_or_die(file: int, content: bytes | memoryview, offset: int) -> None:
        nonlocal writes_left
        if writes_left == 0:
            write(file, content[: int(share * len(content))], offset)
            _die()
        writes_left -= 1
        write(file, content, offset)

    prefix_store._write = write_or_die
    train(directory)


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill trainings that build a prefix cache, and train again.")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    draw = random.Random(options.seed)
    expected = train(None)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        child = forked(partial(train, whole))
        opened = _wait_for_records(whole, 0)
        building = _wait_for_records(whole, EXAMPLES) - opened
        os.waitpid(child, 0)
        found: Counter[str] = Counter()
        for number in range(options.count):
            directory = Path(scratch) / str(number)
            if number % 2:
                writes, share = draw.randrange(2 * EXAMPLES), draw.random()
                child = forked(partial(killed_while_writing, directory, writes, share))
            else:
                child = forked(partial(train, directory))
                _wait_for_records(directory, 0)
                time.sleep(draw.uniform(0, building))
                os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status) and os.WEXITSTATUS(status):
                print(f"kill {number}: the training failed before it was killed", file=sys.stderr)
                return 1
            found[_remains(directory)] += 1
            child = forked(partial(_check, directory, expected))
            _, status = os.waitpid(child, 0)
            if status:
                print(f"kill {number} (seed {options.seed}): another adapter, or a failure", file=sys.stderr)
                return 1
    left = ", ".join(f"{count} left {what}" for what, count in sorted(found.items()))
    print(f"{options.count} kills, every adapter as without a cache; {left}")
    return 0


def _wait_for_records(directory: Path, count: int) -> float:
    """Until so many examples are kept; then the time, in seconds on some clock."""
    while not any(
        path.stat().st_size >= count * prefix_store._RECORD_BYTES for path in directory.glob("*/index")
    ):
        time.sleep(1e-4)
    return time.perf_counter()


def _remains(directory: Path) -> str:
    sizes = [path.stat().st_size for path in directory.glob("*/index")]
    if not sizes or sizes[0] == 0:
        return "no entry"
    return "all entries" if sizes[0] >= EXAMPLES * prefix_store._RECORD_BYTES else "some entries"


def _check(directory: Path, expected: bytes) -> None:
    if train(directory) != expected:
        raise AssertionError("the adapter differs from the one trained without a cache")


if __name__ == "__main__":
    sys.exit(main())
