"""The command line: the chain that a user runs, and one line for every bad input."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_args

import psutil
import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from aletheia_kernels import cpu
from aletheia_tune import cli
from aletheia_tune.cost import Batch, Calibration, Coefficients, ModelShape
from aletheia_tune.plan import ModulePlan, Plan
from aletheia_tune.probe import METHODS
from aletheia_tune.scores import ModuleScore, Scores
from aletheia_tune.scores.cka import Pooling
from aletheia_tune.scores.controls import CONTROLS
from benchmarks.family_table import FAMILIES
from tests import accessibility
from tests.task_case import task_text

COMMANDS = ["probe", "cost", "plan", "train", "merge", "compare", "race", "doctor"]


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The `aletheia` command in this process: exit code, stdout, stderr."""

    def invoke(*arguments: Any) -> Ran:
        monkeypatch.setattr(sys, "argv", ["aletheia", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)

    return invoke


def disk(path: Path) -> dict[str, bytes | None]:
    """Everything under a directory: files with what is in them, directories as None."""
    return {
        str(each.relative_to(path)): each.read_bytes() if each.is_file() else None
        for each in sorted(path.rglob("*"))
    }


def assert_one_line(ran: Ran, *parts: Any) -> None:
    lines = ran.err.splitlines()
    errors = [line for line in lines if line.startswith("aletheia: error: ")]
    assert ran.code == 2, ran
    assert len(errors) == 1, ran
    assert errors == lines[-1:]
    assert "Traceback" not in ran.err
    for part in parts:
        assert str(part) in errors[0]


class Refuses(NamedTuple):
    """Checks that a command ends with one line and exit code 2 and leaves the disk as it was."""

    run: Run
    watched: Path

    def __call__(self, *arguments: Any, says: tuple[Any, ...]) -> None:
        before = disk(self.watched)
        assert_one_line(self.run(*arguments), *says)
        assert disk(self.watched) == before


@pytest.fixture
def refuses(run: Run, tmp_path: Path) -> Refuses:
    return Refuses(run, tmp_path)


@pytest.fixture
def scores_file(tmp_path: Path) -> Path:
    modules = {
        f"model.layers.{layer}.{name}": ModuleScore(layer, 1.0 + layer, *shape, kind)
        for layer in range(4)
        for name, shape, kind in (
            ("self_attn.q_proj", (32, 32), "attention"),
            ("mlp.up_proj", (32, 48), "mlp"),
        )
    }
    scores = Scores("aletheia", (2.0, 4.0, 6.0, 8.0), modules, "model.layers")
    path = tmp_path / "scores.json"
    path.write_text(scores.to_json())
    return path


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    modules = {
        f"model.layers.{layer}.{name}": ModulePlan(16, 32.0)
        for layer in (2, 3)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    }
    path = tmp_path / "plan.json"
    path.write_text(Plan(modules, 4, "model.layers").to_json())
    return path


@pytest.fixture
def given(tiny_model_dir: Path, train_file: Path, eval_file: Path) -> dict[str, Path | str]:
    """The options of a sound `aletheia train`, without plan and output."""
    return {"--model": tiny_model_dir, "--train": train_file, "--eval": eval_file, "--steps": "3"}


def options(values: dict[str, Any], **changes: Any) -> list[str]:
    merged = {**values, **{f"--{name.replace('_', '-')}": value for name, value in changes.items()}}
    return [str(part) for pair in merged.items() for part in pair]


def test_probe_plan_train_in_sequence(run, given, tiny_model_dir, train_file, tmp_path):
    scores, plan, out = tmp_path / "scores.json", tmp_path / "plan.json", tmp_path / "adapter"
    ran = run("probe", "--model", tiny_model_dir, "--train", train_file, "--out", scores)
    assert ran.code == 0, ran
    assert len(Scores.from_json(scores.read_text()).layers) == 4

    ran = run("plan", "--scores", scores, "--layers", "50%", "--ranks", "by-type", "--out", plan)
    assert ran.code == 0, ran
    chosen = Plan.from_json(plan.read_text())
    assert len(chosen.layers) == 2
    assert {module.rank for module in chosen.modules.values()} == {16, 64}

    ran = run("train", *options(given, plan=plan, out=out))
    assert ran.code == 0, ran
    assert "held-out loss" in ran.out
    assert "adapted modules run on the kernels" in ran.err
    assert Plan.from_json((out / "plan.json").read_text()) == chosen
    assert json.loads((out / "metrics.json").read_text())["stopped"] is None
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "plan.json", "scores.json"]


@pytest.mark.parametrize("switch", ["--faithful", "--sketch"])
def test_probe_switches(run, tiny_model_dir, train_file, tmp_path, switch):
    out = tmp_path / "scores.json"
    ran = run("probe", "--model", tiny_model_dir, "--train", train_file, "--out", out, switch)
    assert ran.code == 0, ran
    assert all(score > 0 for score in Scores.from_json(out.read_text()).layers)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_scores_that_plan_takes(run, tiny_model_dir, train_file, tmp_path, method):
    out, plan = tmp_path / "scores.json", tmp_path / "plan.json"
    arguments = ("--model", tiny_model_dir, "--train", train_file, "--out", out, "--method", method)
    ran = run("probe", *arguments, *(("--pooling", "mean") if method == "cka" else ()))
    assert ran.code == 0, ran
    scores = Scores.from_json(out.read_text())
    assert scores.method == method
    assert scores.meta.get("pooling") == ("mean" if method == "cka" else None)
    assert run("plan", "--scores", out, "--out", plan).code == 0
    assert len(Plan.from_json(plan.read_text()).layers) == 2


def test_the_command_line_offers_every_method_pooling_and_control():
    assert [method.value for method in cli.Method] == list(METHODS)
    assert [pooling.value for pooling in cli.Pooling] == list(get_args(Pooling))
    assert [control.value for control in cli.Control] == list(CONTROLS)


def test_a_control_chooses_as_many_layers_without_the_scores(run, scores_file, tmp_path):
    out = tmp_path / "plan.json"
    assert run("plan", "--scores", scores_file, "--out", out, "--control", "bottom").code == 0
    assert Plan.from_json(out.read_text()).layers == (0, 1)
    drawn = []
    for seed in range(6):
        arguments = ("--control", "random", "--seed", seed, "--overwrite")
        assert run("plan", "--scores", scores_file, "--out", out, *arguments).code == 0
        drawn.append(Plan.from_json(out.read_text()).layers)
    assert {len(layers) for layers in drawn} == {2}
    assert len(set(drawn)) > 1


def test_plan_switches_reach_the_plan(run, scores_file, tmp_path):
    out = tmp_path / "plan.json"
    ran = run(
        *("plan", "--scores", scores_file, "--out", out, "--layers", "75", "--rank", "3", "--alpha", "5"),
        *("--targets", "up_proj", "--dropout", "0.1"),
    )
    assert ran.code == 0, ran
    plan = Plan.from_json(out.read_text())
    assert plan.layers == (1, 2, 3)
    assert set(plan.modules.values()) == {ModulePlan(3, 5.0)}
    assert plan.dropout == 0.1
    assert len(plan.modules) == 3


def test_rslora_reaches_the_plan(run, scores_file, tmp_path):
    out = tmp_path / "plan.json"
    assert run("plan", "--scores", scores_file, "--out", out, "--rank", 4, "--alpha", 6, "--rslora").code == 0
    assert {m.alpha / m.rank for m in Plan.from_json(out.read_text()).modules.values()} == {3.0}


def test_a_plan_without_a_probe(run, refuses, given, tmp_path):
    """The weights are not read: the configuration is enough."""
    model, out = tmp_path / "model", tmp_path / "plan.json"
    model.mkdir()
    shutil.copy(given["--model"] / "config.json", model)
    make = ("plan", "--model", model, "--out", out)
    ran = run(*make, "--rank", 4, "--alpha", 32)
    assert ran.code == 0, ran
    assert "4 of 4 layers (0, 1, 2, 3), 28 modules" in ran.out
    assert set(Plan.from_json(out.read_text()).modules.values()) == {ModulePlan(4, 32.0)}
    assert run("plan", out, "--show").code == 0
    assert run("train", *options(given, plan=out, out=tmp_path / "adapter")).code == 0

    blind = tmp_path / "blind.json"
    chosen = ("--control", "spaced", "--targets", "up_proj", "--dropout", "0.1", "--rslora", "--rank", "4")
    assert run("plan", "--model", model, "--out", blind, *chosen).code == 0
    plan = Plan.from_json(blind.read_text())
    assert plan.modules == {f"model.layers.{i}.mlp.up_proj": ModulePlan(4, 16.0) for i in (1, 3)}
    assert (plan.dropout, plan.meta["control"]) == (0.1, "spaced")
    draws = set()
    for seed in range(8):
        random = ("--control", "random", "--layers", "25%", "--seed", seed, "--overwrite")
        assert run("plan", "--model", model, "--out", blind, *random).code == 0
        draws.add(Plan.from_json(blind.read_text()).layers)
    assert len(draws) > 1

    new = ("plan", "--model", model, "--out", tmp_path / "new.json")
    refuses(*new, "--layers", "50%", says=("50% of the layers, and nothing to choose them by",))
    refuses(*new, "--control", "top", "--layers", "0%", says=("share of layers",))
    for option, value in [
        ("--full", "10%"),
        ("--ranks", "by-type"),
        ("--budget", "60%"),
        ("--scores", "s.json"),
    ]:
        refuses(*new, option, value, says=(f"{option} does nothing with --model",))
    refuses(*new, "--mlp-rank", "8", says=("--mlp-rank does nothing with --ranks uniform",))
    refuses(*new, "--control", "top", "--seed", "1", says=("--seed does nothing",))
    for rank in (0, -4):
        refuses(*new, "--rank", rank, "--rslora", says=(f"rank {rank}",))
    refuses("plan", "--model", model, "--out", out, says=(out, "--overwrite"))
    config = model / "config.json"
    refuses("plan", "--model", model, "--out", config, "--overwrite", says=("would replace",))
    refuses("plan", "--model", model, says=("--out",))
    refuses("plan", "--model", tmp_path / "none", *new[3:], says=("does not exist",))
    sound = json.loads(config.read_text())
    for broken, says in [
        ({"model_type": "clip"}, "(clip) is no causal language model and no text classifier"),
        ({"model_type": "t5"}, "(t5) is no causal language model and no text classifier"),
        ({"model_type": "of-its-own", "auto_map": {"AutoConfig": "mine.Config"}}, "cannot load a model from"),
        ({**sound, "hidden_size": "x"}, "'hidden_size'"),
        ({**sound, "num_attention_heads": 0}, "cannot load a model from"),
        ({**sound, "dtype": "nope"}, "nope"),
        (None, "cannot load a model from"),
    ]:
        config.write_text(json.dumps(broken))
        refuses(*new, says=(says,))
    config.write_text("{")
    refuses(*new, says=("cannot load a model from",))


def test_a_plan_without_a_probe_is_one_that_can_be_trained(refuses, tmp_path):
    """What PEFT would not adapt as planned is refused before a model is loaded."""
    FAMILIES["Mixtral"].build().config.save_pretrained(tmp_path / "model")
    make = ("plan", "--model", tmp_path / "model", "--out", tmp_path / "plan.json")
    refuses(*make, "--dropout", "0.1", says=("cannot have dropout",))


def test_from_a_probe_to_modules_in_full_to_one_merged_model(run, refuses, given, tmp_path):
    scores, plan = tmp_path / "scores.json", tmp_path / "plan.json"
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    probe = ("probe", "--model", given["--model"], "--train", given["--train"], "--method", "hybrid")
    assert run(*probe, "--batches", "2", "--out", scores).code == 0
    ran = run("plan", "--scores", scores, "--full", "10%", "--rank", "4", "--out", plan)
    assert ran.code == 0, ran
    chosen = Plan.from_json(plan.read_text())
    assert chosen.layers == (0, 1, 2, 3)
    assert len(chosen.full) == 2
    assert all(
        f"in full for its score of {chosen.meta['full_scores'][n]:.5g}: {n}" in ran.out for n in chosen.full
    )
    assert "26 modules, 2 in full" in ran.out
    trained = ("train", *options(given, plan=plan, out=adapter, full_rate=0.5, dtype="float32"))
    assert run(*trained).code == 0
    assert json.loads((adapter / "metrics.json").read_text())["config"]["full_rate"] == 0.5
    merge = ("merge", "--model", given["--model"], "--adapter", adapter, "--out", merged)
    ran = run(*merge)
    assert ran.code == 0, ran
    assert ran.out == f"28 modules merged: {merged}\n"
    assert AutoModelForCausalLM.from_pretrained(merged).num_parameters() > 0
    refuses(*merge, says=(merged, "--overwrite"))
    refuses(
        *merge[:3],
        "--adapter",
        tmp_path / "none",
        "--out",
        tmp_path / "new",
        says=("none", "has no adapter_config"),
    )


def test_training_switches_reach_the_metrics(run, given, plan_file, tmp_path):
    out = tmp_path / "adapter"
    switches = ["--lora-plus", 4, "--init", "gradient", "--packing", "--group-by-length"]
    ran = run("train", *options(given, plan=plan_file, out=out, steps=2, dtype="float32"), *switches)
    assert ran.code == 0, ran
    config = json.loads((out / "metrics.json").read_text())["config"]
    expected = {"lora_plus": 4.0, "init": "gradient", "packing": True, "group_by_length": True}
    assert {name: config[name] for name in expected} == expected


def test_race_sets_the_plan_beside_uniform_peft(run, given, plan_file, tmp_path, monkeypatch):
    from aletheia_tune import race as race_module
    from aletheia_tune import report

    seen: dict[str, Any] = {}

    class Result:
        arms = ()

        def table(self) -> str:
            return "the table"

        def objection(self) -> str:
            return "nobody ran"

    def fake(arms: Any, *paths: Any, **settings: Any) -> Result:
        seen.update(settings, arms=arms, paths=paths)
        return Result()

    monkeypatch.setattr(race_module, "race", fake)
    monkeypatch.setattr(report, "write_report", lambda *_, **__: None)
    (tmp_path / "other.txt").write_text("a b c")
    out = tmp_path / "race"
    ran = run("compare", *options(given, plan=plan_file, out=out, rank=2, other_text=tmp_path / "other.txt"))
    assert ran.code == 0, ran
    assert "the table" in ran.out
    uniform, planned = seen["arms"]
    assert (uniform.kernels, planned.kernels) == (False, True)
    assert {module.rank for module in uniform.plan.modules.values()} == {2}
    assert len(uniform.plan.layers) == 4
    assert planned.plan == Plan.from_json(plan_file.read_text())
    assert seen["extra_text"] == "a b c"
    assert seen["paths"][0] == given["--model"]


def test_compare_leaves_a_page_with_its_own_command(run, given, plan_file, tmp_path):
    out = tmp_path / "beside it"
    given = {**given, "--steps": "4", "--price-per-hour": "2.5", "--watts": "300"}
    arguments = options(given, plan=plan_file, out=out, rank=2, slice=2, dtype="float32")
    ran = run("compare", *arguments, "--json")
    assert ran.code == 0, ran
    answered = json.loads(ran.out)
    assert answered["objection"] is None
    assert set(answered["arms"]) == {"uniform-peft", "plan-kernels"}
    assert all(arm["eval_loss_after"] > 0 for arm in answered["arms"].values())
    (saving,) = answered["savings_in_1000_steps"]
    assert saving["worth"]["money"] == pytest.approx(2.5 * saving["saved"])
    assert saving["worth"]["kwh"] == pytest.approx(0.3 * saving["saved"])

    page = Path(answered["page"]).read_text(encoding="utf-8")
    assert Path(answered["page"]) == out / "report.html"
    assert accessibility.problems(page) == []
    shown = accessibility.parse(page).find("pre")[0].all_text()
    assert shown == shlex.join(["aletheia", "compare", *arguments, "--json"])
    headings = [heading.all_text() for heading in accessibility.parse(page).find("h2")]
    assert headings == [
        "The table",
        "What the saving is worth",
        "Held-out loss",
        "Where the time of a step goes",
        "Layers and ranks",
        "Where and how it ran",
        "To repeat it",
    ]


def test_race_answers_with_the_verdict_and_writes_its_page(run, refuses, tmp_path, monkeypatch):
    from aletheia_tune import referee

    results = Path(__file__).resolve().parents[2] / "benchmarks" / "studies" / "results"
    verdict = referee.Verdict.from_json((results / "gsm8k.json").read_text(encoding="utf-8"))
    monkeypatch.setattr(referee, "read_task", lambda path: path)
    monkeypatch.setattr(referee, "referee", lambda *_, **__: verdict)
    ran = run("race", "TASK.toml", "--out", tmp_path, "--watts", "100", "--json")
    assert ran.code == 0, ran
    answered = json.loads(ran.out)
    assert answered["chosen"] == {"PEFT": 0.002, "packed": 0.002}
    ratios = sorted(one["ratio_time_to_target"] for one in answered["arms"]["packed"].values())
    (saving,) = answered["savings_in_100_hours"]
    assert saving["saved"] == pytest.approx(100 * (1 - ratios[1]))
    assert (saving["least"], saving["most"]) == pytest.approx((100 * (1 - ratios[2]), 100 * (1 - ratios[0])))
    assert saving["worth"] == {"kwh": pytest.approx(0.1 * saving["saved"])}
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "That range holds the median over all seeds with a confidence of 75%." in page
    assert f"aletheia race TASK.toml --out {tmp_path} --watts 100 --json" in page
    assert "seed 0" in page
    assert "by steps" in page
    assert f"the page is {tmp_path / 'report.html'}" in run("race", "TASK.toml", "--out", tmp_path).out
    for option in ("--watts", "--price-per-hour"):
        refuses("race", "TASK.toml", "--out", tmp_path, option, "-1", says=("must be a positive number",))


def test_every_step_on_the_way_answers_in_json(run, given, tiny_model_dir, train_file, tmp_path):
    scores, plan, out = tmp_path / "scores.json", tmp_path / "plan.json", tmp_path / "adapter"

    def answered(*arguments: Any) -> dict[str, Any]:
        ran = run(*arguments, "--json")
        assert ran.code == 0, ran
        assert ran.out.count("\n") == 1
        return json.loads(ran.out)

    probed = answered("probe", "--model", tiny_model_dir, "--train", train_file, "--out", scores)
    assert probed["layers"] == list(Scores.from_json(scores.read_text()).layers)
    planned = answered("plan", "--scores", scores, "--out", plan)
    made = Plan.from_json(plan.read_text())
    assert planned["layers"] == list(made.layers)
    assert planned["ranks"] == {name: module.rank for name, module in made.modules.items()}
    assert answered("plan", plan) == planned
    trained = answered("train", *options(given, plan=plan, out=out))
    metrics = json.loads((out / "metrics.json").read_text())
    assert trained["eval_loss_after"] == metrics["eval_loss_after"]
    assert trained["out"] == str(out)
    # What was probed and planned, word for word, goes with the plan.
    assert made.meta["probe"]["command"][:2] == ["aletheia", "probe"]
    assert made.meta["command"] == ["aletheia", "plan", "--scores", str(scores), "--out", str(plan), "--json"]


def test_doctor_answers_in_json(run, monkeypatch):
    ran = run("doctor", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["healthy"]) == (0, True)
    assert "lora_group" in {one["operator"] for one in found["devices"][0]["operators"]}
    monkeypatch.setenv("ALETHEIA_BACKEND", "abacus")
    ran = run("doctor", "--json")
    found = json.loads(ran.out)
    assert (ran.code, found["healthy"]) == (1, False)
    assert "abacus" in found["devices"][0]["failure"]


def test_a_plan_is_drawn_when_made_and_when_it_is_there(run, refuses, scores_file, tmp_path):
    out = tmp_path / "plan.json"
    made = run("plan", "--scores", scores_file, "--out", out, "--show")
    assert made.code == 0, made
    again = run("plan", out, "--show")
    assert again.code == 0, again
    assert again.out == made.out
    assert "no graph" in made.out
    assert "█" in made.out
    assert "\x1b" not in made.out
    assert run("plan", out).out == made.out
    refuses("plan", out, "--layers", "25%", says=("only shown: drop --layers",))
    refuses("plan", out, "--scores", scores_file, says=("only shown: drop --scores",))
    refuses("plan", out, "--show", "--json", says=("give one of them",))
    refuses("plan", tmp_path / "none.json", says=("cannot read the plan file",))
    refuses("plan", "--show", says=("give --scores, or --model",))


def test_alone_it_explains_itself(run):
    ran = run()
    assert ran.code == 0
    assert ran.err == ""
    words = " ".join(ran.out.split())
    for command in (
        "plan --model DIR",
        "train --model DIR",
        "probe --model DIR",
        "plan --scores scores.json",
    ):
        assert f"aletheia {command}" in words
    assert all(command in words for command in COMMANDS)


def test_doctor_passes_here(run):
    ran = run("doctor")
    assert ran.code == 0, ran
    for words in ("torch", "transformers", "lora_group", "weight_grad_norm_sq", "avx2", "ok"):
        assert words in ran.out


def test_doctor_fails_with_a_wrong_operator(run, monkeypatch):
    import dataclasses

    from aletheia_kernels import selftest

    results = selftest.run()
    wrong = [dataclasses.replace(results[0], ok=False, error=1.0), *results[1:]]
    monkeypatch.setattr(selftest, "run", lambda device: wrong)
    ran = run("doctor")
    assert ran.code == 1
    assert "wrong" in ran.out


def test_doctor_says_why_a_forced_backend_cannot_serve(run, monkeypatch):
    monkeypatch.setenv("ALETHEIA_BACKEND", "abacus")
    ran = run("doctor")
    assert ran.code == 1
    assert "abacus" in ran.out


def test_doctor_names_the_instruction_set_in_use(run):
    with cpu.forced_instruction_set("default"):
        ran = run("doctor")
    assert ran.code == 0, ran
    assert re.search(r"instruction set in use\W+default", ran.out)
    done = subprocess.run(
        [sys.executable, "-m", "aletheia_tune", "doctor"],
        capture_output=True,
        text=True,
        env={**os.environ, "ALETHEIA_CPU_ISA": "avx1024"},
    )
    assert done.returncode == 1
    assert "'avx1024' names no instruction set" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run, command):
    ran = run(command, "--help")
    assert ran.code == 0
    assert f"aletheia {command}" in " ".join(ran.out.split())
    assert "Example:" in ran.out


def test_help_waits_for_no_heavy_import():
    code = (
        "import sys; from aletheia_tune import cli; "
        "sys.exit(bool({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_module_is_the_command():
    ran = subprocess.run(
        [sys.executable, "-m", "aletheia_tune", "--help"], capture_output=True, text=True, check=True
    )
    assert all(command in ran.stdout for command in COMMANDS)


# Bad input: each one line, exit code 2, the disk untouched.


@pytest.mark.parametrize("role", ["--train", "--eval"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        ("", "is empty"),
        ("\n\n", "is empty"),
        ('{"prompt": "repeat a", "completion": "a"}\n{"prompt": "repeat', "line 2"),
        ('{"prompt": "repeat a", "completion": "a"}\n[]\n', "line 2"),
        ('{"prompt": "repeat a", "completion": "a"}\n{"prompt": "repeat a"}\n', "line 2"),
        ('{"question": "a", "answer": "b"}\n', "line 1"),
        ('{"prompt": "repeat a", "completion": ""}\n', "no completion tokens"),
    ],
    ids=["missing", "empty", "blank", "broken", "no-object", "no-field", "unknown-fields", "no-completion"],
)
def test_bad_data(refuses, given, plan_file, tmp_path, role, content, says):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_text(content)
    out = tmp_path / "out"
    refuses("train", *options({**given, role: path}, plan=plan_file, out=out), says=(path, says))
    if role == "--train":
        scores = tmp_path / "new.json"
        refuses("probe", "--model", given["--model"], "--train", path, "--out", scores, says=(path, says))


def test_train_with_a_prefix_cache(run, refuses, given, plan_file, tmp_path):
    cache = tmp_path / "cache"
    for name, says in (("first", "computed and kept"), ("second", " 0 computed and kept")):
        arguments = options(given, plan=plan_file, out=tmp_path / name, prefix_cache=cache)
        ran = run("train", *arguments, "--prefix-cache-gb", "0.5")
        assert ran.code == 0, ran
        assert "prefix cache: " in ran.out
        assert says in ran.out
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert metrics["prefix_cache"] in ran.out
    arguments = options(given, plan=plan_file, out=tmp_path / "out", prefix_cache=plan_file)
    refuses("train", *arguments, says=("prefix cache", plan_file))
    refuses("train", *arguments, "--prefix-cache-gb", "-1", says=("prefix cache of -1.0 GiB",))


def test_train_with_sampled_depth(run, refuses, given, tiny_model_dir, scores_file, tmp_path):
    prices, plan = tmp_path / "cost.json", tmp_path / "plan.json"
    # Not measured: noise on so small a model could leave the backward pass without a price.
    costs = dict.fromkeys((field.name for field in dataclasses.fields(Coefficients)), 1e-9)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    calibration = Calibration(ModelShape.of(model), Batch(2, 16), Coefficients(**costs), {})
    prices.write_text(calibration.to_json())
    assert run("plan", "--scores", scores_file, "--layers", "100%", "--out", plan).code == 0
    arguments = options(given, plan=plan, out=tmp_path / "out")
    ran = run("train", *arguments, "--sampled-depth", "80%", "--calibration", prices, "--reweight-depth")
    assert ran.code == 0, ran
    assert "backward passes end at layer 0" in ran.err
    assert "backward passes" not in ran.out
    config = json.loads((tmp_path / "out" / "metrics.json").read_text())["config"]
    assert config["reweight_depth"] is True
    assert sum(config["sampled_depth"].values()) == pytest.approx(1)
    assert min(map(int, config["sampled_depth"])) == 0
    arguments = options(given, plan=plan, out=tmp_path / "other")
    refuses("train", *arguments, "--sampled-depth", "80%", says=("--calibration", "go together"))
    refuses("train", *arguments, "--calibration", prices, says=("--sampled-depth", "go together"))
    bad = ("train", *arguments, "--calibration", prices, "--sampled-depth")
    refuses(*bad, "0.1%", says=("0.1% of the step time is too little", "give at least"))
    refuses(*bad, "often", says=("--sampled-depth often is not a share",))


def test_train_with_a_shrinking_schedule(run, refuses, given, scores_file, plan_file, tmp_path):
    plan = tmp_path / "all.json"
    assert run("plan", "--scores", scores_file, "--layers", "100%", "--out", plan).code == 0
    arguments = options(given, plan=plan, out=tmp_path / "out", prefix_cache=tmp_path / "cache")
    ran = run("train", *arguments, "--shrink-after", "60%", "--shrink-to", "25%")
    assert ran.code == 0, ran
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["config"]["shrink_after"], metrics["config"]["shrink_to"]) == (60, 25)
    assert metrics["prefix_layers"] == 3
    assert "computed and kept" in metrics["prefix_cache"]
    arguments = options(given, plan=plan_file, out=tmp_path / "other")
    refuses("train", *arguments, "--shrink-after", "50%", says=("the plan adapts none below",))
    refuses("train", *arguments, "--shrink-to", "50%", says=("--shrink-to goes with --shrink-after",))
    refuses("train", *arguments, "--shrink-after", "0%", says=("shrink_after is 0",))


def test_no_completion_left_by_truncation(refuses, given, plan_file, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "repeat " + "a " * 50, "completion": "a"}) + "\n")
    arguments = options({**given, "--train": path}, plan=plan_file, out=tmp_path / "out", max_length=16)
    refuses("train", *arguments, says=(path, "no completion tokens", "--max-length"))


def test_no_such_field(refuses, given, plan_file, tmp_path):
    arguments = options(given, plan=plan_file, out=tmp_path / "out", text_field="body")
    refuses("train", *arguments, says=("line 1", "'body'"))
    arguments = options(given, plan=plan_file, out=tmp_path / "out", prompt_field="prompt")
    refuses("train", *arguments, says=("completion field",))


@pytest.mark.parametrize("command", ["probe", "train", "compare"])
def test_unknown_model_directory(refuses, given, plan_file, tmp_path, command):
    model = tmp_path / "nowhere" / "model"
    if command == "probe":
        arguments = ["--model", model, "--train", given["--train"], "--out", tmp_path / "new.json"]
    else:
        arguments = options({**given, "--model": model}, plan=plan_file, out=tmp_path / "out")
    refuses(command, *arguments, says=("model directory", model, "does not exist"))


def test_model_without_layers(refuses, given, plan_file, tmp_path):
    model = tmp_path / "flat"
    config = LlamaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=0, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(model)
    AutoTokenizer.from_pretrained(given["--model"]).save_pretrained(model)
    new = tmp_path / "new.json"
    says = ("no list of transformer layers",)
    refuses("probe", "--model", model, "--train", given["--train"], "--out", new, says=says)
    flat = {**given, "--model": model}
    refuses("compare", *options(flat, plan=plan_file, out=tmp_path / "out"), says=says)
    refuses("train", *options(flat, plan=plan_file, out=tmp_path / "out"), says=("model.layers.2.",))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--targets", "w_proj"], "w_proj"),
        (["--rank", "0"], "rank"),
        (["--rank", "-4"], "rank"),
        (["--ranks", "by-type", "--attention-rank", "0"], "rank"),
        (["--ranks", "by-type", "--mlp-rank", "-1"], "rank"),
        (["--ranks", "by-score", "--budget", "3"], "3"),
        (["--budget", "much"], "neither a share of the step time"),
        (["--budget", "60%"], "give --calibration"),
        (["--calibration", "cost.json"], "--budget like 60%"),
        (["--frontier", "frontier.svg"], "--budget like 60%"),
        (["--budget", "60%", "--calibration", "none.json"], "cannot read the calibration file none.json"),
        (["--budget", "60%", "--calibration", "none.json", "--layers", "50%"], "drop --layers"),
        (["--full", "100%"], "100"),
        (["--full", "some"], "--full some is not a share"),
        (["--full", "10%", "--control", "top"], "not by control 'top'"),
        (["--budget", "60%", "--calibration", "none.json", "--full", "10%"], "drop --layers, --full"),
        (["--layers", "0%"], "0"),
        (["--layers", "-5%"], "-5"),
        (["--layers", "100.5%"], "100.5"),
        (["--layers", "nan"], "nan"),
        (["--layers", "half"], "half"),
        (["--alpha", "0"], "alpha"),
        (["--dropout", "1"], "dropout"),
        (["--mlp-rank", "8"], "--mlp-rank does nothing with --ranks uniform"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_plan_choices(refuses, scores_file, tmp_path, arguments, says):
    refuses("plan", "--scores", scores_file, "--out", tmp_path / "new.json", *arguments, says=(says,))


def test_from_timing_to_a_plan_within_a_time_budget(run, refuses, tiny_model_dir, scores_file, tmp_path):
    prices, plan, svg = tmp_path / "cost.json", tmp_path / "plan.json", tmp_path / "frontier.svg"
    shape = ("--batch", "2", "--length", "32", "--dtype", "float32")
    assert run("cost", "--model", tiny_model_dir, "--out", prices, *shape).code == 0
    budgeted = ("plan", "--scores", scores_file, "--calibration", prices, "--out", plan)
    ran = run(*budgeted, "--budget", "95%", "--frontier", svg)
    assert ran.code == 0, ran
    chosen = Plan.from_json(plan.read_text())
    assert chosen.meta["predicted_time"] <= 0.95
    assert "price ms" in ran.out
    assert ElementTree.fromstring(svg.read_text()).tag == "{http://www.w3.org/2000/svg}svg"
    other = (*budgeted[:-1], tmp_path / "other.json")
    refuses(*other, "--budget", "0.01%", says=("too small for any adapter: give at least",))
    refuses(*other, "--budget", "200%", says=("outside (0, 1]",))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--batch", "0"), "batch 0 x 512 is too small"),
        (("--length", "1"), "batch 4 x 1 is too small"),
        (("--labelled", "0"), "labelled share 0.0"),
        (("--threads", "0"), "threads is 0"),
        (("--length", "4096"), "above the model's 128 positions"),
    ],
)
def test_shapes_that_cannot_be_timed(refuses, tiny_model_dir, tmp_path, arguments, says):
    refuses("cost", "--model", tiny_model_dir, "--out", tmp_path / "cost.json", *arguments, says=(says,))


@pytest.mark.parametrize("content", [None, "", "{}", "[1]", '{"format": "aletheia-plan"}'])
def test_scores_that_are_none(refuses, tmp_path, content):
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    refuses("plan", "--scores", path, "--out", tmp_path / "new.json", says=("scores",))


@pytest.mark.parametrize("content", [None, "", "{}", '{"format": "aletheia-scores"}'])
def test_plans_that_are_none(refuses, given, tmp_path, content):
    path = tmp_path / "p.json"
    if content is not None:
        path.write_text(content)
    refuses("train", *options(given, plan=path, out=tmp_path / "out"), says=("plan",))


def test_a_plan_of_another_model(refuses, given, tmp_path):
    path = tmp_path / "p.json"
    path.write_text(Plan({"model.layers.9.mlp.up_proj": ModulePlan(4, 8.0)}, 10, "model.layers").to_json())
    refuses("train", *options(given, plan=path, out=tmp_path / "out"), says=("model.layers.9.mlp.up_proj",))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 1}, "steps and epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"learning_rate": -1}, "learning rate"),
        ({"full_rate": 0}, "full_rate is 0"),
        ({"max_length": 1}, "max length"),
        ({"threads": 0}, "threads"),
        ({"seed": -1}, "seed is -1"),
        ({"full_rate": 0.5}, "--full-rate does nothing with a plan that trains nothing in full"),
        ({"prefix_cache_gb": 2}, "--prefix-cache-gb does nothing with no --prefix-cache"),
        ({"prefix_cache": ".", "prefix_cache_gb": "inf"}, "a size above 0 that the disk has"),
    ],
)
def test_bad_training_settings(refuses, given, plan_file, tmp_path, changes, says):
    refuses("train", *options(given, plan=plan_file, out=tmp_path / "out", **changes), says=(says,))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batches": 0}, "number of batches"),
        ({"batch_size": 0}, "batch size"),
        ({"pooling": "mean"}, "--pooling does nothing with --method aletheia"),
    ],
)
def test_bad_probe_settings(refuses, given, tmp_path, changes, says):
    values = {"--model": given["--model"], "--train": given["--train"], "--out": tmp_path / "new.json"}
    refuses("probe", *options(values, **changes), says=(says,))


def test_the_published_probe_takes_no_batches(refuses, given, tmp_path):
    values = {"--model": given["--model"], "--train": given["--train"], "--out": tmp_path / "new.json"}
    refuses(
        "probe", *options(values, batches=20), "--faithful", says=("--batches does nothing with --faithful",)
    )


def test_no_output_in_the_place_of_an_input(refuses, given, plan_file, scores_file, tmp_path):
    """Also when overwriting is asked for."""
    out = tmp_path / "out"
    shutil.copytree(given["--model"], out / "model")
    mine = {**given, "--model": out / "model"}
    for place in (out, out / "model"):
        arguments = options(mine, plan=plan_file, out=place)
        refuses("train", *arguments, "--overwrite", says=(f"would replace {out / 'model'}",))
        refuses("compare", *arguments, "--overwrite", says=(f"would replace {out / 'model'}",))
    refuses("plan", *options({}, scores=scores_file, out=scores_file), "--overwrite", says=("would replace",))
    arguments = options(given, plan=plan_file, out=tmp_path / "new", prefix_cache=tmp_path / "new" / "cache")
    refuses("train", *arguments, says=("would replace",))


@pytest.mark.parametrize("name", ["/", "x" * 250])
def test_output_names_that_cannot_be(refuses, given, plan_file, tmp_path, name):
    refuses("train", *options(given, plan=plan_file, out=tmp_path / name), says=("output",))


def test_a_race_of_files_that_are_none(refuses, given, tmp_path):
    for name in ("train", "eval"):
        shutil.copy(given[f"--{name}"], tmp_path / f"{name}.jsonl")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty").mkdir()
    task = tmp_path / "task.toml"
    for model, key, says in (
        (tmp_path / "empty", "", "has no config.json"),
        (given["--model"], 'other_text = "empty"', "is no file"),
    ):
        task.write_text(task_text("tiny", model, 24, key))
        refuses("race", task, "--out", tmp_path / "race", says=(says,))
    task.write_text(task_text("tiny", given["--model"], 24, 'other_text = "latin.txt"'))
    assert_one_line(refuses.run("race", task, "--out", tmp_path / "race"), "not UTF-8 text")


def test_a_race_of_rank_zero(refuses, given, plan_file, tmp_path):
    refuses("compare", *options(given, plan=plan_file, out=tmp_path / "out", rank=0), says=("rank",))


@pytest.mark.parametrize("command", ["train", "compare"])
def test_output_directory_that_is_not_empty(refuses, given, plan_file, tmp_path, command, monkeypatch):
    from aletheia_tune import loading

    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("work began"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    refuses(command, *options(given, plan=plan_file, out=out), says=(out, "--overwrite"))
    refuses(command, *options(given, plan=plan_file, out=out / "mine.txt"), says=("mine.txt",))


def test_output_file_that_exists(refuses, given, scores_file, tmp_path, monkeypatch):
    from aletheia_tune import loading

    monkeypatch.setattr(loading, "load_model", lambda *_: pytest.fail("work began"))
    probe = ("probe", "--model", given["--model"], "--train", given["--train"])
    refuses(*probe, "--out", scores_file, says=(scores_file, "--overwrite"))
    refuses(*probe, "--out", tmp_path / "no" / "s.json", says=("does not exist",))
    refuses("plan", "--scores", scores_file, "--out", scores_file, says=(scores_file, "--overwrite"))


def test_overwrite(run, given, plan_file, scores_file, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    assert run("train", *options(given, plan=plan_file, out=out), "--overwrite").code == 0
    assert not (out / "old.txt").exists()
    assert run("plan", "--scores", scores_file, "--out", plan_file, "--overwrite").code == 0


def test_a_loss_that_is_not_finite_keeps_the_last_good_adapter(run, given, plan_file, tmp_path):
    out = tmp_path / "out"
    # The first projection overflows. From 1e30 a model comes back: a norm divides what is too large by infinity.
    arguments = options({**given, "--steps": "9"}, plan=plan_file, out=out, learning_rate="3e38", warmup=0)
    ran = run("train", *arguments)
    assert_one_line(ran, "at step 2", out)
    adapter = load_file(out / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    metrics = json.loads((out / "metrics.json").read_text())
    assert "at step 2" in metrics["stopped"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.json"]


def small_files_only(limit: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process in which every write beyond `limit` bytes of a file fails."""
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); "
        "from aletheia_tune.cli import main; main()"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def test_no_space_left_for_the_plan(scores_file, tmp_path):
    before = disk(tmp_path)
    ran = small_files_only(200, "plan", "--scores", scores_file, "--out", tmp_path / "new.json")
    assert_one_line(Ran(ran.returncode, ran.stdout, ran.stderr), "no space left", tmp_path / "new.json")
    assert disk(tmp_path) == before


@pytest.mark.parametrize("limit", [1000, 7000], ids=["first-file", "adapter"])
def test_no_space_left_for_the_adapter(given, plan_file, tmp_path, limit):
    before = disk(tmp_path)
    ran = small_files_only(limit, "train", *options(given, plan=plan_file, out=tmp_path / "out"))
    assert_one_line(Ran(ran.returncode, ran.stdout, ran.stderr), "no space left", tmp_path / "out")
    assert disk(tmp_path) == before


def test_interrupt_keeps_the_adapter_and_says_so(given, plan_file, tmp_path):
    out = tmp_path / "out"
    arguments = options({**given, "--steps": "1000000"}, plan=plan_file, out=out)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "aletheia_tune", "train", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGINT)
            break
    rest = process.stderr.read().splitlines()
    assert process.wait() == 130
    assert rest[-1].startswith("aletheia: interrupted after step ")
    assert str(out) in rest[-1]
    assert "Traceback" not in "\n".join(rest)
    assert (out / "adapter_model.safetensors").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.json"]


def living(group: int) -> list[list[str]]:
    """Command lines of the processes of a process group that have not ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.cmdline())
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def test_interrupting_a_race_leaves_no_file_and_no_process(given, plan_file, tmp_path):
    before = disk(tmp_path)
    arguments = options({**given, "--steps": "1000000"}, plan=plan_file, out=tmp_path / "out", rank=2)
    process = subprocess.Popen(
        [sys.executable, "-m", "aletheia_tune", "compare", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("plan-kernels: step "):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the arms as well
            break
    rest = process.stderr.read().splitlines()
    assert process.wait() == 130
    assert rest[-1] == "aletheia: interrupted; nothing was written"
    assert "Traceback" not in "\n".join(rest)
    deadline = time.monotonic() + 30  # the bookkeeper of multiprocessing ends by itself, a little later
    while (left := living(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []
    assert disk(tmp_path) == before


def test_records_are_cut_to_the_positions_of_the_model(run, given, tiny_model_dir, tmp_path):
    model, plan, path = tmp_path / "model", tmp_path / "plan.json", tmp_path / "some.jsonl"
    words = AutoTokenizer.from_pretrained(tiny_model_dir)
    # No multiple of 8, so that padding must not pass it either.
    sizes = {"n_positions": 20, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(words), **sizes)).save_pretrained(model)
    words.save_pretrained(model)
    records = [{"prompt": "repeat a b", "completion": "a " * count} for count in (3, 14, 50)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    told = f"{path}: 1 records cut to 20 tokens, 0 left out"

    ran = run("probe", "--model", model, "--train", path, "--out", tmp_path / "scores.json")
    assert ran.code == 0, ran
    assert told in ran.err
    assert run("plan", "--scores", tmp_path / "scores.json", "--out", plan).code == 0
    files = {"--model": model, "--train": path, "--eval": path}
    for init in ("default", "gradient"):
        out = tmp_path / init
        ran = run("train", *options({**given, **files}, plan=plan, out=out, init=init))
        assert ran.code == 0, ran
        assert ran.err.count(told) == 2


def test_records_that_did_not_fit_are_counted(run, given, plan_file, tmp_path):
    path = tmp_path / "some.jsonl"
    long, short = "repeat " + "a " * 20, "repeat a"
    records = [{"prompt": prompt, "completion": "a b c"} for prompt in (short, long, short)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = options({**given, "--train": path}, plan=plan_file, out=tmp_path / "out", max_length=16)
    ran = run("train", *arguments)
    assert ran.code == 0, ran
    assert f"{path}: 1 records cut to 16 tokens, 1 left out" in ran.err
    assert "2 remain" in ran.err


def test_interrupt_elsewhere_is_one_line(run, scores_file, tmp_path, monkeypatch):
    from aletheia_tune import plan

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "make_plan", stop)
    ran = run("plan", "--scores", scores_file, "--out", tmp_path / "new.json")
    assert ran == Ran(130, "", "aletheia: interrupted; nothing was written\n")


def test_usage_errors_exit_with_2(run, scores_file):
    assert run("plan", "--scores", scores_file).code == 2  # no --out
    assert run("plan", "--scores", scores_file, "--out", "x", "--rank", "many").code == 2
    assert run("fly").code == 2


def test_an_error_of_the_program_keeps_its_traceback(run, scores_file, tmp_path, monkeypatch):
    from aletheia_tune import plan

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(plan, "make_plan", broken)
    monkeypatch.setattr(sys, "argv", ["aletheia", "plan", "--scores", str(scores_file), "--out", "x"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_a_forced_backend_that_cannot_serve_is_one_line(
    refuses, monkeypatch, tmp_path, tiny_model_dir, train_file
):
    monkeypatch.setenv("ALETHEIA_BACKEND", "triton")
    refuses(
        "probe",
        *("--model", tiny_model_dir, "--train", train_file, "--out", tmp_path / "scores.json"),
        says=("ALETHEIA_BACKEND=triton cannot serve", "TRITON_INTERPRET=1"),
    )
