"""Plans within a time budget: never over it, never worse than the best suffix, and as good as trying everything."""

from __future__ import annotations

import dataclasses
import itertools
import math
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aletheia_tune import figures
from aletheia_tune.budget import budget_plan, frontier, score_kept
from aletheia_tune.cost import Batch, Calibration, Coefficients, ModelShape, ModuleShape, predict, uniform_of
from aletheia_tune.errors import UserError
from aletheia_tune.plan import ModulePlan, Plan
from aletheia_tune.scores import ModuleScore, Scores

RANK = 4


def prices(layers: int, *, traffic: float = 2e-6, rank: float = 3e-7, backward: float = 1e-6) -> Calibration:
    modules = {}
    for layer in range(layers):
        modules[f"layers.{layer}.attn.q"] = ModuleShape(layer, 8, 8, "attention")
        modules[f"layers.{layer}.mlp.up"] = ModuleShape(layer, 8, 24, "mlp")
    coefficients = Coefficients(
        forward=1e-6,
        forward_traffic=traffic,
        forward_rank=rank,
        head=1e-4,
        head_backward=1e-4,
        backward=backward,
        backward_traffic=traffic,
        backward_rank=rank,
        update=1e-4,
        update_parameter=1e-7,
        kept_head=1.0,
        kept=1.0,
        kept_rank=1.0,
    )
    return Calibration(ModelShape(modules, layers, "layers", 8, 1000), Batch(2, 16), coefficients, {})


def scores_of(calibration: Calibration, values: list[float]) -> Scores:
    modules = {
        name: ModuleScore(module.layer, value, module.in_features, module.out_features, module.kind)
        for (name, module), value in zip(calibration.shape.modules.items(), values, strict=True)
    }
    layers = [0.0] * calibration.shape.num_layers
    for module in modules.values():
        layers[module.layer] += module.score
    return Scores("any", tuple(layers), modules, "layers", {"model": "tiny"})


def relative(plan: Plan, calibration: Calibration, cached: float = 0.0) -> float:
    uniform = predict(uniform_of(calibration.shape, RANK), calibration).seconds
    return predict(plan, calibration, cached=cached).seconds / uniform


def plan_of(ranks: dict[str, int], layers: int) -> Plan:
    return Plan({name: ModulePlan(rank, 2.0 * rank) for name, rank in ranks.items()}, layers, "layers")


price = st.floats(1e-7, 1e-4)


@given(
    st.lists(st.floats(0, 100), min_size=6, max_size=6),
    st.tuples(price, price, price),
    st.floats(0.1, 1),
    st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=10)
def test_as_good_as_trying_everything(values, priced, budget, cached):
    calibration = prices(3, traffic=priced[0], rank=priced[1], backward=priced[2])
    assume(any(values))
    scores = scores_of(calibration, values)
    options = (0, RANK // 2, RANK, 2 * RANK)
    best = below = None
    for ranks in itertools.product(options, repeat=6):
        chosen = {name: rank for name, rank in zip(calibration.shape.modules, ranks, strict=True) if rank}
        if not any(chosen) or all(scores.modules[name].score == 0 for name in chosen):
            continue
        plan = plan_of(chosen, 3)
        share, kept = relative(plan, calibration, cached), score_kept(plan, scores, RANK)
        # Prices are rounded up, by less than one part in 20,000 of what there is to spend, each.
        if share <= budget and (best is None or kept > best):
            best = kept
        if share <= budget * (1 - 1e-3) and (below is None or kept > below):
            below = kept
    if best is None:
        with pytest.raises(UserError, match="too small for any adapter"):
            budget_plan(scores, calibration, budget, rank=RANK, cached=cached)
        return
    made = budget_plan(scores, calibration, budget, rank=RANK, cached=cached)
    kept = score_kept(made, scores, RANK)
    assert relative(made, calibration, cached) <= budget * (1 + 1e-8)
    assert kept <= best * (1 + 1e-9)
    assert kept >= (below or 0) * (1 - 1e-9)


@given(st.lists(st.floats(0.01, 100), min_size=20, max_size=20), st.floats(0.3, 1), price)
@settings(max_examples=25)
def test_never_worse_than_the_best_suffix(values, budget, backward):
    calibration = prices(10, backward=backward)
    scores = scores_of(calibration, values)
    suffixes = [
        plan_of({n: RANK for n, module in calibration.shape.modules.items() if module.layer >= lowest}, 10)
        for lowest in range(10)
    ]
    affordable = [plan for plan in suffixes if relative(plan, calibration) <= budget]
    assume(affordable)
    made = budget_plan(scores, calibration, budget, rank=RANK)
    assert relative(made, calibration) <= budget * (1 + 1e-8)
    best = max(score_kept(plan, scores, RANK) for plan in affordable)
    assert score_kept(made, scores, RANK) >= best * (1 - 1e-12)


def test_the_whole_budget_with_one_rank_is_uniform():
    calibration = prices(5)
    made = budget_plan(scores_of(calibration, [1.0] * 10), calibration, 1.0, rank=RANK, choices=[RANK])
    assert {name: module.rank for name, module in made.modules.items()} == dict.fromkeys(
        calibration.shape.modules, RANK
    )
    assert made.meta["score_kept"] == pytest.approx(1)


def test_depth_is_taken_only_where_it_pays():
    calibration = prices(4, backward=1e-5)
    even = budget_plan(scores_of(calibration, [1.0] * 8), calibration, 0.6, rank=RANK)
    assert even.layers[0] > 0
    steep = budget_plan(scores_of(calibration, [900.0, 0, *[1.0] * 6]), calibration, 0.98, rank=RANK)
    assert steep.layers[0] == 0
    assert "layers.0.mlp.up" not in steep.modules


def test_half_the_steps_from_a_cache_buy_more():
    calibration = prices(8)
    scores = scores_of(calibration, [float(1 + i % 5) for i in range(16)])
    without, cached = (budget_plan(scores, calibration, 0.6, rank=RANK, cached=share) for share in (0.0, 0.9))
    assert cached.meta["score_kept"] > without.meta["score_kept"]


def test_every_layer_is_explained():
    calibration = prices(4, backward=1e-5)
    made = budget_plan(
        scores_of(calibration, [1.0, 1, 2, 2, 0, 0, 3, 3]), calibration, 0.85, rank=RANK, dropout=0.1
    )
    assert made.layers == (1, 3)
    assert made.dropout == 0.1
    lines = made.explain().splitlines()
    assert "out (under the cut: the backward pass down to it takes" in lines[1]
    assert "(lowest: worth the way down; " in lines[2]
    assert "out (on the way down, but its modules keep less score a second" in lines[3]
    assert "of 2 modules, by score a second)" in lines[4]
    assert Plan.from_json(made.to_json()) == made
    backward = 1000 * calibration.backward_seconds()[0]
    for layer, shown in enumerate(made.meta["layer_prices_ms"]):
        adapters = sum(
            calibration.adapter_seconds(name, made.modules[name].rank if layer in made.layers else RANK)
            for name, module in calibration.shape.modules.items()
            if module.layer == layer and (name in made.modules or layer not in made.layers)
        )
        assert shown == pytest.approx(backward + 1000 * adapters)


def test_a_frontier_rises_from_the_cheapest_plan():
    calibration = prices(6)
    scores = scores_of(calibration, [float(1 + i * i % 7) for i in range(12)])
    points = frontier(scores, calibration, 5, rank=RANK)
    assert len(points) == 5
    assert len(points[0].plan.modules) == 1
    for lower, higher in itertools.pairwise(points):
        assert lower.score <= higher.score
    for point in points:
        assert point.cost == pytest.approx(relative(point.plan, calibration))
        assert point.score == score_kept(point.plan, scores, RANK)
        assert point.cost <= 1 + 1e-8
    svg = figures.frontier([(p.cost, p.score) for p in points], chosen=(0.6, 0.5), label="a frontier")
    root = ElementTree.fromstring(figures.standalone(svg))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "★" in svg
    # Every colour that the drawing uses has a value in the file.
    style = root.find("{http://www.w3.org/2000/svg}style")
    used = {part.partition(")")[0] for part in svg.split("var(")[1:]}
    assert used
    assert all(f"{variable}:#" in style.text for variable in used)


def test_what_cannot_be_planned():
    calibration = prices(3)
    scores = scores_of(calibration, [1.0] * 6)
    for options, said in [
        ({"budget": 0.01}, "too small for any adapter: give at least"),
        ({"budget": 0}, "outside"),
        ({"budget": math.nan}, "outside"),
        ({"budget": 1.5}, "outside"),
        ({"rank": 0}, "rank 0"),
        ({"choices": [0]}, "rank 0"),
        ({"choices": [99]}, "no scored module"),
        ({"cached": 2}, "cached share 2"),
    ]:
        with pytest.raises(UserError, match=said):
            budget_plan(scores, calibration, **options)
    for values, said in [
        ([0.0] * 6, "every score is 0"),
        ([1.0] * 5 + [-1.0], "score -1.0 of 'layers.2.mlp.up'"),
        ([1.0] * 5 + [math.inf], "score inf"),
    ]:
        with pytest.raises(UserError, match=said):
            budget_plan(scores_of(calibration, values), calibration)
    with pytest.raises(UserError, match=r"knows no module 'layers\.3"):
        budget_plan(scores_of(prices(4), [1.0] * 8), calibration)
    with pytest.raises(
        UserError, match="the scores are of 3 layers and the calibration of 4: use files of one model"
    ):
        budget_plan(scores_of(prices(3), [1.0] * 6), prices(4))
    wide = scores_of(calibration, [1.0] * 6)
    wide.modules["layers.0.attn.q"] = dataclasses.replace(wide.modules["layers.0.attn.q"], in_features=16)
    with pytest.raises(
        UserError, match=r"'layers\.0\.attn\.q' is 16 x 8 in the scores and 8 x 8 in the calibration"
    ):
        budget_plan(wide, calibration)
    with pytest.raises(UserError, match="frontier of 1 points"):
        frontier(scores, calibration, 1)


def test_the_least_budget_named_is_enough():
    calibration = prices(6)
    scores = scores_of(calibration, [1.0] * 12)
    with pytest.raises(UserError) as raised:
        budget_plan(scores, calibration, 0.1, rank=RANK)
    least = float(str(raised.value).rpartition("least ")[2].removesuffix("%"))
    assert budget_plan(scores, calibration, least / 100, rank=RANK).modules
