"""The main job in miniature: the same path on a random model, and what it leaves on the disk."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path

import pytest
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file

from aletheia_tune.data import Collator, load_examples, pad_token_id
from aletheia_tune.errors import UserError
from aletheia_tune.evaluation import held_out_loss
from aletheia_tune.loading import load_model
from aletheia_tune.plan import Plan
from aletheia_tune.race import RaceResult
from aletheia_tune.scores import Scores
from aletheia_tune.training_config import TrainConfig

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "metrics.json",
    "plan.json",
    "report.html",
    "scores.json",
}


@pytest.fixture(scope="module")
def task(demo, tiny_model_dir, train_file, eval_file):
    config = TrainConfig(
        steps=6, learning_rate=1e-2, warmup=0, max_length=32, eval_every=3, threads=1, progress=False
    )
    return demo.Task(
        model_dir=tiny_model_dir,
        train_path=train_file,
        eval_path=eval_file,
        other_text="a b c d e f " * 200,
        config=config,
        slice_steps=2,
        title="A miniature",
        question="Does it run?",
    )


@pytest.fixture(scope="module")
def finished(demo, task, tmp_path_factory) -> tuple[Path, str, RaceResult]:
    out = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    screen = io.StringIO()
    result = demo.run(task, out, Console(file=screen, width=200))
    return out, screen.getvalue(), result


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_directory_holds_the_result_and_nothing_else(finished):
    out, _, _ = finished
    assert {path.name for path in out.iterdir()} == FILES
    assert [path.name for path in out.parent.iterdir()] == ["demo"]


def test_three_arms_ran_the_same_steps_and_learned(demo, finished):
    _, _, result = finished
    assert [(arm.name, arm.kernels) for arm in result.arms] == [
        (demo.PEFT_ARM, False),
        (demo.KERNEL_ARM, True),
        (demo.PLAN_ARM, True),
    ]
    peft, kernels, planned = result.arms
    assert peft.plan == kernels.plan
    assert (len(peft.plan.layers), len(planned.plan.layers)) == (4, 2)
    assert {module.rank for arm in result.arms for module in arm.plan.modules.values()} == {16}
    for arm in result.arms:
        assert [record.step for record in arm.training.history] == [1, 2, 3, 4, 5, 6]
        assert arm.training.eval_loss_after < arm.training.eval_loss_before


def test_the_files_read_back_as_what_they_are(finished):
    out, _, result = finished
    scores = Scores.from_json((out / "scores.json").read_text())
    plan = Plan.from_json((out / "plan.json").read_text())
    assert RaceResult.from_json((out / "metrics.json").read_text()) == result
    assert plan == result.arms[-1].plan
    assert plan.meta["layer_scores"] == list(scores.layers)
    page = (out / "report.html").read_text()
    for row in result.cells().rows:
        for cell in row:
            assert cell.replace(">", "&gt;") in page


def test_one_table_is_shown_with_the_probe_and_the_check_beside_it(finished):
    out, screen, result = finished
    assert screen.count("adapted layers") == 1
    for row in result.cells().rows:
        assert any(all(cell in line for cell in row) for line in screen.splitlines())
    scores = Scores.from_json((out / "scores.json").read_text())
    assert f"{scores.meta['seconds']:.1f} s for the scores of all 4 layers" in screen
    assert "is the trained model" in screen


def test_stock_peft_loads_the_adapter_and_gives_the_held_out_loss(demo, task, finished):
    out, _, result = finished
    planned = result.arms[-1]
    loaded = PeftModel.from_pretrained(load_model(task.model_dir, "float32")[0], str(out)).eval()
    lora_Bs = {name: weight for name, weight in loaded.named_parameters() if "lora_B" in name}
    modules = {name.removeprefix("base_model.model.").split(".lora_B")[0] for name in lora_Bs}
    assert modules == set(planned.plan.modules)
    assert all(weight.any() for weight in lora_Bs.values())

    _, tokenizer = load_model(task.model_dir)
    held_out = load_examples(task.eval_path, tokenizer, max_length=task.config.max_length)
    loss = held_out_loss(loaded, held_out, Collator(pad_token_id(tokenizer)), task.config.eval_batch_size)
    assert loss == pytest.approx(planned.training.eval_loss_after, rel=2e-3)  # float32 against bfloat16
    assert abs(loss - planned.training.eval_loss_before) > 10 * abs(loss - planned.training.eval_loss_after)

    check = demo.check_adapter(task, out, planned.training.eval_loss_after)
    assert check.passed
    assert result.meta["check"] == dataclasses.asdict(check)


def test_an_adapter_other_than_the_trained_one_is_noticed(demo, task, finished, tmp_path):
    out, _, result = finished
    shutil.copytree(out, tmp_path / "other")
    weights = load_file(out / "adapter_model.safetensors")
    save_file(
        {name: -weight if "lora_B" in name else weight for name, weight in weights.items()},
        tmp_path / "other" / "adapter_model.safetensors",
    )
    assert not demo.check_adapter(task, tmp_path / "other", result.arms[-1].training.eval_loss_after).passed


def test_a_check_fails_on_logits_too_far_from_the_exact_ones(demo):
    good = demo.Check(trained_loss=2.0, loaded_loss=2.0, stock_error=0.02, trained_error=0.015)
    assert good.passed
    assert not dataclasses.replace(good, stock_error=0.04).passed
    assert not dataclasses.replace(good, trained_error=0.05).passed
    assert not dataclasses.replace(good, loaded_loss=2.01).passed


def test_a_run_that_fails_leaves_the_old_result(demo, task, finished, tmp_path):
    out, _, _ = finished
    mine = tmp_path / "runs" / "demo"
    shutil.copytree(out, mine)
    before = contents(mine)
    with pytest.raises(UserError, match=r"eval\.jsonl"):
        demo.run(dataclasses.replace(task, eval_path=tmp_path / "eval.jsonl"), mine, Console(quiet=True))
    assert contents(mine) == before
    assert [path.name for path in mine.parent.iterdir()] == ["demo"]


def test_a_directory_with_something_else_in_it_is_refused_before_any_work(
    demo, task, tmp_path, monkeypatch, capsys
):
    mine = tmp_path / "demo"
    mine.mkdir()
    (mine / "plan.json").write_text("{}")
    (mine / "thesis.txt").write_text("years of work")
    before = contents(mine)
    with pytest.raises(UserError, match=r"thesis\.txt"):
        demo.run(dataclasses.replace(task, model_dir=tmp_path / "none"), mine, Console(quiet=True))
    assert contents(mine) == before

    monkeypatch.setattr(demo, "RUNS", tmp_path)
    monkeypatch.setenv("PYTHONWARNINGS", "")
    assert demo.main() == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("demo: error: ")
    assert "thesis.txt" in lines[0]
    assert contents(mine) == before
    assert json.loads((mine / "plan.json").read_text()) == {}
