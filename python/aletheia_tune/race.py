"""The referee: ways to fine-tune one model, each in a process of its own, take turns on one machine.

Every arm gets the same data in the same order, the same batches, threads and allocator settings, and computes only
while it holds the baton, a few steps at a time: a machine that slows down or speeds up does so for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from transformers import TrainerCallback

from aletheia_kernels import tune_allocator
from aletheia_tune import files
from aletheia_tune.classification import numbered_classes
from aletheia_tune.data import Collator, Example, Fields, load_examples, pad_token_id
from aletheia_tune.errors import NonFiniteLoss, UserError
from aletheia_tune.evaluation import held_out_loss
from aletheia_tune.layers import positions_of
from aletheia_tune.loading import load_model
from aletheia_tune.metrics import TrainResult
from aletheia_tune.plan import Plan
from aletheia_tune.recipe import Recipe
from aletheia_tune.train import fine_tune
from aletheia_tune.training_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 512
WINDOWS = 16
# Before any update every arm is the same model; what they may differ by is rounding.
NOISE = {"bfloat16": 1e-2, "float32": 1e-4}
# What the examples of a step depend on.
BATCHES = ("batch_size", "gradient_accumulation", "group_by_length", "seed")
HEADER = (
    "arm",
    "adapted layers",
    "trainable parameters",
    "seconds a step (median, middle half)",
    "speed-up",
    "held-out loss",
    "other-text perplexity",
    "peak memory",
)


@dataclass(frozen=True)
class Arm:
    """One contestant: a plan, run on this package's operators (`kernels`) or on PEFT's own forward.

    Attributes:
        name: of the arm and of its directory.
        plan: what is adapted, or a recipe that the arm follows in its own process and on its own time.
        kernels: as in `TrainConfig`.
        config: how this arm is trained; None as the race says for all.
    """

    name: str
    plan: Plan | Recipe
    kernels: bool
    config: TrainConfig | None = None


@dataclass(frozen=True)
class ArmResult:
    """What one arm did.

    Attributes:
        name, plan, kernels: of the `Arm`.
        training: losses, times, memory and patch report; memory is that of the arm's process.
        plan_seconds: what the plan cost: probing and choosing, and the calibration that sampled depth took its prices
            from, whenever that was made; 0 for a plan that was given.
        perplexity_before, perplexity_after: of the other text, for forgetting; None without such a text.
    """

    name: str
    plan: Plan
    kernels: bool
    training: TrainResult
    perplexity_before: float | None
    perplexity_after: float | None
    plan_seconds: float = 0.0

    @property
    def start_seconds(self) -> float:
        """Seconds before the first step: making the plan, attaching the adapters, patching."""
        return self.plan_seconds + self.training.setup_seconds

    @property
    def seconds(self) -> float:
        """Seconds from the start to the end of the last step, evaluation left out."""
        return self.start_seconds + self.training.history[-1].seconds


@dataclass(frozen=True)
class RaceTable:
    """A race in words and numbers as they are shown: column heads, a row for each arm, and remarks."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class RaceResult:
    """All arms of a race in the order they were given; the first is what the others are compared with."""

    arms: tuple[ArmResult, ...]
    meta: dict[str, Any]

    @property
    def loss_unit(self) -> str:
        """What held-out loss is measured in."""
        return "nats a text" if self.meta.get("classes") else "nats a token"

    def to_json(self) -> str:
        """As JSON text, with a format name and a version."""
        arms = [
            {
                "name": arm.name,
                "kernels": arm.kernels,
                "plan": json.loads(arm.plan.to_json()),
                "training": arm.training.to_dict(),
                "perplexity_before": arm.perplexity_before,
                "perplexity_after": arm.perplexity_after,
                "plan_seconds": arm.plan_seconds,
            }
            for arm in self.arms
        ]
        content = {"format": "aletheia-race", "version": 1, "meta": self.meta, "arms": arms}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> RaceResult:
        """The race that `to_json` wrote.

        Raises:
            UserError: not such a text.
        """
        try:
            content = json.loads(text)
            if (content["format"], content["version"]) != ("aletheia-race", 1):
                raise UserError("this is not an aletheia race of version 1")
            arms = tuple(
                ArmResult(
                    name=arm["name"],
                    plan=Plan.from_json(json.dumps(arm["plan"])),
                    kernels=arm["kernels"],
                    training=TrainResult.from_dict(arm["training"]),
                    perplexity_before=arm["perplexity_before"],
                    perplexity_after=arm["perplexity_after"],
                    plan_seconds=arm.get("plan_seconds", 0.0),
                )
                for arm in content["arms"]
            )
            return RaceResult(arms, dict(content["meta"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"this is not an aletheia race of version 1: {error}") from error

    def objection(self) -> str | None:
        """Why no speed may be read off this race; None when it may.

        A speed counts only among arms that did the same work: finite losses, gradients that are not zero, and before
        the first update the same losses up to rounding.
        """
        for arm in self.arms:
            training = arm.training
            losses = [record.loss for record in training.history] + [record.loss for record in training.evals]
            if training.stopped or not training.history or not all(math.isfinite(loss) for loss in losses):
                return f"arm {arm.name} did not reach the end with finite losses"
            if not all(math.isfinite(record.grad_norm) for record in training.history):
                return f"a gradient of arm {arm.name} is not finite"
            if any(record.grad_norm == 0 for record in training.history):
                return f"the gradients of arm {arm.name} are zero in some step"
        first = self.arms[0]
        for arm in self.arms[1:]:
            pairs = [("held-out losses", first.training.eval_loss_before, arm.training.eval_loss_before)]
            if all(first.training.config.get(one) == arm.training.config.get(one) for one in BATCHES):
                steps = first.training.history[0].loss, arm.training.history[0].loss
                pairs.append(("losses of the first step", *steps))
            for what, mine, theirs in pairs:
                noise = max(NOISE[each.training.config["dtype"]] for each in (first, arm))
                if mine is not None and theirs is not None and abs(mine - theirs) > noise * abs(mine):
                    return (
                        f"before any update the {what} of {first.name} and {arm.name} differ: "
                        f"{mine:.4f} and {theirs:.4f}"
                    )
        return None

    def cells(self) -> RaceTable:
        """The table's text, for whoever draws it."""
        objection = self.objection()
        base = self.arms[0].training.step_seconds
        accuracy = self.arms[0].training.eval_accuracy_before is not None
        rows = []
        for arm in self.arms:
            training = arm.training
            seconds = training.step_seconds
            speedup = "none" if objection or not base or not seconds else f"{base / seconds:.2f} x"
            rows.append(
                (
                    arm.name,
                    f"{len(arm.plan.layers)} of {arm.plan.num_layers}",
                    f"{training.trainable_parameters:,}",
                    _spread([record.step_seconds for record in training.history]),
                    speedup,
                    _change(training.eval_loss_before, training.eval_loss_after, 4),
                    *(
                        (_change(training.eval_accuracy_before, training.eval_accuracy_after, 3),)
                        if accuracy
                        else ()
                    ),
                    _change(arm.perplexity_before, arm.perplexity_after, 2),
                    f"{training.peak_memory_mb:,.0f} MiB",
                )
            )
        other = f"{self.meta['other_text']} perplexity" if self.meta.get("other_text") else HEADER[6]
        notes = (f"No speed-up is given: {objection}.",) if objection else ()
        shown = (*HEADER[:6], *(("held-out accuracy",) if accuracy else ()), other, HEADER[7])
        return RaceTable(shown, tuple(rows), notes)

    def table(self) -> Table:
        """The table for a terminal; remarks stand under it."""
        cells = self.cells()
        table = Table(caption="\n".join(cells.notes) or None)
        for index, head in enumerate(cells.header):
            table.add_column(head, justify="left" if index == 0 else "right")
        for row in cells.rows:
            table.add_row(*row)
        return table


def race(
    arms: Sequence[Arm],
    model_dir: str | os.PathLike[str],
    train_path: str | os.PathLike[str],
    eval_path: str | os.PathLike[str],
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    fields: Fields | None = None,
    extra_text: str | None = None,
    extra_text_name: str = "other-text",
    slice_steps: int = 5,
    overwrite: bool = False,
) -> RaceResult:
    """Train every arm for the same steps, in turns of `slice_steps`, and compare them.

    Call it from a module that can be imported without side effects (guard scripts by `if __name__ ==
    "__main__"`): every arm is a process of its own, which imports it. What the libraries read from the environment when
    they are imported is, on Linux, what it was at a program's first race.

    Args:
        arms: at least one, of different names; the first is the baseline.
        model_dir: as `load_model` takes it; each arm loads its own copy.
        train_path, eval_path: jsonl files; of texts to classify (see `data.class_names`), every arm trains a
            classifier, whose head is new and the same in all of them.
        config: for all arms; `kernels` comes from the arm.
        out: directory for `race.json` and one directory an arm, as `fine_tune` writes it.
        fields: names of the fields in the jsonl files.
        extra_text: text of another kind, whose perplexity before and after tells of forgetting.
        extra_text_name: what that text is, for the table's head.
        slice_steps: steps in a turn; an arm of its own number of steps takes turns in proportion, so that all arms
            are equally far at any time.
        overwrite: replace a directory that is there.

    Returns:
        The race; `objection()` says whether its speeds may be read.

    Raises:
        UserError: any arm's, with its name before it; the other arms are stopped and nothing is written. Labels as
            `data.class_names` refuses them; a text of another kind with a classifier, which gives it no perplexity.
        RuntimeError: an arm failed otherwise, with that arm's traceback.
    """
    names = [arm.name for arm in arms]
    usable = [name for name in names if Path(name).name == name and name not in ("", "..", "race.json")]
    if not arms or len(set(usable)) < len(names):
        raise UserError(f"arms need different names that can be directory names, got {names}")
    if slice_steps < 1:
        raise UserError(f"slice is {slice_steps} steps: it must be at least 1")
    classes = numbered_classes(model_dir, train_path, fields)
    if classes is not None and extra_text is not None:
        raise UserError("a classifier has no perplexity: leave the other text out")
    with files.output_directory(out, overwrite) as directory:
        tasks = []
        for arm in arms:
            own = arm.config or config
            pace = own.steps / config.steps if own.steps and config.steps else 1.0
            tasks.append(
                _Task(
                    arm=arm,
                    model_dir=str(model_dir),
                    train_path=str(train_path),
                    eval_path=str(eval_path),
                    config=dataclasses.replace(own, kernels=arm.kernels, progress=False),
                    fields=fields,
                    classes=classes,
                    extra_text=extra_text,
                    slice_steps=max(1, round(slice_steps * pace)),
                    out=str(directory / arm.name),
                )
            )
        finished = _referee(tasks, config.progress)
        results = tuple(
            ArmResult(
                name=arm.name,
                plan=Plan.from_json(done["plan"]),
                kernels=arm.kernels,
                training=TrainResult.from_dict(done["training"]),
                perplexity_before=done["perplexity_before"],
                perplexity_after=done["perplexity_after"],
                plan_seconds=done["plan_seconds"],
            )
            for arm, done in zip(arms, finished, strict=True)
        )
        meta = {
            "model": str(model_dir),
            "train": str(train_path),
            "eval": str(eval_path),
            "classes": None if classes is None else list(classes),
            "slice_steps": slice_steps,
            "other_text": extra_text_name if extra_text is not None else None,
            "allocator": "tuned" if all(done["allocator_tuned"] for done in finished) else "as it comes",
        }
        result = RaceResult(results, meta)
        files.write_text(directory / "race.json", result.to_json())
    return result


def text_perplexity(model: Any, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """exp of the mean loss a token over up to 16 windows of 512 tokens, spread evenly over the text.

    Windows are shorter where the model has positions for fewer tokens.

    Raises:
        UserError: the text has fewer than two tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise UserError("the other text has fewer than two tokens: give a longer one")
    most = positions_of(model)
    width = WINDOW if most is None else min(WINDOW, most)
    whole = [ids[start : start + width] for start in range(0, len(ids) - width + 1, width)] or [ids]
    count = min(WINDOWS, len(whole))
    windows = [whole[index * len(whole) // count] for index in range(count)]
    examples: list[Example] = [{"input_ids": window, "labels": window} for window in windows]
    # One window at a time, so that this never is what sets the peak memory of a run.
    return math.exp(held_out_loss(model, examples, Collator(pad_token_id(tokenizer), most), 1))


@dataclass(frozen=True)
class _Task:
    """All that a child process needs to run an arm."""

    arm: Arm
    model_dir: str
    train_path: str
    eval_path: str
    config: TrainConfig
    fields: Fields | None
    classes: tuple[str, ...] | None
    extra_text: str | None
    slice_steps: int
    out: str


# Messages from an arm: ("turn", steps done, steps in all, last loss) gives the baton back and asks for it
# again; ("done", result), ("error", kind, text) end it. The referee's only message is "go".


def _run_arm(task: _Task, pipe: Connection, environment: dict[str, str]) -> None:
    # Ctrl-C reaches every process of the terminal; the referee ends the arms, which would otherwise each say so.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update(environment)
    try:
        pipe.recv()
        pipe.send(("done", _compete(task, pipe)))
    except (EOFError, BrokenPipeError):  # the referee is gone
        return
    except NonFiniteLoss as error:
        pipe.send(("error", "nonfinite", (str(error), error.step)))
    except UserError as error:
        pipe.send(("error", "user", str(error)))
    except BaseException:
        pipe.send(("error", "unexpected", traceback.format_exc()))


def _compete(task: _Task, pipe: Connection) -> dict[str, Any]:
    config = task.config
    # In every arm, PEFT's own too: which of them pays for a page twice would depend on their histories.
    tuned = tune_allocator()
    model, tokenizer = load_model(task.model_dir, config.dtype, task.classes, config.seed)
    options = {
        "max_length": config.max_length,
        "positions": positions_of(model),
        "fields": task.fields,
        "classes": task.classes,
    }
    train = load_examples(task.train_path, tokenizer, **options)  # type: ignore[arg-type]
    held_out = load_examples(task.eval_path, tokenizer, name="eval", **options)  # type: ignore[arg-type]

    def perplexity(of: Any) -> float | None:
        if task.extra_text is None:
            return None
        return text_perplexity(of, tokenizer, task.extra_text)

    before = perplexity(model)
    started = time.perf_counter()
    plan, plan_seconds = task.arm.plan, 0.0
    if isinstance(plan, Recipe):
        recipe = plan
        plan = recipe.plan(model, tokenizer, train, config.seed)
        odds, calibration_seconds = recipe.odds(plan)
        if odds is not None:
            config = dataclasses.replace(config, sampled_depth=odds)
        plan_seconds = time.perf_counter() - started + calibration_seconds
    result = fine_tune(
        model, tokenizer, train, held_out, plan, config, task.out, [_Turns(pipe, task.slice_steps)]
    )
    return {
        "plan": plan.to_json(),
        "plan_seconds": plan_seconds,
        "allocator_tuned": tuned,
        "training": result.to_dict(),
        "perplexity_before": before,
        "perplexity_after": perplexity(result.model),
    }


class _Turns(TrainerCallback):
    """Before every slice of steps, if there are several, hands the baton on and waits, which is in no step's time."""

    def __init__(self, pipe: Connection, slice_steps: int) -> None:
        self.pipe = pipe
        self.slice_steps = slice_steps
        self.loss = math.nan

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # An arm of one turn keeps the baton from its start: of such arms no two models are in memory at once.
        if state.global_step % self.slice_steps == 0 and self.slice_steps < state.max_steps:
            self.pipe.send(("turn", state.global_step, state.max_steps, self.loss))
            self.pipe.recv()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = float((logs or {}).get("loss", self.loss))


def _referee(tasks: Sequence[_Task], show: bool) -> list[dict[str, Any]]:
    """Run the tasks in turns, one at a time, and return what each came to."""
    context = _processes()
    finished: dict[int, dict[str, Any]] = {}
    running: dict[int, tuple[BaseProcess, Connection]] = {}
    try:
        with _scoreboard([task.arm.name for task in tasks], show) as update:
            while len(finished) < len(tasks):
                for index, task in enumerate(tasks):
                    if index in finished:
                        continue
                    if index not in running:
                        # Not before its turn: to import all that it needs would be to compute beside another arm.
                        running[index] = _start(context, task)
                    process, pipe = running[index]
                    message = _turn(task.arm.name, process, pipe)
                    if message[0] == "turn":
                        update(index, *message[1:])
                    elif message[0] == "done":
                        finished[index] = message[1]
                        process.join()
                        del running[index]
                    else:
                        _raise(task.arm.name, *message[1:])
    finally:
        for process, pipe in running.values():
            process.terminate()
            pipe.close()
        for process, _ in running.values():
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
    return [finished[index] for index in range(len(tasks))]


def _processes() -> BaseContext:
    """How to start an arm: a new process, on Linux a fork of one that has done nothing but import what arms need.

    Importing takes seconds, and the search of rates starts an arm for each of them. Beside a card nothing is
    forked: libraries that look for one as they are imported may leave a fork without it. What forks is asked
    through a socket in the temporary directory, whose path has at most 107 characters, 32 of them multiprocessing's
    own.
    """
    too_deep = len(os.fsencode(tempfile.gettempdir())) > 107 - 32
    if sys.platform != "linux" or torch.accelerator.is_available() or too_deep:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers.trainer"])
    return context


def _start(context: BaseContext, task: _Task) -> tuple[BaseProcess, Connection]:
    """A process for an arm, which waits for the baton."""
    ours, theirs = context.Pipe()
    given = (task, theirs, dict(os.environ))
    process: BaseProcess = context.Process(target=_run_arm, args=given, daemon=True)  # type: ignore[attr-defined]
    process.start()
    theirs.close()
    return process, ours


def _turn(name: str, process: BaseProcess, pipe: Connection) -> Any:
    """Let an arm compute until it gives the baton back or ends."""
    try:
        pipe.send("go")
        wait([pipe, process.sentinel])
        if pipe.poll():
            return pipe.recv()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass
    process.join()
    code = process.exitcode
    what = (
        f"killed by signal {-code} (out of memory?)"
        if code is not None and code < 0
        else f"ended with code {code}"
    )
    raise UserError(f"arm {name}: its process was {what} before it was done")


def _raise(name: str, kind: str, content: Any) -> None:
    if kind == "nonfinite":
        # The arm's own output directory goes with the race's, so its message's last part would not be true here.
        text, step = content
        raise NonFiniteLoss(
            f"arm {name}: {text.split(';')[0]}; the race is void and nothing was written", step=step
        )
    if kind == "user":
        raise UserError(f"arm {name}: {content}")
    raise RuntimeError(f"arm {name} failed:\n{content}")


@contextlib.contextmanager
def _scoreboard(names: Sequence[str], show: bool) -> Iterator[Any]:
    """A function (arm, steps done, steps in all, loss) that shows how far each arm is, on stderr."""
    console = Console(stderr=True, quiet=not show)
    if not console.is_terminal:

        def line(index: int, done: int, total: int, loss: float) -> None:
            if done:
                console.print(f"{names[index]}: step {done}/{total}  loss {loss:.4f}", highlight=False)

        yield line
        return
    columns = (
        TextColumn("{task.fields[arm]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        tasks = [bar.add_task("", arm=name, total=None) for name in names]

        def advance(index: int, done: int, total: int, loss: float) -> None:
            text = f"loss {loss:.4f}" if done else "ready"
            bar.update(tasks[index], completed=done, total=total, description=text)

        yield advance


def _spread(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    median = statistics.median(seconds)
    if len(seconds) < 4:
        return f"{median:.3g}"
    low, _, high = statistics.quantiles(seconds, n=4)
    return f"{median:.3g} ({low:.3g} to {high:.3g})"


def _change(before: float | None, after: float | None, digits: int) -> str:
    shown = ["none" if value is None else f"{value:.{digits}f}" for value in (before, after)]
    return "none" if shown == ["none", "none"] else " -> ".join(shown)
