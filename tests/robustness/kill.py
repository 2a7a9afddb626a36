"""Kills trainings, the building of prefix caches and races at random points, and goes on from what the dead left.

    python -m tests.robustness.kill --count 100 --json runs/kill-test.json

Every other process is killed (SIGKILL) from outside after a random time, of a race either one arm or all processes at
once; the rest die by themselves in the middle of a random write to a file. What goes on may be killed again. In the
end every adapter must be, bit by bit, that of a run that nothing disturbed, with the same losses, and no file may be
left aside. Then, a fifth as often each: a disk that is full from a random step on (RLIMIT_FSIZE), and a batch in the
middle whose activations are NaN; both must end in one line, keep what was good, and go on.

Processes are forked, so that the libraries are imported once: the parent computes in one thread, which is all that a
fork keeps. The arms of a race are forked from a process of their own in use, and from this one here.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import psutil
import torch
import transformers
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from aletheia_tune import checkpoint, files, prefix_store, race
from aletheia_tune.data import load_examples
from aletheia_tune.environment import machine_facts, versions
from aletheia_tune.errors import UserError
from aletheia_tune.loading import load_model
from aletheia_tune.plan import Plan, uniform_plan
from aletheia_tune.referee import read_task, referee
from aletheia_tune.train import fine_tune
from aletheia_tune.training_config import TrainConfig
from tests.at_step import AtStep
from tests.robustness.fuzz import tokenizer
from tests.task_case import task_text

STEPS, EVERY = 10, 2
CONFIG = TrainConfig(
    steps=STEPS,
    batch_size=4,
    learning_rate=1e-2,
    dtype="float32",
    checkpoint_every=EVERY,
    eval_every=5,
    threads=1,
    progress=False,
)
ENDED = "ended before"
TRAININGS: tuple[dict[str, Any], ...] = (
    {"lora_plus": 4.0},
    {"gradient_accumulation": 2, "group_by_length": True, "schedule": "cosine"},
    {"sampled_depth": {2: 1.0, 3: 1.0}, "init": "gradient", "kernels": False},
)


@dataclass
class Work:
    """Something that takes a while and that the same call goes on with.

    Attributes:
        name: of the work.
        run: does it in a directory, from where it was stopped; with callbacks of the Trainer's kind if it is training.
        result: what must be equal, read from the directory.
        expected: the result of a run that nothing disturbed.
        seconds: that such a run takes. writes: that it makes to files.
    """

    name: str
    run: Callable[..., None]
    result: Callable[[Path], dict[str, Any]]
    expected: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    writes: int = 0
    trained: list[dict[str, Tensor]] = field(default_factory=list)


def make_files(directory: Path) -> None:
    """A model of four layers, examples and a race in `directory`."""
    words = tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(words), max_position_embeddings=64, bos_token_id=None, **sizes)
    )
    model.save_pretrained(directory / "model")
    words.save_pretrained(directory / "model")
    draw = random.Random(0)
    for name, count in {"train": 24, "eval": 6}.items():
        lines = []
        for _ in range(count):
            letters, length = ("abcdefgh" * 4)[draw.randrange(8) :], draw.randint(6, 20)
            lines.append({"prompt": " ".join(letters[:4]), "completion": " ".join(letters[4:length])})
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "task.toml").write_text(task_text("kill", "model", steps=12))


def train(
    given: Path, settings: dict[str, Any], plan: Plan, place: Path, callbacks: Sequence[Any] = ()
) -> None:
    out = place / "out"
    if (out / "metrics.json").exists() and not json.loads((out / "metrics.json").read_text())["stopped"]:
        return
    config = dataclasses.replace(CONFIG, **settings)
    if config.prefix_cache:
        config = dataclasses.replace(config, prefix_cache=str(place / config.prefix_cache))
    model, words = load_model(given / "model", config.dtype)
    examples, held_out = (load_examples(given / f"{name}.jsonl", words) for name in ("train", "eval"))
    fine_tune(model, words, examples, held_out, plan, config, out, callbacks, resume=True)


def trained(place: Path) -> dict[str, Any]:
    """The adapter and all that was measured but times."""
    metrics = json.loads((place / "out" / "metrics.json").read_text())
    timeless = ("step", "loss", "learning_rate", "grad_norm", "tokens")
    records = [
        {key: value for key, value in record.items() if key in timeless}
        for record in metrics["history"] + metrics["evals"]
    ]
    return {"adapter": (place / "out" / "adapter_model.safetensors").read_bytes(), "records": records}


def raced(place: Path) -> dict[str, Any]:
    """The adapters of all arms, but for those that were trained for as long as the clock said."""
    found = (place / "out").glob("*/*/adapter_model.safetensors")
    return {
        str(path.relative_to(place)): path.read_bytes() for path in found if "equal-time" not in str(path)
    }


def works(given: Path) -> list[Work]:
    model = load_model(given / "model", "float32")[0]
    everywhere = dataclasses.replace(uniform_plan(model, rank=3, layers=[2, 3]), dropout=0.1)
    above = uniform_plan(model, rank=3, layers=[2, 3])
    cache = {"prefix_cache": "cache", "kernels": False}

    def run_race(place: Path) -> None:
        referee(read_task(given / "task.toml"), place / "out", progress=False)

    made = [Work("train", partial(train, given, settings, everywhere), trained) for settings in TRAININGS]
    made.append(Work("cache", partial(train, given, cache, above), trained))
    made.append(Work("race", run_race, raced))
    return made


def forked(act: Callable[[], object], said: Path) -> int:
    """The process id of a child, leader of a group, that does this and exits as the command line would."""
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):  # it has ended already
            os.setpgid(child, child)
        return child
    code = 1
    try:
        os.setpgid(0, 0)
        act()
        code = 0
    except UserError as error:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # what is said is not part of the full disk
        said.write_text(str(error))
        code = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def outcome(child: int) -> int:
    """Its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_in_write(writes: int, share: float, act: Callable[[], object]) -> None:
    """Do it for so many writes to files; of the next, a share is done when the process dies."""
    left = writes

    def watched(write: Callable[..., None]) -> Callable[..., None]:
        def write_or_die(file: int, content: bytes, *rest: int) -> None:
            nonlocal left
            if left == 0:
                write(file, content[: int(share * len(content))], *rest)
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            write(file, content, *rest)

        return write_or_die

    files._write = watched(files._write)
    prefix_store._write = watched(prefix_store._write)
    act()


def count_writes(act: Callable[[], object]) -> int:
    count = 0

    def counted(write: Callable[..., None]) -> Callable[..., None]:
        def count_and_write(*given: Any) -> None:
            nonlocal count
            count += 1
            write(*given)

        return count_and_write

    before = files._write, prefix_store._write
    files._write, prefix_store._write = counted(before[0]), counted(before[1])
    try:
        act()
    finally:
        files._write, prefix_store._write = before
    return count


class Watch(TrainerCallback):
    """The adapter before each step."""

    def __init__(self, into: list[dict[str, Tensor]]) -> None:
        self.into = into

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.into.append({name: value.clone() for name, value in get_peft_model_state_dict(model).items()})


def break_batch(model: Any) -> None:
    """All activations of the batch that comes are NaN."""
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output * math.nan)


def fill_disk(size: int, model: Any = None) -> None:
    """No file may grow beyond so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def on_a_full_disk(size: int, act: Callable[[], object]) -> None:
    fill_disk(size)
    act()


def has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait_for(arm: psutil.Process) -> None:
    """Until a process that is not our child is no more: a fork shares its parent's locks, as a spawned arm does not."""
    with contextlib.suppress(psutil.NoSuchProcess):
        while arm.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1e-3)


class Trials:
    """Disturbs works, has them go on, and keeps account.

    Attributes:
        counts: by kind of disturbance and work, what happened how often.
        lost: what did not come out as it should.
    """

    def __init__(self, of: list[Work], scratch: Path, seed: int) -> None:
        self.works = of
        self.scratch = scratch
        self.seed = seed
        self.counts: dict[str, dict[str, Counter[str]]] = {}
        self.lost: list[dict[str, Any]] = []
        self.number = 0

    def draw(self, kind: str, index: int) -> random.Random:
        """What a trial draws from, whatever happened in the trials before."""
        return random.Random(f"{self.seed} {kind} {index}")

    def place(self) -> Path:
        self.number += 1
        place = self.scratch / f"trial-{self.number}"
        place.mkdir()
        return place

    def do(self, work: Work, place: Path, act: Callable[[], object] | None = None) -> tuple[int, str]:
        """Run it to its end, of whatever kind: exit code and what was said."""
        said = place / "said"
        said.unlink(missing_ok=True)
        code = outcome(forked(act or partial(work.run, place), said))
        return code, said.read_text() if said.exists() else ""

    def undisturbed(self) -> None:
        """What each work comes to, and how long it takes; also imports whatever is imported late."""
        for work in self.works:
            if work.name != "race":
                place = self.place()
                work.writes = count_writes(partial(work.run, place, [Watch(work.trained)]))
                work.expected = work.result(place)
        for work in self.works:
            place = self.place()
            started = time.perf_counter()
            code, said = self.do(work, place)
            work.seconds = time.perf_counter() - started
            if code:
                raise SystemExit(f"{work.name} fails undisturbed: {said}")
            if work.name == "race":
                work.expected = work.result(place)
            elif work.result(place) != work.expected:
                raise SystemExit(f"{work.name}: a forked process trains another adapter")
        # What a cache keeps is what is computed without it.
        plain, cached = self.place(), next(work for work in self.works if work.name == "cache")
        code, said = self.do(cached, plain, partial(cached.run.func, *_without_cache(cached), plain))  # type: ignore[attr-defined]
        if code or cached.result(plain) != cached.expected:
            raise SystemExit(f"cache: without one another adapter is trained {said}")

    def kill(self, count: int) -> None:
        """So many kills, in every fourth trial two of them; what had ended before does not count."""
        killed = 0
        for index in itertools.count():
            if killed == count:
                return
            draw = self.draw("kill", index)
            trainings, (cache, race_) = self.works[:-2], self.works[-2:]
            work = [draw.choice(trainings), cache, race_, draw.choice(trainings), cache][index % 5]
            place, ways = self.place(), [""]
            for _ in range(2 if index % 4 == 3 else 1):
                if killed < count and ways[-1] != ENDED:
                    ways.append(self._kill_once(work, place, draw))
                    killed += ways[-1] != ENDED
            wrong = next((way for way in ways if "code" in way), None)
            self._go_on("kill", work, place, ways[1:], wrong)

    def _kill_once(self, work: Work, place: Path, draw: random.Random) -> str:
        if work.writes and draw.random() < 0.5:
            act = partial(die_in_write, draw.randrange(work.writes), draw.random(), partial(work.run, place))
            code, _ = self.do(work, place, act)
            way, as_killed = "in a write", -signal.SIGKILL
        else:
            child = forked(partial(work.run, place), place / "said")
            until = time.perf_counter() + draw.uniform(0, work.seconds)
            while time.perf_counter() < until and not has_ended(child):
                time.sleep(1e-3)
            arms = psutil.Process(child).children() if work.name == "race" else []
            if arms and draw.random() < 0.5:
                os.kill(draw.choice(arms).pid, signal.SIGKILL)
                way, as_killed = "one arm", 2
            else:
                os.killpg(child, signal.SIGKILL)
                way, as_killed = "after a time", -signal.SIGKILL
            for arm in arms:
                wait_for(arm)
            code = outcome(child)
        # In the moment between an arm's result and its end nobody misses it.
        return {as_killed: way, 0: ENDED}.get(code, f"{way}, with code {code}")

    def fill(self, count: int) -> None:
        """A disk that is full: of a training from a random step on, of a race from the start."""
        for index in range(count):
            draw = self.draw("disk_full", index)
            work = [draw.choice(self.works[:-2]), *self.works[-2:]][index % 3]
            place = self.place()
            largest = max(len(value) for value in work.expected.values() if isinstance(value, bytes))
            size, step = draw.randrange(largest), draw.randint(1, STEPS)
            if work.name == "race":
                code, said = self.do(work, place, partial(on_a_full_disk, size, partial(work.run, place)))
                kept = True
            else:
                at = AtStep(step, partial(fill_disk, size))
                code, said = self.do(work, place, partial(work.run, place, [at]))
                kept = last_checkpoint(place) == (step - 1) // EVERY * EVERY
            right = kept and code == 2 and "no space left" in said and "\n" not in said
            self._go_on("disk_full", work, place, ["ran out"], None if right else f"code {code}: {said}")

    def break_batches(self, count: int) -> None:
        """A batch of NaN at a random step: the last good adapter is kept, and training goes on from a checkpoint."""
        for index in range(count):
            draw = self.draw("nan_batch", index)
            work = [draw.choice(self.works[:-2]), self.works[-2]][index % 2]
            # In the first epoch: later the cache would serve what the broken activations would have led to.
            place, step = self.place(), draw.randint(1, STEPS if work.name == "train" else STEPS // 2)
            code, said = self.do(work, place, partial(work.run, place, [AtStep(step, break_batch)]))
            right = code == 2 and f"at step {step}" in said and "\n" not in said
            # Good is what gave a finite loss: not yet what the last update made.
            if right and not holds(place / "out", work.trained[max(step - 2, 0)]):
                right, said = False, "what was kept is not the last good adapter"
            self._go_on("nan_batch", work, place, ["stopped"], None if right else f"code {code}: {said}")

    def _go_on(self, kind: str, work: Work, place: Path, ways: list[str], wrong: str | None = None) -> None:
        step = last_checkpoint(place)
        code, said = self.do(work, place)
        aside = [path.name for path in place.rglob(".*.partial-*")]
        if code:
            wrong = wrong or f"going on: code {code}: {said}"
        elif work.result(place) != work.expected:
            wrong = wrong or "another adapter or other losses"
        elif aside:
            wrong = wrong or f"left aside: {aside}"
        counts = self.counts.setdefault(kind, {}).setdefault(work.name, Counter())
        counts.update(["trials", "lost" if wrong else "equal", *ways])
        if work.name != "race" and ENDED not in ways:
            counts[f"went on after step {step}"] += 1
        if wrong:
            self.lost.append(
                {"kind": kind, "work": work.name, "trial": self.number, "ways": ways, "wrong": wrong}
            )


def last_checkpoint(place: Path) -> int:
    """The step of the training's checkpoint; 0 without one."""
    file = checkpoint.beside(place / "out")
    return checkpoint.Checkpoint.read(file).step if file.exists() else 0


def holds(out: Path, expected: dict[str, Tensor]) -> bool:
    found = load_file(out / "adapter_model.safetensors")
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def _without_cache(work: Work) -> tuple[Any, ...]:
    given, settings, plan = work.run.args  # type: ignore[attr-defined]
    return given, {**settings, "prefix_cache": None}, plan


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    fork = multiprocessing.get_context("fork")
    race._processes = lambda: fork
    transformers.utils.logging.disable_progress_bar()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch) / "given"
        given.mkdir()
        make_files(given)
        trials = Trials(works(given), Path(scratch), options.seed)
        trials.undisturbed()
        trials.kill(options.count)
        trials.fill(max(3, options.count // 5))
        trials.break_batches(max(2, options.count // 5))
    kinds = {"kill": "kills", "disk_full": "full disks", "nan_batch": "batches of NaN"}
    tried = {kind: sum(of["trials"] for of in trials.counts[kind].values()) for kind in kinds}
    equal = {kind: sum(of["equal"] for of in trials.counts[kind].values()) for kind in kinds}
    print(
        f"{options.count} kills in {tried['kill']} trials, {equal['kill']} of them as undisturbed; "
        + "; ".join(f"{tried[kind]} {kinds[kind]}, {equal[kind]} as undisturbed" for kind in list(kinds)[1:])
    )
    for kind, of in trials.counts.items():
        for name, counts in of.items():
            print(
                f"  {kinds[kind]}, {name}: " + ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
            )
    for one in trials.lost:
        print(f"lost (seed {options.seed}): {one}", file=sys.stderr)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {
            "kills": options.count,
            "seed": options.seed,
            "seconds": round(time.perf_counter() - started, 1),
            "tried": trials.counts,
            "lost": trials.lost,
            "machine": {**dict(machine_facts()), **versions()},
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if trials.lost else 0


if __name__ == "__main__":
    sys.exit(main())
