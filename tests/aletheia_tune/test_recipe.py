"""How an arm comes by its plan: by a score, by a control of the same size, or everywhere."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aletheia_tune import race as race_module
from aletheia_tune.cost import Batch, Calibration, Coefficients, ModelShape
from aletheia_tune.data import batches, load_examples, pad_token_id
from aletheia_tune.depth_odds import depth_odds
from aletheia_tune.errors import UserError
from aletheia_tune.loading import load_model
from aletheia_tune.plan import make_plan, uniform_plan
from aletheia_tune.probe import probe
from aletheia_tune.race import Arm
from aletheia_tune.recipe import Recipe
from aletheia_tune.scores.controls import CONTROLS
from aletheia_tune.training_config import TrainConfig


@given(layers=st.integers(1, 100), data=st.data(), seed=st.integers(0, 2**32))
def test_every_control_is_as_many_different_layers_as_asked(layers, data, seed):
    count = data.draw(st.integers(1, layers))
    for choose in CONTROLS.values():
        chosen = choose(layers, count, seed)
        assert len(set(chosen)) == count
        assert list(chosen) == sorted(chosen)
        assert chosen[0] >= 0
        assert chosen[-1] < layers
    chosen = CONTROLS["spaced"](layers, count, 0)
    gaps = {b - a for a, b in itertools.pairwise(chosen)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
    assert chosen[-1] == layers - 1


def test_controls_by_name():
    assert CONTROLS["top"](6, 2, 0) == (4, 5)
    assert CONTROLS["bottom"](6, 2, 0) == (0, 1)
    assert CONTROLS["spaced"](6, 3, 0) == (1, 3, 5)
    draws = {CONTROLS["random"](30, 15, seed) for seed in range(20)}
    assert len(draws) == 20
    assert CONTROLS["random"](30, 15, 7) == CONTROLS["random"](30, 15, 7)


@pytest.fixture
def given_task(tiny_model_dir: Path, train_file: Path):
    model, tokenizer = load_model(tiny_model_dir, "float32")
    return model, tokenizer, load_examples(train_file, tokenizer)


def test_plans_of_recipes(given_task):
    model, tokenizer, examples = given_task
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    assert Recipe(rank=3).plan(model, tokenizer, examples, 0) == uniform_plan(model, rank=3, alpha=6.0)
    for score, layers in (("top", (2, 3)), ("bottom", (0, 1)), ("spaced", (1, 3))):
        plan = Recipe(score=score, layers=50, rank=3).plan(model, tokenizer, examples, 0)
        assert plan.layers == layers
        everywhere = uniform_plan(model, rank=3, alpha=6.0).modules
        assert plan.modules == {
            name: module
            for name, module in everywhere.items()
            if any(name.startswith(f"model.layers.{layer}.") for layer in layers)
        }
    draws = {
        Recipe(score="random", layers=50).plan(model, tokenizer, examples, seed).layers for seed in range(20)
    }
    assert len(draws) > 1
    scored = Recipe(score="aletheia", layers=50, rank=3, probe_batches=2).plan(model, tokenizer, examples, 5)
    scores = probe(model, batches(examples, 4, pad_token_id(tokenizer), seed=5, count=2), seed=5)
    assert scored.modules == make_plan(scores, layers=50, rank=3).modules
    types = {"ranks": "by-type", "attention_rank": 2, "mlp_rank": 5}
    by_type = Recipe(score="aletheia", probe_batches=2, **types).plan(model, tokenizer, examples, 5)
    assert by_type.modules == make_plan(scores, layers=100, **types).modules
    assert {module.rank for module in by_type.modules.values()} == {2, 5}
    recipe = Recipe(score="hybrid", full=10, rank=3, probe_batches=2)
    hybrid = recipe.plan(model, tokenizer, examples, 5)
    scores = probe(
        model, batches(examples, 4, pad_token_id(tokenizer), seed=5, count=2), method="hybrid", seed=5
    )
    expected = make_plan(scores, layers=100, full=10, rank=3)
    assert (hybrid.modules, hybrid.full) == (expected.modules, expected.full)
    assert len(hybrid.full) == 2
    assert len(hybrid.modules) == 28 - 2
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"score": "best"}, "score 'best' is unknown"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": 50}, "score 'uniform' takes every layer"),
        ({"layers": 101}, "layers is 101"),
        ({"score": "hybrid", "full": 100}, "full is 100"),
        ({"score": "hybrid", "full": -1}, "full is -1"),
        ({"full": 10}, "score 'uniform' has no probe to choose modules by"),
        ({"score": "top", "layers": 50, "full": 10}, "score 'top' has no probe"),
        ({"mlp_rank": 0}, "mlp_rank is 0"),
        ({"mlp_rank": 8}, "mlp_rank goes with ranks by-type, not uniform"),
        ({"probe_batches": 0}, "probe_batches is 0"),
        ({"probe_batch_size": 0}, "probe_batch_size is 0"),
        ({"sampled_depth": 80, "score": "fisher"}, "go together"),
        ({"calibration": "cost.json"}, "go together"),
        ({"sampled_depth": 101, "score": "fisher", "calibration": "cost.json"}, "sampled_depth is 101"),
        ({"sampled_depth": 80, "calibration": "cost.json"}, "needs a score of the probe, not 'uniform'"),
    ],
)
def test_what_cannot_be_meant_is_refused(change, says):
    with pytest.raises(UserError, match=says):
        Recipe(**change)


@pytest.fixture
def calibration_file(given_task, tmp_path: Path) -> Path:
    """Prices at which the backward pass is most of a step, said to have taken 7 seconds."""
    model, _, _ = given_task
    prices = dict.fromkeys((field.name for field in dataclasses.fields(Coefficients)), 1e-9)
    calibration = Calibration(
        ModelShape.of(model), Batch(2, 16), Coefficients(**{**prices, "backward": 1e-8}), {"seconds": 7.0}
    )
    path = tmp_path / "cost.json"
    path.write_text(calibration.to_json())
    return path


class Silent:
    """The end of a pipe at which nobody is."""

    def send(self, message: Any) -> None:
        pass

    def recv(self) -> str:
        return "go"


def test_an_arm_of_sampled_depth_trains_with_the_odds_of_its_own_scores(
    given_task, calibration_file, tiny_model_dir, train_file, eval_file, tmp_path, monkeypatch
):
    model, tokenizer, examples = given_task
    recipe = Recipe("fisher", rank=3, probe_batches=2, sampled_depth=70, calibration=str(calibration_file))
    plan = recipe.plan(model, tokenizer, examples, 0)
    expected = depth_odds(plan, Calibration.from_json(calibration_file.read_text()), 0.7).odds
    assert len(expected) > 1
    monkeypatch.setattr(race_module, "tune_allocator", lambda: False)
    config = TrainConfig(steps=4, batch_size=4, dtype="float32", progress=False, threads=1)
    task = race_module._Task(
        Arm("sampled", recipe, True),
        *map(str, (tiny_model_dir, train_file, eval_file)),
        config,
        fields=None,
        classes=None,
        extra_text=None,
        slice_steps=2,
        out=str(tmp_path / "out"),
    )
    done = race_module._compete(task, Silent())
    odds = done["training"]["config"]["sampled_depth"]
    assert {int(layer): share for layer, share in odds.items()} == pytest.approx(expected)
    assert done["plan_seconds"] > 7
    assert len(done["training"]["history"]) == 4


def test_calibrations_that_are_none(given_task, tmp_path):
    model, tokenizer, examples = given_task
    path = tmp_path / "cost.json"
    recipe = Recipe("activation", probe_batches=1, sampled_depth=70, calibration=str(path))
    plan = recipe.plan(model, tokenizer, examples, 0)
    with pytest.raises(UserError, match="cannot read the calibration file"):
        recipe.odds(plan)
    path.write_text("{}")
    with pytest.raises(UserError, match="not a calibration"):
        recipe.odds(plan)
