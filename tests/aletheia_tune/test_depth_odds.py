"""Odds of sampled depth: the least noise for a share of the time, and what cannot be had."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aletheia_tune.cost import Batch, Calibration, Coefficients, ModelShape, ModuleShape, predict
from aletheia_tune.depth_odds import LEAST, depth_odds
from aletheia_tune.errors import UserError
from aletheia_tune.plan import ModulePlan, Plan


def prices(layers: int, backward: float = 1e-6, rank: float = 3e-7) -> Calibration:
    modules = {f"layers.{layer}.mlp.up": ModuleShape(layer, 8, 24, "mlp") for layer in range(layers)}
    names = [field.name for field in dataclasses.fields(Coefficients)]
    coefficients = {**dict.fromkeys(names, 1e-6), "backward": backward, "backward_rank": rank}
    shape = ModelShape(modules, layers, "layers", attention_width=8, weight_bytes=1000)
    return Calibration(shape, Batch(2, 16), Coefficients(**coefficients), {})


def plan_of(scores: list[float], adapted: list[int] | None = None) -> Plan:
    layers = range(len(scores)) if adapted is None else adapted
    modules = {f"layers.{layer}.mlp.up": ModulePlan(4, 8.0) for layer in layers}
    return Plan(modules, len(scores), "layers", meta={"layer_scores": scores})


def reached(odds: dict[int, float], layers: range | list[int]) -> list[float]:
    """The probability that a pass comes down to each layer."""
    return [sum(p for end, p in odds.items() if end <= layer) for layer in layers]


def step_seconds(odds: dict[int, float], plan: Plan, calibration: Calibration) -> float:
    """Expected seconds of a step: of the plan without the adapters under the end, plus what those take to act."""
    price, shape = calibration.coefficients, calibration.shape
    total = 0.0
    for end, odd in odds.items():
        kept = {name: module for name, module in plan.modules.items() if int(name.split(".")[1]) >= end}
        full = tuple(name for name in plan.full if int(name.split(".")[1]) >= end)
        seconds = predict(dataclasses.replace(plan, modules=kept, full=full), calibration).seconds
        for name in plan.modules.keys() - kept.keys():
            traffic = shape.traffic(name, calibration.batch)
            seconds += (price.forward_traffic + price.forward_rank * plan.modules[name].rank) * traffic
        total += odd * seconds
    return total


def test_the_root_of_the_score_a_second():
    # Equal prices, scores that rise as squares: layers are reached in proportion to their roots.
    plan, calibration = plan_of([1.0, 4.0, 9.0, 16.0, 1.0]), prices(5)
    found = depth_odds(plan, calibration, 0.75)
    q = reached(found.odds, plan.layers)
    assert max(q[:4]) < 1
    assert q[4] == pytest.approx(1)
    assert [value / q[0] for value in q[:4]] == pytest.approx([1, 2, 3, 4])
    full = predict(plan, calibration).seconds
    assert found.time == pytest.approx(0.75)
    assert step_seconds(found.odds, plan, calibration) == pytest.approx(0.75 * full)
    assert "layer 0" in str(found)
    assert "75.0%" in str(found)


def test_a_lower_layer_of_more_score_shares_with_those_above_it():
    found = depth_odds(plan_of([9.0, 1.0, 1.0, 1.0]), prices(4), 0.8)
    assert list(found.odds) == [0, 3]


def test_layers_without_adapters_are_paid_on_the_way_and_are_no_ends():
    plan = plan_of([1.0, 5.0, 1.0, 5.0, 1.0, 5.0], [1, 3, 4])
    calibration = prices(6)
    found = depth_odds(plan, calibration, 0.8)
    assert found.odds.keys() <= {1, 3, 4}
    full = predict(plan, calibration).seconds
    assert step_seconds(found.odds, plan, calibration) == pytest.approx(0.8 * full)


def test_what_is_trained_in_full_has_its_price():
    plan, calibration = plan_of([1.0, 5.0, 1.0, 5.0], [0, 2, 3]), prices(4)
    plan = dataclasses.replace(plan, full=("layers.1.mlp.up",))
    found = depth_odds(plan, calibration, 0.8)
    seconds = predict(plan, calibration).seconds
    assert found.time == pytest.approx(0.8)
    assert step_seconds(found.odds, plan, calibration) == pytest.approx(0.8 * seconds)


def test_the_whole_time_is_the_whole_pass():
    found = depth_odds(plan_of([1.0, 2.0, 3.0]), prices(3), 1.0)
    assert found.odds == pytest.approx({0: 1.0})
    assert found.time == pytest.approx(1)
    assert found.noise == pytest.approx(1)


def test_it_pays_only_where_scores_fall_steeply_towards_the_bottom():
    assert depth_odds(plan_of([1e-6, 1e-6, 1e-6, 1.0]), prices(4), 0.75).noise < 0.8
    assert depth_odds(plan_of([1.0, 1.0, 1.0, 1.0]), prices(4), 0.75).noise > 1


@given(
    st.lists(st.floats(0, 10), min_size=4, max_size=4).filter(lambda scores: sum(scores) > 1e-3),
    st.floats(0.7, 1),
    st.floats(2e-7, 5e-6),
)
@settings(max_examples=15)
def test_no_odds_of_a_grid_are_better(scores, share, backward):
    plan, calibration = plan_of(scores), prices(4, backward)
    full = predict(plan, calibration).seconds
    try:
        found = depth_odds(plan, calibration, share)
    except UserError as error:
        least = float(re.search(r"at least ([\d.]+)%", str(error))[1]) / 100
        assert share < least
        share = least
        found = depth_odds(plan, calibration, share)
    q = reached(found.odds, plan.layers)
    assert all(value >= LEAST * (1 - 1e-6) for value in q)
    assert found.time <= share * (1 + 1e-9)
    assert step_seconds(found.odds, plan, calibration) == pytest.approx(found.time * full)
    mine = sum(score / value for score, value in zip(scores, q, strict=True))
    assert found.noise == pytest.approx(found.time * mine / sum(scores))
    steps = [LEAST, *(index / 10 for index in range(1, 11))]
    for below in itertools.combinations_with_replacement(steps, 3):
        other = [*below, 1.0]
        ends = [other[0], *(above - low for low, above in itertools.pairwise(other))]
        if step_seconds(dict(enumerate(ends)), plan, calibration) <= share * full:
            assert mine <= sum(s / value for s, value in zip(scores, other, strict=True)) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("scores", "share", "says"),
    [
        ([1.0, 2.0], 0.0, r"0.0% is outside"),
        ([1.0, 2.0], 1.5, r"150.0% is outside"),
        ([1.0, 2.0], math.nan, r"nan% is outside"),
        ([1.0, 2.0], 0.1, r"10.0% of the step time is too little .*: give at least"),
        ([0.0, 0.0], 0.9, r"every adapted layer has a score of 0"),
        ([-1.0, 2.0], 0.9, r"score of layer 0 is -1.0"),
        ([math.inf, 2.0], 0.9, r"score of layer 0 is inf"),
        (["1", 2.0], 0.9, r"score of layer 0 is '1'"),
    ],
)
def test_what_cannot_be_had(scores, share, says):
    with pytest.raises(UserError, match=says):
        depth_odds(plan_of(scores), prices(2), share)


def test_a_plan_without_scores_and_a_module_without_a_price():
    plan = plan_of([1.0, 2.0])
    for meta in ({}, {"layer_scores": [1.0]}, {"layer_scores": "12"}):
        with pytest.raises(UserError, match="the plan holds no scores"):
            depth_odds(dataclasses.replace(plan, meta=meta), prices(2), 0.9)
    with pytest.raises(UserError, match=r"knows no module 'layers\.1\.mlp\.up'"):
        depth_odds(plan, prices(1), 0.9)
