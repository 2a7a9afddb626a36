"""The studies' data under runs/studies: answers to word problems, bodies of documented functions, a play.

    python benchmarks/studies/data.py code
    python benchmarks/studies/data.py gsm8k --from DIR     # DIR holds GSM8K's train.jsonl and test.jsonl

The model is SmolLM2-135M-Instruct in runs/demo-cache, as `make run` converts it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import demo_data

from aletheia_tune import files
from aletheia_tune.errors import UserError

STUDIES = Path("runs/studies")
MODEL = Path("runs/demo-cache/SmolLM2-135M-Instruct")
SEED = 0
HELD_OUT = 64
# 8 windows of 512 tokens.
PLAY_CHARACTERS = 14_000


def word_problems(source: Path) -> None:
    """GSM8K's training problems, and a sample of its test problems, drawn once."""
    for name, part, count in (("train", "train", None), ("eval", "test", HELD_OUT)):
        path = source / f"{part}.jsonl"
        try:
            problems = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; give the directory of GSM8K's jsonl files") from None
        if count is not None:
            problems = random.Random(SEED).sample(problems, count)
        _write(
            f"gsm8k-{name}",
            ({"prompt": one["question"] + "\n", "completion": one["answer"]} for one in problems),
        )


def functions() -> None:
    """Documented functions of the standard library; those held out are of modules that training never sees."""
    train, held_out = STUDIES / "code-train.jsonl", STUDIES / "code-eval.jsonl"
    demo_data.write_stdlib_functions(train, held_out, seed=SEED, max_characters=1000, overwrite=True)
    lines = held_out.read_text(encoding="utf-8").splitlines(keepends=True)
    files.write_text(held_out, "".join(lines[:HELD_OUT]), overwrite=True)


def _write(name: str, records: Iterable[Mapping[str, str]]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    files.write_text(STUDIES / f"{name}.jsonl", text, overwrite=True)


def main() -> int:
    """Exit code 2 and one line when something is the user's to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("gsm8k", "code"))
    parser.add_argument(
        "--from", dest="source", type=Path, help="directory of GSM8K's train.jsonl and test.jsonl"
    )
    arguments = parser.parse_args()
    if arguments.task == "gsm8k" and arguments.source is None:
        parser.error("gsm8k needs --from DIR with its train.jsonl and test.jsonl")
    STUDIES.mkdir(parents=True, exist_ok=True)
    try:
        demo_data.smollm2(MODEL)
        files.write_text(STUDIES / "play.txt", demo_data.shakespeare_text()[:PLAY_CHARACTERS], overwrite=True)
        if arguments.task == "gsm8k":
            word_problems(arguments.source)
        else:
            functions()
    except UserError as error:
        print(f"data: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
