"""Time to a target: does a way to fine-tune reach uniform LoRA's held-out loss sooner, and how much sooner?

A task file freezes model, data, seeds, batches and precision. Each arm first searches its own learning rate on the
first seed, over the same grid, which is widened until its best rate has a worse one on either side. Then, for each
seed, the arms run in turns on one machine. The baselines set the target: the lowest held-out loss that any of them
ends with, to be reached in the shortest time that any of them took, so that PEFT is met at its best in both. A
challenger's clock starts before its probe and stops at the first evaluation at or under the target; evaluation is in
nobody's time. At last the recommended challenger, and whichever others the task names, are trained again for as many
steps as the baselines' time holds at each one's pace, for the loss at equal time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from aletheia_tune import files
from aletheia_tune.environment import machine_facts, versions
from aletheia_tune.errors import NonFiniteLoss, UserError
from aletheia_tune.number_types import is_finite, is_whole
from aletheia_tune.race import Arm, ArmResult, RaceResult, RaceTable, race
from aletheia_tune.recipe import Recipe
from aletheia_tune.training_config import TrainConfig

# A baseline that has learned less than this share of its loss sets no target worth reaching.
LEARNED = 0.05
# Rates whose losses differ by less, as a share, are as good as each other: seeds differ by more.
TIE = 1e-3
# Times that a grid may grow by one rate at an edge before the search gives up.
WIDENINGS = 6
# Of the run at equal time, for its curve.
EQUAL_TIME_EVALUATIONS = 5
# Of a weight file, what tells it from another of the same shapes.
PAGE, SAMPLED_PAGES = 4096, 64
STATE = "task.json"
VERDICT = "verdict.json"


@dataclass(frozen=True)
class Contestant:
    """One arm of a task: how its plan is made and how it differs from the task's training.

    Attributes:
        name: of the arm; a directory name.
        baseline: runs on PEFT's own forwards and sets the target.
        recipe: how it comes by its plan.
        config: how it is trained, at a rate that the search replaces.
    """

    name: str
    baseline: bool
    recipe: Recipe
    config: TrainConfig

    def arm(self, rate: float, seed: int, steps: int | None = None) -> Arm:
        """This contestant at a rate, with a seed, for its own number of steps or another."""
        config = dataclasses.replace(
            self.config, learning_rate=rate, seed=seed, steps=self.config.steps if steps is None else steps
        )
        return Arm(self.name, self.recipe, not self.baseline, config)


@dataclass(frozen=True)
class RaceTask:
    """What a task file says.

    Attributes:
        name: of the task.
        model: model directory.
        train, eval: jsonl files.
        other_text: text of another kind, whose perplexity tells of forgetting; None without.
        rates: grid of learning rates, ascending, each arm's search starts from all of them.
        seeds: of the adapters' first weights and the order of the data.
        slices: turns that each arm takes in a race.
        recommended: the challenger whose figures stand first.
        equal_time: challengers that are trained again for the baselines' time, the recommended one among them.
        contestants: baselines first, as in the file.
    """

    name: str
    model: str
    train: str
    eval: str
    other_text: str | None
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    slices: int
    recommended: str
    equal_time: tuple[str, ...]
    contestants: tuple[Contestant, ...]

    @property
    def baselines(self) -> tuple[Contestant, ...]:
        return tuple(contestant for contestant in self.contestants if contestant.baseline)

    @property
    def challengers(self) -> tuple[Contestant, ...]:
        return tuple(contestant for contestant in self.contestants if not contestant.baseline)

    def digest(self) -> str:
        """A hash of the model (its configuration, tokenizer and a sample of its weights), data and calibrations."""
        content = hashlib.sha256()
        calibrations = sorted({one.recipe.calibration for one in self.contestants if one.recipe.calibration})
        shared = (Path(self.model) / "config.json", self.train, self.eval, self.other_text)
        for path in (*shared, *sorted(Path(self.model).glob("tokenizer*.json")), *calibrations):
            if path is not None:
                content.update(hashlib.sha256(Path(path).read_bytes()).digest())
        for path in sorted(Path(self.model).glob("*.safetensors")):
            content.update(_sampled(path))
        return content.hexdigest()


def _sampled(path: Path) -> bytes:
    """A hash of a file's length and of pages spread over it: weights that were trained anew differ nearly anywhere."""
    content = hashlib.sha256()
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        content.update(str(length).encode())
        for place in range(SAMPLED_PAGES):
            file.seek(max(length - PAGE, 0) * place // (SAMPLED_PAGES - 1))
            content.update(file.read(PAGE))
    return content.digest()


def read_task(path: str | os.PathLike[str]) -> RaceTask:
    """The task in a TOML file; paths in it are relative to the file.

    At the top `name`, `model`, `train`, `eval`, and optionally `other_text`, `rates`, `seeds`, `slices`,
    `recommended` (the last challenger by default) and `equal_time` (challengers to train for the baselines' time
    besides the recommended one); `[training]` holds any field of `TrainConfig`; each `[[baseline]]` and
    `[[challenger]]` has a `name`, optionally a `plan` table with fields of `Recipe`, and a `training` table that
    overrides the common one.

    Raises:
        UserError: no such file, not TOML, a key that is missing, unknown or of the wrong kind, a value that
            `TrainConfig` or `Recipe` refuses, a file of the task that is not there.
    """
    file = Path(path)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"task file {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"task file {path} is not TOML: {error}") from None
    try:
        return _task(content, file.parent)
    except UserError as error:
        raise UserError(f"task file {path}: {error}") from None


def _task(content: dict[str, Any], beside: Path) -> RaceTask:
    _only(
        content,
        "name model train eval other_text rates seeds slices recommended equal_time training baseline challenger",
        "the task",
    )
    text = {key: _get(content, key, str, "the task") for key in ("name", "model", "train", "eval")}
    other = _get(content, "other_text", str, "the task", None)
    paths = {key: str(beside / text[key]) for key in ("model", "train", "eval")}
    if other is not None:
        paths["other_text"] = str(beside / other)
    for key, place in paths.items():
        if not _is_there(place):
            raise UserError(f"{key} {place} does not exist")
        if key == "model" and not _is_there(os.path.join(place, "config.json")):
            raise UserError(f"model {place} has no config.json: give a directory that save_pretrained wrote")
        if key != "model" and not Path(place).is_file():
            raise UserError(f"{key} {place} is no file")
    rates = _numbers(content.get("rates", [5e-4, 1e-3, 2e-3]), "rates", float)
    if len(rates) < 3 or any(not rate > 0 for rate in rates) or sorted(set(rates)) != list(rates):
        raise UserError("rates: give at least three positive learning rates in ascending order")
    seeds = _numbers(content.get("seeds", [0, 1, 2]), "seeds", int)
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("seeds: give at least one, each once")
    slices = _get(content, "slices", int, "the task", 20)
    if slices < 1:
        raise UserError(f"slices is {slices}: it must be at least 1")
    common = _get(content, "training", dict, "the task", {})
    if "learning_rate" in common or "seed" in common or "kernels" in common:
        raise UserError(
            "[training] has no learning_rate (see rates), seed (see seeds) or kernels (baselines have none)"
        )
    contestants = tuple(
        _contestant(table, kind == "baseline", common, beside)
        for kind in ("baseline", "challenger")
        for table in _get(content, kind, list, "the task")
    )
    names = [contestant.name for contestant in contestants]
    if len(set(names)) < len(names):
        raise UserError(f"two arms have one name: {', '.join(names)}")
    challengers = [contestant.name for contestant in contestants if not contestant.baseline]
    if not challengers or len(challengers) == len(names):
        raise UserError("give at least one [[baseline]] and one [[challenger]]")
    recommended = _get(content, "recommended", str, "the task", challengers[-1])
    if recommended not in challengers:
        raise UserError(
            f"recommended {recommended!r} is no challenger: choose one of {', '.join(challengers)}"
        )
    wanted = _get(content, "equal_time", list, "the task", [])
    for name in wanted:
        if name not in challengers:
            raise UserError(f"equal_time has {name!r}, no challenger: choose of {', '.join(challengers)}")
    return RaceTask(
        name=text["name"],
        model=paths["model"],
        train=paths["train"],
        eval=paths["eval"],
        other_text=paths.get("other_text"),
        rates=rates,
        seeds=seeds,
        slices=slices,
        recommended=recommended,
        equal_time=tuple(name for name in challengers if name in (recommended, *wanted)),
        contestants=contestants,
    )


def _is_there(place: str) -> bool:
    try:
        return Path(place).exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _contestant(table: Any, baseline: bool, common: Mapping[str, Any], beside: Path) -> Contestant:
    if not isinstance(table, dict):
        raise UserError("[[baseline]] and [[challenger]] are tables")
    name = _get(table, "name", str, "an arm")
    _only(table, "name plan training", f"arm {name}")
    if Path(name).name != name or name in ("", "..", "race.json"):
        raise UserError(f"arm name {name!r} cannot be a directory name")
    recipe = dict(_get(table, "plan", dict, f"arm {name}", {}))
    if isinstance(recipe.get("targets"), list):
        recipe["targets"] = tuple(recipe["targets"])
    if isinstance(recipe.get("calibration"), str):
        recipe["calibration"] = str(beside / recipe["calibration"])
        if not _is_there(recipe["calibration"]):
            raise UserError(f"arm {name}: calibration {recipe['calibration']} does not exist")
    training = {**common, **_get(table, "training", dict, f"arm {name}", {})}
    if isinstance(training.get("sampled_depth"), dict):
        training["sampled_depth"] = _odds(training["sampled_depth"], name)
    for made, values, where in ((Recipe, recipe, "plan"), (TrainConfig, training, "training")):
        _only(values, " ".join(field.name for field in dataclasses.fields(made)), f"arm {name}, {where}")
    if "sampled_depth" in recipe and "sampled_depth" in training:
        raise UserError(f"arm {name}: sampled_depth is in its plan and in its training: give one")
    if training.get("steps") is None:
        raise UserError(f"arm {name}: training needs steps")
    try:
        return Contestant(
            name, baseline, Recipe(**recipe), TrainConfig(**{**training, "kernels": not baseline})
        )
    except TypeError as error:
        raise UserError(f"arm {name}: a value is of the wrong kind ({error})") from None
    except UserError as error:
        raise UserError(f"arm {name}: {error}") from None


def _odds(table: Mapping[str, Any], name: str) -> dict[int, Any]:
    """TOML's keys are text; layers are numbers."""
    try:
        return {int(layer): odds for layer, odds in table.items()}
    except ValueError:
        raise UserError(
            f"arm {name}: sampled_depth has {', '.join(table)} as layers: give their indices"
        ) from None


def _only(table: Mapping[str, Any], known: str, where: str) -> None:
    strays = [key for key in table if key not in known.split()]
    if strays:
        raise UserError(f"{where} has no key {strays[0]!r}; known are {', '.join(known.split())}")


_REQUIRED = object()


def _get(table: Mapping[str, Any], key: str, kind: type, where: str, default: Any = _REQUIRED) -> Any:
    value = table.get(key, default)
    if value is _REQUIRED:
        raise UserError(f"{where} lacks {key}")
    if value is not default and (not isinstance(value, kind) or isinstance(value, bool)):
        raise UserError(f"{where}: {key} is {value!r}, not a {kind.__name__}")
    return value


def _numbers(values: Any, key: str, kind: type) -> tuple[Any, ...]:
    counts = is_whole if kind is int else is_finite
    if not isinstance(values, list) or not all(map(counts, values)):
        raise UserError(f"{key} is {values!r}: give a list of numbers")
    return tuple(kind(value) for value in values)


@dataclass(frozen=True)
class SeedVerdict:
    """How a challenger did against the baselines with one seed.

    Attributes:
        ratio_time_to_target: its time to the target over the baselines' time; None if it never got there.
        seconds_to_target: that time; None likewise.
        baseline_seconds: the shortest time that a baseline took for all its steps.
        target: the lowest held-out loss that a baseline ended with.
        loss_equal_time: held-out loss after training for the baselines' time; None where the task asks for none.
        baseline_loss_equal_time: theirs: the target.
        loss_equal_steps: held-out loss after the same number of steps as the baselines; None if no evaluation fell
            there.
        forgetting: other text's perplexity after the run that reached the target, over that before; None without text.
        baseline_forgetting: the same of the baseline that set the target.
        start_seconds: of `seconds_to_target`, what passed before the first step.
        ratio_after_first_step: the ratio of both times without either arm's first step, which also warms the process
            up: what a longer run tends to.
        accuracy: of a classifier, on the held-out texts after its last step; None of another model.
        baseline_accuracy: the same of the baseline that set the target.
    """

    ratio_time_to_target: float | None
    seconds_to_target: float | None
    baseline_seconds: float
    target: float
    loss_equal_time: float | None
    baseline_loss_equal_time: float
    loss_equal_steps: float | None
    forgetting: float | None
    baseline_forgetting: float | None
    start_seconds: float
    ratio_after_first_step: float | None
    accuracy: float | None = None
    baseline_accuracy: float | None = None


@dataclass(frozen=True)
class Verdict:
    """What the referee found.

    Attributes:
        task: the task's name.
        digest: of the task's model and data.
        rates: for each arm the held-out loss at every rate that was tried.
        chosen: for each arm its best rate.
        objection: why there is no verdict; None when there is one.
        arms: for each challenger, by seed; empty with an objection.
        recommended: the challenger that stands first.
        table: for each arm trainable parameters, peak memory in MiB, seconds a step.
        machine: what it ran on.
        races: every raw point: for each seed the race's content and that of the runs at equal time as one race.
    """

    task: str
    digest: str
    rates: dict[str, dict[str, float]]
    chosen: dict[str, float]
    objection: str | None
    arms: dict[str, dict[str, SeedVerdict]]
    recommended: str
    table: dict[str, dict[str, float]]
    machine: dict[str, str]
    races: dict[str, dict[str, Any]] = field(repr=False)

    def to_json(self) -> str:
        """As JSON text; `seeds` holds the recommended challenger's figures."""
        content = {
            "format": "aletheia-verdict",
            "version": 1,
            **dataclasses.asdict(self),
            "seeds": {
                seed: dataclasses.asdict(verdict)
                for seed, verdict in self.arms.get(self.recommended, {}).items()
            },
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Verdict:
        """The verdict that `to_json` wrote.

        Raises:
            UserError: not such a text.
        """
        try:
            content = json.loads(text)
            if (content["format"], content["version"]) != ("aletheia-verdict", 1):
                raise UserError("this is not an aletheia verdict of version 1")
            values = {one.name: content[one.name] for one in dataclasses.fields(Verdict)}
            values["arms"] = {
                name: {seed: SeedVerdict(**figures) for seed, figures in seeds.items()}
                for name, seeds in values["arms"].items()
            }
            return Verdict(**values)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"this is not an aletheia verdict of version 1: {error}") from error

    def results(self) -> dict[str, RaceResult]:
        """The race of each seed, read back from the raw points."""
        return {seed: RaceResult.from_json(json.dumps(points["race"])) for seed, points in self.races.items()}

    def cells(self) -> RaceTable:
        """The verdict's text, a row for each challenger and seed."""
        accuracy = any(one.accuracy is not None for seeds in self.arms.values() for one in seeds.values())
        header = (
            "arm",
            "rate",
            "seed",
            "time to target",
            "loss at equal time",
            "loss at equal steps",
            *(("accuracy",) if accuracy else ()),
            "forgetting",
            "trainable parameters",
            "peak memory",
        )
        rows = []
        for name, seeds in self.arms.items():
            for seed, one in seeds.items():
                ratio = "not reached"
                if one.seconds_to_target is not None:
                    times = f"{one.seconds_to_target:.0f} of {one.baseline_seconds:.0f} s"
                    ratio = f"{one.ratio_time_to_target:.3f} x ({times})"
                costs = self.table[name]
                rows.append(
                    (
                        name,
                        f"{self.chosen[name]:g}",
                        seed,
                        ratio,
                        _against(one.loss_equal_time, one.baseline_loss_equal_time, 4),
                        _against(one.loss_equal_steps, one.target, 4),
                        *((_against(one.accuracy, one.baseline_accuracy, 3),) if accuracy else ()),
                        _against(one.forgetting, one.baseline_forgetting, 3),
                        f"{costs['trainable_parameters']:,.0f}",
                        f"{costs['peak_memory_mb']:,.0f} MiB",
                    )
                )
        notes = (f"No verdict: {self.objection}.",) if self.objection else ()
        return RaceTable(header, tuple(rows), notes)

    def show(self) -> Table:
        """The verdict as a table for a terminal."""
        cells = self.cells()
        table = Table(
            title=f"{self.task}: time to the baselines' held-out loss", caption="\n".join(cells.notes) or None
        )
        for head in cells.header:
            table.add_column(head, justify="left" if head == "arm" else "right")
        for row in cells.rows:
            table.add_row(*row)
        return table


def _against(mine: float | None, theirs: float | None, digits: int) -> str:
    if mine is None or theirs is None:
        return "none"
    return f"{mine:.{digits}f} against {theirs:.{digits}f}"


def referee(
    task: RaceTask,
    out: str | os.PathLike[str],
    *,
    progress: bool = True,
    overwrite: bool = False,
) -> Verdict:
    """Search every arm's rate, race the arms for every seed, and judge.

    Each finished run stays under `out`, so that a referee who was stopped goes on from there; `verdict.json` is
    written at the end.

    Args:
        task: from `read_task`.
        out: directory; one with runs over another model or other data is refused unless `overwrite`. The same task
            with an arm more or less takes over every run that it shares.
        progress: show on stderr what runs.
        overwrite: begin anew in a directory that holds another task's runs.

    Raises:
        UserError: the directory holds something else, another race is going on in it, or it lies above a file of the
            task; an arm's best rate cannot be bracketed; an arm's error.
        KeyboardInterrupt: with one line on what was kept as its message.
    """
    directory = _resume(task, Path(out), overwrite)
    with files.held(directory, "race"):
        try:
            verdict = _verdict(task, directory, progress)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; the runs that ended are in {directory}, and the same command goes on from them"
            ) from None
        files.write_text(directory / VERDICT, verdict.to_json(), overwrite=True)
    return verdict


def _verdict(task: RaceTask, directory: Path, progress: bool) -> Verdict:
    runs = _Runs(task, directory, Console(stderr=True, quiet=not progress), progress)
    searches = {contestant.name: runs.search(contestant) for contestant in task.contestants}
    chosen = {name: _best_rate(losses) for name, losses in searches.items()}

    arms: dict[str, dict[str, SeedVerdict]] = {contestant.name: {} for contestant in task.challengers}
    races: dict[str, dict[str, Any]] = {}
    objection: str | None = None
    results: dict[int, RaceResult] = {}
    # Every seed's time to the target before any run at equal time: whoever stops early has the answer.
    for seed in task.seeds:
        results[seed] = runs.race(
            f"seed-{seed}", [contestant.arm(chosen[contestant.name], seed) for contestant in task.contestants]
        )
        races[str(seed)] = {"race": json.loads(results[seed].to_json())}
        objection = _objection(task, results[seed])
        if objection:
            break
    for seed, result in results.items() if objection is None else ():
        equal = _equal_time(runs, result, chosen, seed)
        races[str(seed)]["equal_time"] = json.loads(equal.to_json())
        for contestant in task.challengers:
            arms[contestant.name][str(seed)] = judge(task, result, equal, contestant.name)
    return Verdict(
        task=task.name,
        digest=task.digest(),
        rates={
            name: {f"{rate:g}": loss for rate, loss in losses.items()} for name, losses in searches.items()
        },
        chosen=chosen,
        objection=objection,
        arms={} if objection else arms,
        recommended=task.recommended,
        table=_costs(list(results.values())),
        machine={**dict(machine_facts()), **versions()},
        races=races,
    )


def _equal_time(runs: _Runs, result: RaceResult, chosen: Mapping[str, float], seed: int) -> RaceResult:
    """The task's arms for equal time as one race, run one by one: their models need not fit into memory together."""
    task = runs.task
    alone = []
    for contestant in task.challengers:
        if contestant.name in task.equal_time:
            steps = _equal_time_steps(task, result, contestant)
            arm = _equal_time_arm(contestant, chosen[contestant.name], seed, steps)
            alone.append(runs.race(f"seed-{seed}-equal-time", [arm]))
    return RaceResult(tuple(arm for one in alone for arm in one.arms), alone[0].meta)


def _best_rate(losses: Mapping[float, float]) -> float:
    """The lowest of the rates that are as good as the best."""
    best = min(losses.values())
    return min(rate for rate, loss in losses.items() if loss <= best * (1 + TIE))


def judge(task: RaceTask, result: RaceResult, equal: RaceResult, name: str) -> SeedVerdict:
    """One challenger against the baselines, from the race of one seed and the runs at equal time."""
    best = min((_arm(result, baseline.name) for baseline in task.baselines), key=_final_loss)
    target, seconds = _final_loss(best), _fastest(task, result).seconds
    challenger = _arm(result, name)
    reached = next((record for record in challenger.training.evals if record.loss <= target), None)
    to_target = None if reached is None else challenger.start_seconds + reached.seconds
    warm = seconds - _fastest(task, result).training.history[0].step_seconds
    steps = best.training.history[-1].step
    same_steps = [record.loss for record in challenger.training.evals if record.step == steps]
    return SeedVerdict(
        ratio_time_to_target=None if to_target is None else to_target / seconds,
        seconds_to_target=to_target,
        baseline_seconds=seconds,
        target=target,
        loss_equal_time=_final_loss(_arm(equal, name)) if name in task.equal_time else None,
        baseline_loss_equal_time=target,
        loss_equal_steps=same_steps[-1] if same_steps else None,
        forgetting=_forgetting(challenger),
        baseline_forgetting=_forgetting(best),
        start_seconds=challenger.start_seconds,
        ratio_after_first_step=None
        if to_target is None
        else (to_target - challenger.training.history[0].step_seconds) / warm,
        accuracy=challenger.training.eval_accuracy_after,
        baseline_accuracy=best.training.eval_accuracy_after,
    )


def _objection(task: RaceTask, result: RaceResult) -> str | None:
    objection = result.objection()
    if objection:
        return objection
    for contestant in task.baselines:
        training = _arm(result, contestant.name).training
        before, after = training.eval_loss_before, training.eval_loss_after
        assert before is not None
        assert after is not None
        if after > (1 - LEARNED) * before:
            return (
                f"baseline {contestant.name} has not learned (held-out loss {before:.4f} -> {after:.4f}, "
                f"less than {LEARNED:.0%}): give it more steps"
            )
    return None


def _equal_time_arm(contestant: Contestant, rate: float, seed: int, steps: int) -> Arm:
    """The contestant for so many steps, evaluated a few times on the way: its end is what is judged."""
    arm = contestant.arm(rate, seed, steps=steps)
    assert arm.config is not None
    every = max(arm.config.eval_every or steps, math.ceil(steps / EQUAL_TIME_EVALUATIONS))
    return dataclasses.replace(arm, config=dataclasses.replace(arm.config, eval_every=every))


def _equal_time_steps(task: RaceTask, result: RaceResult, contestant: Contestant) -> int:
    """Steps that fit in the baselines' time at the pace that the challenger showed beside them."""
    challenger = _arm(result, contestant.name)
    pace = statistics.fmean(record.step_seconds for record in challenger.training.history)
    return max(1, math.floor((_fastest(task, result).seconds - challenger.start_seconds) / pace))


def _fastest(task: RaceTask, result: RaceResult) -> ArmResult:
    """The baseline that took the shortest time for all its steps."""
    return min((_arm(result, baseline.name) for baseline in task.baselines), key=lambda arm: arm.seconds)


def _costs(results: Sequence[RaceResult]) -> dict[str, dict[str, float]]:
    names = [arm.name for arm in results[0].arms]
    of = {name: [_arm(result, name).training for result in results] for name in names}
    return {
        name: {
            "trainable_parameters": runs[0].trainable_parameters,
            "peak_memory_mb": max(run.peak_memory_mb for run in runs),
            "step_seconds": statistics.median(record.step_seconds for run in runs for record in run.history),
        }
        for name, runs in of.items()
    }


def _arm(result: RaceResult, name: str) -> ArmResult:
    return next(arm for arm in result.arms if arm.name == name)


def _final_loss(arm: ArmResult) -> float:
    loss = arm.training.eval_loss_after
    return math.inf if loss is None else loss


def _forgetting(arm: ArmResult) -> float | None:
    if arm.perplexity_before is None or arm.perplexity_after is None:
        return None
    return arm.perplexity_after / arm.perplexity_before


def _digest(arms: Sequence[Arm]) -> str:
    """Names a race by all that tells it from others over the same data; a new option's default changes no name."""
    content = []
    for arm in arms:
        assert isinstance(arm.plan, Recipe)
        assert arm.config is not None
        settings = {**_settings(arm.plan), **_settings(arm.config)}
        content.append([arm.name, arm.kernels, settings])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _settings(values: Recipe | TrainConfig) -> dict[str, Any]:
    """What differs from the defaults and matters to a result."""
    silent = {"progress"}
    return {
        one.name: getattr(values, one.name)
        for one in dataclasses.fields(values)
        if getattr(values, one.name) != one.default and one.name not in silent
    }


class _Runs:
    """Races under one directory, each run once: what is there already is read, whatever else the task now says."""

    def __init__(self, task: RaceTask, directory: Path, console: Console, progress: bool) -> None:
        self.task = task
        self.directory = directory
        self.console = console
        self.progress = progress
        self.text = None if task.other_text is None else files.read_text(task.other_text, "other_text")

    def race(self, name: str, arms: Sequence[Arm], *, forgetting: bool = True) -> RaceResult:
        place = self.directory / f"{name}-{_digest(arms)}"
        with contextlib.suppress(FileNotFoundError):
            return RaceResult.from_json((place / "race.json").read_text(encoding="utf-8"))
        self.console.print(f"{self.task.name}: {name}", highlight=False)
        config = dataclasses.replace(self._config(arms[0]), progress=self.progress)
        return race(
            arms,
            self.task.model,
            self.task.train,
            self.task.eval,
            config,
            place,
            extra_text=self.text if forgetting else None,
            slice_steps=max(1, math.ceil((config.steps or 1) / self.task.slices)),
        )

    def search(self, contestant: Contestant) -> dict[float, float]:
        """Held-out loss by learning rate, with a worse rate on either side of the best.

        A rate at which training does not stay finite has an infinite loss in the search, and is left out of what is
        returned.
        """
        rates = list(self.task.rates)
        losses: dict[float, float] = {}
        for _ in range(WIDENINGS + 1):
            for rate in rates:
                if rate not in losses:
                    losses[rate] = self._loss_at(contestant, rate)
            best = min(rates, key=lambda rate: losses[rate])
            if best == rates[0]:
                rates.insert(0, rates[0] / 2)
            elif best == rates[-1]:
                rates.append(rates[-1] * 2)
            else:
                return {rate: losses[rate] for rate in rates if math.isfinite(losses[rate])}
        raise UserError(
            f"arm {contestant.name}: the best of the rates {', '.join(f'{rate:g}' for rate in rates)} is at the "
            "grid's edge: give other rates"
        )

    def _loss_at(self, contestant: Contestant, rate: float) -> float:
        arm = contestant.arm(rate, self.task.seeds[0])
        # Evaluations on the way would only take time: the search compares where runs end.
        arm = dataclasses.replace(arm, config=dataclasses.replace(self._config(arm), eval_every=None))
        try:
            result = self.race(f"rate-{contestant.name}-{rate:g}", [arm], forgetting=False)
        except NonFiniteLoss:
            return math.inf
        return _final_loss(result.arms[0])

    @staticmethod
    def _config(arm: Arm) -> TrainConfig:
        assert arm.config is not None
        return arm.config


def _resume(task: RaceTask, out: Path, overwrite: bool) -> Path:
    """The directory with this task's runs, made when it is not there."""
    files.check_apart(out, task.model, task.train, task.eval, task.other_text)
    state = {"format": "aletheia-referee", "version": 1, "task": task.name, "digest": task.digest()}
    text = json.dumps(state, indent=1) + "\n"
    file = out / STATE
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return out
    if file.is_file() and not overwrite:
        raise UserError(
            f"{out} holds the runs of a task with another name, other weights or other data: choose another directory "
            "or pass --overwrite to begin anew"
        )
    with files.output_directory(out, overwrite) as directory:
        files.write_text(directory / STATE, text)
    return out
