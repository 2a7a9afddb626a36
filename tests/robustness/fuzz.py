"""Broken files, thousands a minute: whatever a reader is given, it reads it or says in one line what is wrong.

Each target starts from files that are right. They are cut, spliced, repeated and overwritten, in bytes and, where they
are JSON, in values; any exception but `UserError` is a find, kept with what caused it.

    python -m tests.robustness.fuzz --seconds 20 --json runs/fuzz.json
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from aletheia_tune.checkpoint import Checkpoint
from aletheia_tune.cost import Batch, Calibration, Coefficients, ModelShape, ModuleShape
from aletheia_tune.data import class_names, load_examples
from aletheia_tune.errors import UserError
from aletheia_tune.metrics import EvalRecord, StepRecord, TrainResult
from aletheia_tune.plan import Plan, uniform_plan
from aletheia_tune.prefix_store import RowStore
from aletheia_tune.race import ArmResult, RaceResult
from aletheia_tune.referee import read_task
from aletheia_tune.scores import ModuleScore, Scores

ROOT = Path(__file__).resolve().parents[2]
MOST_BYTES = 1 << 16
# Values that readers are known to stumble over.
VALUES: list[Any] = [
    None, True, False, 0, -1, 1e308, -1e308, 10**400, 2**63, 0.5, "", "x" * 999, "\x00", "é\udc80", [], {}, [[]],
    [None], {"": None}, "../../etc/passwd", "/dev/zero", "NaN", "__import__('os').abort()",
]  # fmt: skip
WORDS = [
    b"",
    b"\x00",
    b"\xff\xfe",
    b"{" * 2000,
    b"[" * 2000,
    b'"',
    b"\\",
    b"\n",
    b"NaN",
    b"-",
    b"1e999",
    b"\xf0\x9f",
]


@dataclass
class Target:
    """A reader of a file, and contents that it reads."""

    name: str
    seeds: list[bytes]
    read: Callable[[Path], Any]


def json_values(random_: random.Random, content: bytes) -> bytes:
    """The same JSON with one value in it replaced, taken out or doubled."""
    value = json.loads(content)
    paths: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, child in items:
            paths.append((node, key))
            walk(child)

    walk(value)
    if paths:
        node, key = random_.choice(paths)
        how = random_.randrange(3)
        if how == 0:
            node[key] = random_.choice(VALUES)
        elif how == 1:
            del node[key]
        elif isinstance(node, dict):
            node[random_.choice(["", "x", key + "." if isinstance(key, str) else "y"])] = node[key]
        else:
            node.append(node[key])
    return json.dumps(value).encode("utf-8", "surrogatepass")


def changed(random_: random.Random, content: bytes) -> bytes:
    """One to four changes of the bytes, or one of the values."""
    if random_.random() < 0.5:
        try:
            return json_values(random_, content)
        except (ValueError, RecursionError):
            pass
    for _ in range(random_.randint(1, 4)):
        start = random_.randint(0, len(content))
        end = min(len(content), start + random_.choice([0, 1, 2, 8, 64]))
        inserted = random_.choice([*WORDS, content[start:end] * 3, bytes([random_.randrange(256)])])
        content = content[:start] + inserted + content[end:]
        if random_.random() < 0.1:
            content = content[: random_.randint(0, len(content))]
    return content[:MOST_BYTES]


def tokenizer() -> PreTrainedTokenizerFast:
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefgh"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }} "
        "{% endgeneration %}{% else %}{{ message.content }} {% endif %}{% endfor %}"
    )
    return fast


def targets(directory: Path) -> list[Target]:
    """The readers, with files that they read; `directory` is where the inputs will stand."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    plan = uniform_plan(LlamaForCausalLM(config), rank=2)
    scores = Scores(
        "aletheia",
        (1.0, 2.0),
        {name: ModuleScore(int(name.split(".")[2]), 1.0, 16, 16, "mlp") for name in plan.modules},
        plan.layer_path,
        {"seconds": 1.0},
    )
    shapes = {name: ModuleShape(int(name.split(".")[2]), 16, 16, "mlp") for name in plan.modules}
    prices = Coefficients(**{one.name: 1e-9 for one in dataclasses.fields(Coefficients)})
    calibration = Calibration(ModelShape(shapes, 2, plan.layer_path, 16, 1000), Batch(2, 16), prices, {})
    training = TrainResult(
        history=(StepRecord(1, 1.0, 1.0, 2.0, 1e-3, 1.0, 9),),
        evals=(EvalRecord(0, 0.0, 2.0), EvalRecord(1, 1.0, 1.5)),
        trainable_parameters=10,
        peak_memory_mb=1.0,
        patch_report=None,
        head="",
        attention="",
        norms="",
        prefix_layers=0,
        stopped=None,
        config={"steps": 1},
        versions={},
    )
    race = RaceResult((ArmResult("arm", plan, True, training, None, None, 0.0),), {"model": "m"})
    words = tokenizer()
    lines = [
        b'{"prompt": "a b", "completion": "c d"}\n{"prompt": "a", "completion": "d e f"}\n',
        b'{"text": "a b c"}\n\n{"text": "d e"}\n',
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    ]
    labelled = [
        b'{"text": "a b c", "label": "x"}\n{"text": "d e", "label": "y"}\n{"text": "f", "label": "x"}\n',
        b'{"text": "a b c", "label": 10}\n{"text": "d e", "label": -2}\n',
    ]
    tasks = []
    for path in sorted((ROOT / "benchmarks" / "studies" / "tasks").glob("*.toml")):
        paths = rb'\b(model|train|eval|other_text|calibration) = "[^"]*"'
        tasks.append(re.sub(paths, rb'\1 = "\1"', path.read_bytes()))
    (directory / "model").mkdir()
    (directory / "model" / "config.json").touch()
    for name in ("train", "eval", "other_text", "calibration"):
        (directory / name).touch()
    store_path = directory / "store"

    def read_labelled(path: Path) -> None:
        load_examples(path, words, max_length=16, classes=class_names(path))

    def read_store(path: Path) -> None:
        store_path.mkdir(exist_ok=True)
        (store_path / "index").write_bytes(path.read_bytes())
        (store_path / "data").write_bytes(bytes(range(256)))
        store = RowStore(store_path, 4, torch.float32, 1 << 20)
        try:
            for number in range(4):
                rows = store.get(bytes([number]) * 16)
                assert rows is None or rows.shape[1] == 4
                store.put(bytes([number + 9]) * 16, torch.ones(2, 4))
        finally:
            store.close()

    whole = RowStore(store_path, 4, torch.float32, 1 << 20)
    for number in range(4):
        whole.put(bytes([number]) * 16, torch.full((2, 4), float(number)))
    whole.close()
    index = (store_path / "index").read_bytes()
    weights = [torch.nn.Parameter(torch.ones(2, 3))]
    weights[0].grad = torch.ones(2, 3)
    optimizer = torch.optim.AdamW(weights)
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    named = {"A": weights[0]}
    checkpoint_path = directory / "checkpoint"
    Checkpoint.of(1, {}, named, named, optimizer, scheduler, {}, {}).write(checkpoint_path)
    return [
        Target("plan", [plan.to_json().encode()], lambda path: Plan.from_json(path.read_text("utf-8"))),
        Target("scores", [scores.to_json().encode()], lambda path: Scores.from_json(path.read_text("utf-8"))),
        Target(
            "calibration",
            [calibration.to_json().encode()],
            lambda path: Calibration.from_json(path.read_text("utf-8")),
        ),
        Target("race", [race.to_json().encode()], lambda path: RaceResult.from_json(path.read_text("utf-8"))),
        Target("task", tasks, read_task),
        Target("examples", lines, lambda path: load_examples(path, words, max_length=16)),
        Target("labelled examples", labelled, read_labelled),
        Target("prefix index", [index], read_store),
        Target("checkpoint", [checkpoint_path.read_bytes()], Checkpoint.read),
    ]


def fuzz(seconds: float, seed: int) -> dict[str, Any]:
    """Executions, distinct inputs and finds, by target."""
    random_ = random.Random(seed)
    counts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        all_targets = targets(Path(directory))
        file = Path(directory) / "input"
        seen: dict[str, set[bytes]] = {target.name: set() for target in all_targets}
        corpus = {target.name: list(target.seeds) for target in all_targets}
        for target in all_targets:
            counts[target.name] = {"executions": 0, "distinct": 0, "read": 0, "refused": 0, "finds": []}
            for content in target.seeds:
                file.write_bytes(content)
                target.read(file)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for target in all_targets:
                of = counts[target.name]
                content = changed(random_, random_.choice(corpus[target.name]))
                digest = hashlib.blake2b(content, digest_size=12).digest()
                of["executions"] += 1
                if digest not in seen[target.name]:
                    seen[target.name].add(digest)
                    of["distinct"] += 1
                file.write_bytes(content)
                try:
                    target.read(file)
                    of["read"] += 1
                    # What is still read leads further than what is refused at the door.
                    if len(corpus[target.name]) < 200:
                        corpus[target.name].append(content)
                except UserError as error:
                    of["refused"] += 1
                    if "\n" in str(error).strip() and target.name != "task":
                        of["finds"].append(
                            {"input": content.hex()[:4000], "error": f"more than one line: {error}"}
                        )
                except UnicodeDecodeError:
                    # The reader was not reached: the command line reads these files itself and says so.
                    of["refused"] += 1
                except Exception:
                    of["finds"].append(
                        {"input": content.hex()[:4000], "error": traceback.format_exc()[-1500:]}
                    )
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    counts = fuzz(options.seconds, options.seed)
    for name, of in counts.items():
        print(
            f"{name:13} {of['executions']:8,} executions, {of['distinct']:8,} distinct, {of['read']:7,} read, "
            f"{len(of['finds'])} finds"
        )
    finds = [(name, find) for name, of in counts.items() for find in of["finds"]]
    for name, find in finds[:5]:
        print(
            f"\n{name}: {bytes.fromhex(find['input'][: len(find['input']) // 2 * 2])[:300]!r}\n{find['error']}"
        )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        total = {key: sum(of[key] for of in counts.values()) for key in ("executions", "distinct")}
        result = {
            "seconds": options.seconds,
            "seed": options.seed,
            **total,
            "finds": len(finds),
            "targets": counts,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if finds else 0


if __name__ == "__main__":
    sys.exit(main())
