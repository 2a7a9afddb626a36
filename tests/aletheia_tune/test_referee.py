"""The referee: a miniature race from a task file to the verdict, what it refuses, and how it goes on after a stop."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest

from aletheia_tune import referee as referee_module
from aletheia_tune.errors import NonFiniteLoss, UserError
from aletheia_tune.metrics import EvalRecord, StepRecord, TrainResult
from aletheia_tune.plan import ModulePlan, Plan
from aletheia_tune.race import ArmResult, RaceResult
from aletheia_tune.referee import VERDICT, RaceTask, Verdict, judge, read_task, referee
from aletheia_tune.report import write_verdict
from tests import accessibility
from tests.task_case import task_text

LETTERS = "a b c d e f " * 8
UPPER = """
[[challenger]]
name = "upper"
plan = { score = "top", layers = 50, rank = 4 }
"""


@pytest.fixture
def task_file(tiny_model_dir, tmp_path) -> Path:
    files = {"train": 40, "eval": 8}
    for name, count in files.items():
        lines = [
            {"prompt": LETTERS[at : at + 9], "completion": LETTERS[at + 9 : at + 25]}
            for at in (2 * (index % 6) for index in range(count))
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    other = tmp_path / "other.txt"
    other.write_text("a b c d e f " * 300)
    file = tmp_path / "task.toml"
    keys = f'other_text = "{other}"\nrecommended = "half"\nequal_time = ["upper"]'
    file.write_text(
        task_text("tiny", tiny_model_dir, steps=24, keys=keys) + "training = { steps = 30 }\n" + UPPER
    )
    return file


def test_a_miniature_race(task_file, tmp_path):
    task = read_task(task_file)
    out = tmp_path / "out"
    verdict = referee(task, out, progress=False)
    assert verdict.objection is None
    written = json.loads((out / VERDICT).read_text())
    assert written["recommended"] == "half"
    for name, losses in verdict.rates.items():
        rates = sorted(losses, key=float)
        best = min(losses, key=losses.__getitem__)
        assert verdict.chosen[name] == min(float(r) for r in rates if losses[r] <= losses[best] * 1.001)
        # Infinite losses are not in the table, so the upper neighbour may be missing there.
        assert rates[0] != best
    for seed in ("0",):
        points = written["races"][seed]["race"]["arms"]
        baseline = next(arm for arm in points if arm["name"] == "peft")["training"]
        figures = written["seeds"][seed]
        assert figures["target"] == baseline["evals"][-1]["loss"]
        assert figures["baseline_loss_equal_time"] == figures["target"]
        assert figures["baseline_seconds"] > baseline["history"][-1]["seconds"]
        half = next(arm for arm in points if arm["name"] == "half")
        assert half["plan_seconds"] > 0
        assert len(half["training"]["history"]) == 30
        assert half["training"]["trainable_parameters"] < baseline["trainable_parameters"]
        assert figures["forgetting"] > 0
        equal = written["races"][seed]["equal_time"]["arms"]
        assert [arm["name"] for arm in equal] == ["half", "upper"]
        assert figures["loss_equal_time"] == equal[0]["training"]["eval_loss_after"]
        assert verdict.arms["upper"][seed].loss_equal_time == equal[1]["training"]["eval_loss_after"]

    write_verdict(out / "report.html", verdict, commands=["aletheia race task.toml"])
    page = (out / "report.html").read_text()
    assert "Layers and ranks" in page
    assert accessibility.problems(page) == []
    assert f"{verdict.chosen['half']:g}" in page
    assert "half reached the target in" in page or "half did not reach the target with any of 1 seeds" in page
    # Where the arms ended, the way there by time and by steps, a step's parts, scores and ranks.
    assert page.count("<svg") == 6
    assert Verdict.from_json((out / VERDICT).read_text()) == verdict

    # Nothing is run a second time.
    runs = {path: path.stat().st_mtime_ns for path in out.glob("*/race.json")}
    assert referee(task, out, progress=False) == verdict
    assert runs == {path: path.stat().st_mtime_ns for path in out.glob("*/race.json")}

    with open(task.eval, "a") as file:
        file.write("\n")
    with pytest.raises(
        UserError, match="holds the runs of a task with another name, other weights or other data"
    ):
        referee(task, out, progress=False)
    assert runs == {path: path.stat().st_mtime_ns for path in out.glob("*/race.json")}


def test_a_directory_above_the_tasks_own_files_is_refused(task_file):
    before = sorted(task_file.parent.rglob("*"))
    with pytest.raises(UserError, match="would replace"):
        referee(read_task(task_file), task_file.parent, progress=False, overwrite=True)
    assert sorted(task_file.parent.rglob("*")) == before


def test_of_rates_as_good_as_each_other_the_lowest_is_chosen():
    best_rate = referee_module._best_rate
    assert best_rate({1e-3: 0.80, 2e-3: 0.7304, 4e-3: 0.73}) == 2e-3
    assert best_rate({1e-3: 0.80, 2e-3: 0.732, 4e-3: 0.73}) == 4e-3
    assert best_rate({1e-3: 0.73, 2e-3: 0.75, 4e-3: 0.8}) == 1e-3


def test_an_interrupt_says_what_is_kept(task_file, tmp_path, monkeypatch):
    task = read_task(task_file)
    real, begun = referee_module.race, []

    def interrupted(arms, *arguments, **options):
        begun.append(arms[0].name)
        if len(begun) == 2:
            raise KeyboardInterrupt
        return real(arms, *arguments, **options)

    monkeypatch.setattr(referee_module, "race", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the runs that ended are in "):
        referee(task, tmp_path / "out", progress=False)
    assert len(list((tmp_path / "out").glob("*/race.json"))) == 1
    assert not (tmp_path / "out" / VERDICT).exists()


def test_a_second_race_in_one_directory_is_refused(task_file, tmp_path, monkeypatch):
    task, out = read_task(task_file), tmp_path / "out"
    other = dataclasses.replace(task, name="another task")

    def meanwhile(*arguments, **options):
        before = sorted(out.rglob("*"))
        for again, overwrite in ((task, False), (other, True)):
            with pytest.raises(UserError, match="a race is going on in "):
                referee(again, out, progress=False, overwrite=overwrite)
        assert sorted(out.rglob("*")) == before
        raise KeyboardInterrupt

    monkeypatch.setattr(referee_module, "race", meanwhile)
    for _ in range(2):  # and what held it is gone with the race
        with pytest.raises(KeyboardInterrupt):
            referee(task, out, progress=False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('name = "tiny"', 'name = "tiny'), "not TOML"),
        (('name = "tiny"', ""), "lacks name"),
        (("slices = 3", "slice = 3"), "no key 'slice'"),
        (("slices = 3", "slices = 0"), "slices is 0"),
        (("rates = [2e-3, 1e-2, 1e-1]", "rates = [1e-2, 1e-1]"), "three positive"),
        (("rates = [2e-3, 1e-2, 1e-1]", "rates = 3"), "list of numbers"),
        (("seeds = [0]", "seeds = [1, 1]"), "seeds"),
        (("steps = 24", "learning_rate = 1e-3"), "learning_rate"),
        (("steps = 24", "steps = -24"), "arm peft: steps is -24"),
        (("batch_size = 4", "batchsize = 4"), "no key 'batchsize'"),
        (("batch_size = 4", 'batch_size = "4"'), "batch_size is '4': give a whole number"),
        (("batch_size = 4", 'packing = "false"'), "packing is 'false': give true or false"),
        (("layers = 50, rank = 4", 'layers = 50, rank = "4"'), "rank is '4': give a whole number"),
        (("layers = 50, rank = 4", 'layers = 50, ranks = "best"'), "ranks 'best' is unknown"),
        (('score = "aletheia"', 'ranks = "by-type", score = "top"'), "has no probe to rank modules by"),
        (("steps = 24", "steps = 24\nsampled_depth = { low = 1.0 }"), "give their indices"),
        (('score = "aletheia"', 'score = "best"'), "score 'best' is unknown"),
        (('name = "half"', 'name = "peft"'), "two arms have one name"),
        (('name = "half"', 'name = "a/b"'), "cannot be a directory name"),
        (("[[challenger]]", "[[baseline]]"), "lacks challenger"),
        (('recommended = "half"', 'recommended = "peft"'), "no challenger"),
        (('equal_time = ["upper"]', 'equal_time = ["peft"]'), "equal_time has 'peft'"),
        (('equal_time = ["upper"]', 'equal_time = "upper"'), "equal_time is 'upper'"),
    ],
)
def test_a_broken_task_is_one_line(task_file, change, says):
    text = task_file.read_text()
    assert change[0] in text
    task_file.write_text(text.replace(*change))
    with pytest.raises(UserError, match=says) as caught:
        read_task(task_file)
    assert str(task_file) in str(caught.value)
    assert "\n" not in str(caught.value).replace("\n(at", "")


def test_paths_are_those_beside_the_file(task_file):
    assert read_task(task_file).train == str(task_file.parent / "train.jsonl")
    (task_file.parent / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"train .* does not exist"):
        read_task(task_file)


def test_layers_of_sampled_depth_are_numbers(task_file):
    text = task_file.read_text()
    task_file.write_text(text.replace("steps = 24", "steps = 24\nsampled_depth = { 0 = 0.5, 2 = 0.5 }"))
    assert read_task(task_file).contestants[0].config.sampled_depth == {0: 0.5, 2: 0.5}


def test_a_calibration_is_beside_the_file_and_part_of_the_task(task_file):
    text, prices = task_file.read_text(), task_file.parent / "cost.json"
    without = read_task(task_file).digest()
    sampled = 'score = "aletheia", sampled_depth = 80, calibration = "cost.json"'
    task_file.write_text(text.replace('score = "aletheia"', sampled))
    with pytest.raises(UserError, match=r"arm half: calibration .*cost.json does not exist"):
        read_task(task_file)
    prices.write_text("1")
    task = read_task(task_file)
    assert task.contestants[1].recipe.calibration == str(prices)
    digests = {without, task.digest()}
    prices.write_text("2")
    assert len(digests | {task.digest()}) == 3
    both = task_file.read_text().replace("steps = 30", "steps = 30, sampled_depth = { 0 = 1 }")
    task_file.write_text(both)
    with pytest.raises(UserError, match="arm half: sampled_depth is in its plan and in its training"):
        read_task(task_file)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_another_models_runs_are_not_taken_for_this_ones(task_file, tmp_path, name):
    task = read_task(task_file)
    model = tmp_path / "retrained"
    shutil.copytree(task.model, model)
    moved = dataclasses.replace(task, model=str(model))
    assert moved.digest() == task.digest()
    content = bytearray((model / name).read_bytes())
    content[len(content) // 2 :] = bytes(byte ^ 1 for byte in content[len(content) // 2 :])
    (model / name).write_bytes(content)
    assert moved.digest() != task.digest()


def test_a_run_is_known_by_what_it_depends_on(task_file):
    task = read_task(task_file)
    peft, half, _ = task.contestants
    name = referee_module._digest([peft.arm(1e-3, 0)])
    assert name == referee_module._digest([peft.arm(1e-3, 0)])
    shown = dataclasses.replace(peft, config=dataclasses.replace(peft.config, progress=True))
    assert name == referee_module._digest([shown.arm(1e-3, 0)])
    others = [
        peft.arm(2e-3, 0),
        peft.arm(1e-3, 1),
        peft.arm(1e-3, 0, steps=7),
        dataclasses.replace(peft, recipe=dataclasses.replace(peft.recipe, rank=5)).arm(1e-3, 0),
        dataclasses.replace(half, name="peft").arm(1e-3, 0),
    ]
    names = {referee_module._digest([other]) for other in others}
    assert len(names) == len(others)
    assert name not in names


PLAN = Plan({"model.layers.3.mlp.up_proj": ModulePlan(4, 8.0)}, 4, "model.layers")


def ran(name: str, losses: list[float], step_seconds: float, plan_seconds: float = 0.0) -> ArmResult:
    """An arm whose every second step was evaluated, with these losses from step 0 on."""
    steps = 2 * (len(losses) - 1)
    training = TrainResult(
        history=tuple(
            StepRecord(step, step * step_seconds, step_seconds, 2.0, 1e-3, 1.0, 100)
            for step in range(1, steps + 1)
        ),
        evals=tuple(
            EvalRecord(2 * index, 2 * index * step_seconds, loss) for index, loss in enumerate(losses)
        ),
        trainable_parameters=10,
        peak_memory_mb=100.0,
        patch_report=None,
        head="",
        attention="",
        norms="",
        prefix_layers=0,
        stopped=None,
        config={"dtype": "float32"},
        versions={},
        setup_seconds=0.5,
    )
    return ArmResult(name, PLAN, False, training, 10.0, 11.0, plan_seconds)


def with_arms(task_file: Path, *arms: str) -> RaceTask:
    task_file.write_text(task_file.read_text() + "".join(f"\n{arm}\n" for arm in arms))
    return read_task(task_file)


def test_the_clock(task_file):
    task = with_arms(
        task_file,
        '[[baseline]]\nname = "peft-fast"',
        '[[challenger]]\nname = "kernels"',
    )
    result = RaceResult(
        (
            ran("peft", [3.0, 2.0, 1.5], 2.0),
            ran("peft-fast", [3.0, 2.0, 1.6], 1.0),
            ran("kernels", [3.0, 1.9, 1.5, 1.4], 0.5),
            ran("half", [3.0, 1.9, 1.7, 1.51], 0.5, plan_seconds=3.0),
        ),
        {},
    )
    equal = RaceResult((ran("half", [3.0, 1.2], 0.5),), {})
    kernels, half = (judge(task, result, equal, name) for name in ("kernels", "half"))
    # The best loss of either baseline, in the shortest time of either.
    assert kernels.target == 1.5
    assert kernels.baseline_seconds == 4.5
    assert kernels.seconds_to_target == 0.5 + 4 * 0.5
    assert kernels.ratio_time_to_target == pytest.approx(2.5 / 4.5)
    assert kernels.ratio_after_first_step == pytest.approx(2.0 / 3.5)
    assert kernels.loss_equal_steps == 1.5
    assert kernels.forgetting == pytest.approx(1.1)
    assert half.ratio_time_to_target is half.ratio_after_first_step is None
    assert half.loss_equal_time == 1.2
    assert kernels.loss_equal_time is None
    assert half.start_seconds == 3.5
    # 4.5 s less 3.5 s of probing and patching, at half a second a step.
    contestant = next(one for one in task.contestants if one.name == "half")
    assert referee_module._equal_time_steps(task, result, contestant) == 2
    # Its end is what counts, so a long run at equal time is not evaluated as often as the race.
    evaluated = [referee_module._equal_time_arm(contestant, 1e-3, 0, steps).config for steps in (2, 100)]
    assert [config.eval_every for config in evaluated] == [contestant.config.eval_every, 20]


def test_a_baseline_that_has_not_learned_sets_no_target(task_file):
    task = read_task(task_file)
    learned = RaceResult((ran("peft", [3.0, 2.8], 1.0), ran("kernels", [3.0, 2.8], 1.0)), {})
    assert referee_module._objection(task, learned) is None
    idle = RaceResult((ran("peft", [3.0, 2.9], 1.0), ran("kernels", [3.0, 2.8], 1.0)), {})
    assert "has not learned" in (referee_module._objection(task, idle) or "")


def test_the_best_rate_is_never_at_the_edge(task_file, tmp_path, monkeypatch):
    task = read_task(task_file)
    runs = referee_module._Runs(task, tmp_path, referee_module.Console(quiet=True), False)
    tried: list[float] = []
    optimum: list[float] = []

    def race(name, arms, *, forgetting):
        rate = arms[0].config.learning_rate
        tried.append(rate)
        if rate > 5:
            raise NonFiniteLoss("diverged", step=1)
        return RaceResult((ran("x", [3.0, abs(math.log10(rate / optimum[0]))], 1.0),), {})

    monkeypatch.setattr(runs, "race", race)
    for where, best in ((0.1, 0.1), (0.3, 0.4), (0.003, 0.002), (9.0, 3.2)):
        tried.clear()
        optimum[:] = [where]
        losses = runs.search(task.contestants[0])
        assert min(losses, key=losses.__getitem__) == best
        assert min(tried) < best < max(tried)
        assert len(tried) == len(set(tried))
    optimum[:] = [1e-9]
    with pytest.raises(UserError, match="at the grid's edge"):
        runs.search(task.contestants[0])
