"""The race: arms in processes of their own, in turns, and a table that owns up."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel

from aletheia_tune import race as race_module
from aletheia_tune.errors import NonFiniteLoss, UserError
from aletheia_tune.evaluation import held_out_loss
from aletheia_tune.loading import load_model
from aletheia_tune.metrics import EvalRecord, StepRecord, TrainResult
from aletheia_tune.plan import ModulePlan, Plan, uniform_plan
from aletheia_tune.race import Arm, ArmResult, RaceResult, race, text_perplexity
from aletheia_tune.training_config import TrainConfig

CONFIG = TrainConfig(
    steps=5, batch_size=4, learning_rate=1e-2, dtype="float32", progress=False, threads=1, warmup=0
)
OTHER_TEXT = "a b c d e f " * 300
PLAN = Plan(
    {f"model.layers.3.mlp.{name}": ModulePlan(4, 8.0) for name in ("up_proj", "down_proj")}, 4, "model.layers"
)


def arms(model_dir: Path) -> list[Arm]:
    uniform = uniform_plan(load_model(model_dir, "float32")[0], rank=4)
    return [Arm("uniform", uniform, kernels=False), Arm("plan", PLAN, kernels=True)]


def test_a_race(tiny_model_dir, train_file, eval_file, tmp_path, monkeypatch):
    monkeypatch.delenv("MALLOC_TOP_PAD_", raising=False)
    out = tmp_path / "race"
    result = race(
        arms(tiny_model_dir),
        tiny_model_dir,
        train_file,
        eval_file,
        CONFIG,
        out,
        extra_text=OTHER_TEXT,
        extra_text_name="alphabet",
        slice_steps=2,
    )
    assert "MALLOC_TOP_PAD_" not in os.environ
    assert sorted(path.name for path in out.iterdir()) == ["plan", "race.json", "uniform"]
    assert [path.name for path in tmp_path.iterdir()] == ["race"]
    for arm in result.arms:
        assert (out / arm.name / "adapter_model.safetensors").is_file()
        assert Plan.from_json((out / arm.name / "plan.json").read_text()) == arm.plan
        assert len(arm.training.history) == 5
        assert arm.training.config["kernels"] == arm.kernels
        assert arm.training.peak_memory_mb > 50
        assert arm.training.eval_loss_after != arm.training.eval_loss_before
        assert arm.perplexity_after != arm.perplexity_before
    uniform, plan = result.arms
    assert uniform.training.patch_report is None
    assert plan.training.patch_report is not None
    assert plan.training.prefix_layers == 3
    assert [r.tokens for r in uniform.training.history] == [r.tokens for r in plan.training.history]
    assert uniform.training.eval_loss_before == pytest.approx(plan.training.eval_loss_before, rel=1e-5)
    assert uniform.perplexity_before == plan.perplexity_before
    assert result.objection() is None
    assert RaceResult.from_json((out / "race.json").read_text()) == result

    shown = printed(result)
    for words in ("alphabet perplexity", "4 of 4", "1 of 4", "1.00 x", "MiB"):
        assert words in shown


def printed(result: RaceResult) -> str:
    text = io.StringIO()
    Console(file=text, width=200).print(result.table())
    return text.getvalue()


@pytest.mark.parametrize(
    ("broken", "kind", "line"),
    [
        ({"plan": Plan({"model.layers.3.mlp.w1": ModulePlan(4, 8.0)}, 4, "model.layers")}, UserError, "w1"),
        ({"learning_rate": 1e30}, NonFiniteLoss, r"at step 2; the race is void and nothing was written$"),
    ],
    ids=["plan", "rate"],
)
def test_a_failing_arm_ends_the_race(tiny_model_dir, train_file, eval_file, tmp_path, broken, kind, line):
    first, second = arms(tiny_model_dir)
    second = dataclasses.replace(second, plan=broken.get("plan", second.plan))
    config = dataclasses.replace(CONFIG, learning_rate=broken.get("learning_rate", 1e-2))
    with pytest.raises(kind, match=line) as caught:
        race([second, first], tiny_model_dir, train_file, eval_file, config, tmp_path / "race")
    assert str(caught.value).startswith("arm plan: ")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_arms_have_the_environment_of_their_race(
    tiny_model_dir, train_file, eval_file, tmp_path, monkeypatch
):
    given = (tiny_model_dir, train_file, eval_file, CONFIG)
    race(arms(tiny_model_dir)[1:], *given, tmp_path / "before")  # whatever arms are forked from has begun
    monkeypatch.setenv("ALETHEIA_BACKEND", "none")
    with pytest.raises(RuntimeError, match="ALETHEIA_BACKEND='none' names no backend"):
        race(arms(tiny_model_dir)[1:], *given, tmp_path / "after")


@pytest.mark.parametrize(("card", "temporary"), [(False, "/tmp"), (True, "/tmp"), (False, "/" + 80 * "t")])
def test_beside_a_card_or_in_a_long_path_nothing_is_forked(card, temporary, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: card)
    monkeypatch.setattr(tempfile, "tempdir", temporary)
    forks = sys.platform == "linux" and not card and temporary == "/tmp"
    assert race_module._processes().get_start_method() == ("forkserver" if forks else "spawn")


def test_an_arm_that_dies_is_named(tiny_model_dir, train_file, eval_file, tmp_path, monkeypatch):
    monkeypatch.setattr(race_module, "_run_arm", os.abort)  # spawned children get it by its name: os.abort()
    with pytest.raises(UserError, match="arm uniform: its process was"):
        race(arms(tiny_model_dir), tiny_model_dir, train_file, eval_file, CONFIG, tmp_path / "race")
    assert list(tmp_path.iterdir()) == []


class Pipe:
    """Records what an arm sends and how often it waits."""

    def __init__(self) -> None:
        self.talk: list[Any] = []

    def send(self, message: Any) -> None:
        self.talk.append(message)

    def recv(self) -> str:
        self.talk.append("waited")
        return "go"


def test_the_baton_goes_on_before_every_slice():
    from types import SimpleNamespace

    pipe = Pipe()
    turns = race_module._Turns(pipe, slice_steps=2)
    for step in range(5):
        turns.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=5), None)
        pipe.talk.append(step)
        turns.on_log(None, None, None, logs={"loss": float(step)})
    handed_on = [message[:2] if isinstance(message, tuple) else message for message in pipe.talk]
    assert handed_on == [("turn", 0), "waited", 0, 1, ("turn", 2), "waited", 2, 3, ("turn", 4), "waited", 4]
    assert pipe.talk[4] == ("turn", 2, 5, 1.0)


def test_an_arm_of_one_turn_keeps_the_baton_that_it_was_started_with():
    from types import SimpleNamespace

    pipe = Pipe()
    turns = race_module._Turns(pipe, slice_steps=5)
    for step in range(5):
        turns.on_step_begin(None, SimpleNamespace(global_step=step, max_steps=5), None)
    assert pipe.talk == []


def test_only_one_arm_holds_the_baton(monkeypatch):
    log: list[tuple[str, str]] = []

    class Arms:
        def __init__(self, target: Any, args: Any, daemon: bool) -> None:
            self.exitcode, self.sentinel, self.name = 0, None, args[0].arm.name

        def start(self) -> None: ...

        def join(self, timeout: float | None = None) -> None: ...

    class Line:
        """The referee's end of an arm's pipe: answers each "go" by two turns and a result."""

        def __init__(self) -> None:
            self.sent = 0

        def send(self, message: Any) -> None:
            log.append((f"arm{id(self)}", message))
            self.sent += 1

        def poll(self) -> bool:
            return True

        def recv(self) -> Any:
            log.append((f"arm{id(self)}", "back"))
            return ("turn", 1, 5, 0.0) if self.sent < 3 else ("done", {"arm": id(self)})

        def close(self) -> None: ...

    class Context:
        Process = Arms

        @staticmethod
        def Pipe() -> tuple[Line, Line]:
            return Line(), Line()

    monkeypatch.setattr(race_module, "_processes", lambda: Context)
    monkeypatch.setattr(race_module, "wait", lambda _: None)
    tasks: Any = [type("Task", (), {"arm": Arm(name, PLAN, True)}) for name in ("one", "two")]
    finished = race_module._referee(tasks, show=False)
    assert len(finished) == 2
    holders = [log[at][0] for at in range(0, len(log), 2)]
    assert [what for _, what in log] == ["go", "back"] * 6
    assert all(log[at][0] == log[at + 1][0] for at in range(0, len(log), 2))
    assert holders == [holders[0], holders[1]] * 3
    assert holders[0] != holders[1]


@pytest.mark.parametrize("names", [["a", "a"], [], ["a/b"], [""], [".."]])
def test_arms_need_names_that_can_be_directories(names, tmp_path):
    with pytest.raises(UserError, match="different names"):
        race([Arm(name, PLAN, True) for name in names], "m", "t", "e", CONFIG, tmp_path / "race")


def arm_result(name: str, seconds: float = 1.0, **changes: Any) -> ArmResult:
    history = tuple(
        StepRecord(
            step=step,
            seconds=step * seconds,
            step_seconds=seconds,
            loss=2.0 - step / 10,
            learning_rate=1e-4,
            grad_norm=1.0,
            tokens=10,
        )
        for step in (1, 2, 3)
    )
    training = TrainResult(
        history=history,
        evals=(EvalRecord(0, 0.0, 2.5), EvalRecord(3, 3 * seconds, 2.25)),
        trainable_parameters=1234,
        peak_memory_mb=100.0,
        patch_report=None,
        head="all rows",
        attention="the model's own",
        norms="none",
        prefix_layers=0,
        stopped=None,
        config=dataclasses.asdict(CONFIG),
        versions={},
    )
    return ArmResult(name, PLAN, False, dataclasses.replace(training, **changes), None, None)


def test_the_table_gives_the_speed_of_a_sound_race():
    result = RaceResult((arm_result("uniform", 1.5), arm_result("plan", 1.0)), {})
    cells = result.cells()
    assert cells.notes == ()
    assert [row[4] for row in cells.rows] == ["1.00 x", "1.50 x"]
    assert cells.rows[0][5] == "2.5000 -> 2.2500"
    assert cells.rows[0][6] == "none"
    assert "1,234" in printed(result)


def record(**changes: Any) -> tuple[StepRecord, ...]:
    first, *rest = arm_result("any").training.history
    return (dataclasses.replace(first, **changes), *rest)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stopped": "the loss became nan at step 4"}, "plan did not reach the end with finite losses"),
        ({"history": record(loss=float("nan"))}, "plan did not reach the end with finite losses"),
        ({"evals": (EvalRecord(0, 0.0, float("inf")),)}, "plan did not reach the end with finite losses"),
        ({"history": ()}, "plan did not reach the end with finite losses"),
        ({"history": record(grad_norm=0.0)}, "the gradients of arm plan are zero"),
        ({"history": record(grad_norm=float("nan"))}, "a gradient of arm plan is not finite"),
        ({"history": record(loss=1.91)}, "before any update the losses of the first step"),
        (
            {"evals": (EvalRecord(0, 0.0, 2.51), EvalRecord(3, 3.0, 2.2))},
            "before any update the held-out losses",
        ),
    ],
)
def test_no_speed_is_given_for_unequal_work(changes, reason):
    result = RaceResult((arm_result("uniform"), arm_result("plan", **changes)), {})
    objection = result.objection()
    assert objection is not None
    assert reason in objection
    cells = result.cells()
    assert [row[4] for row in cells.rows] == ["none", "none"]
    assert objection in cells.notes[0]
    assert objection in " ".join(printed(result).split())


def test_rounding_of_bfloat16_is_no_objection():
    bf16 = {"config": {**dataclasses.asdict(CONFIG), "dtype": "bfloat16"}}
    other = arm_result("plan", **bf16, history=record(loss=1.905))
    assert RaceResult((arm_result("uniform", **bf16), other), {}).objection() is None


def test_perplexity_is_over_windows_spread_over_the_text(tiny_model_dir, monkeypatch):
    model, tokenizer = load_model(tiny_model_dir, "float32")
    seen: list[Any] = []

    def spy(model: Any, examples: Any, collator: Any, batch_size: int) -> float:
        seen.extend(examples)
        return held_out_loss(model, examples[:1], collator, batch_size)

    monkeypatch.setattr(race_module, "held_out_loss", spy)
    monkeypatch.setattr(race_module, "WINDOW", 8)
    text = " ".join("abcdefghijklmnopqrstuvwxyz"[index % 26] for index in range(26 * 40))
    assert text_perplexity(model, tokenizer, text) > 1
    ids = tokenizer(text)["input_ids"]
    assert len(seen) == race_module.WINDOWS
    starts = [8 * (index * 130 // 16) for index in range(16)]
    assert [example["input_ids"] for example in seen] == [ids[start : start + 8] for start in starts]
    with pytest.raises(UserError, match="fewer than two tokens"):
        text_perplexity(model, tokenizer, "a")


def test_windows_of_perplexity_fit_the_positions_of_the_model(tiny_model_dir):
    _, tokenizer = load_model(tiny_model_dir, "float32")
    sizes = {"n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes))
    assert text_perplexity(model, tokenizer, "a b " * 30) > 1


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "aletheia-race", "version": 2}', "nonsense"])
def test_a_foreign_race_file_is_refused(text):
    with pytest.raises(UserError, match="not an aletheia race"):
        RaceResult.from_json(text)


def test_arms_of_two_dtypes_may_differ_by_the_rounding_of_the_coarser():
    def objection(loss: float) -> str | None:
        config = dataclasses.asdict(CONFIG)
        evals = (EvalRecord(0, 0.0, loss), *arm_result("plan").training.evals[1:])
        coarse = arm_result("plan", config={**config, "dtype": "bfloat16"}, evals=evals)
        return RaceResult(
            (arm_result("uniform", config={**config, "dtype": "float32"}), coarse), {}
        ).objection()

    assert objection(2.5 * 1.009) is None
    assert "before any update" in str(objection(2.5 * 1.011))


@pytest.mark.parametrize("change", [{"group_by_length": True}, {"batch_size": 2}])
def test_first_steps_of_other_examples_are_not_compared(change):
    config = {"config": {**dataclasses.asdict(CONFIG), **change}}
    other = arm_result("plan", **config, history=record(loss=1.5))
    assert RaceResult((arm_result("uniform"), other), {}).objection() is None
    # The model before any update is the same, whatever the batches.
    other = dataclasses.replace(
        other,
        training=dataclasses.replace(
            other.training, evals=(EvalRecord(0, 0.0, 2.51), EvalRecord(3, 3.0, 2.2))
        ),
    )
    objection = RaceResult((arm_result("uniform"), other), {}).objection()
    assert objection is not None
    assert "held-out losses" in objection
