"""The cost model: what it predicts, what it reads back, and how it is calibrated."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from aletheia_tune.cost import (
    Batch,
    Calibration,
    Coefficients,
    ModelShape,
    ModuleShape,
    _fit,
    calibrate,
    calibration_plans,
    interleaved,
    predict,
    timed_plans,
    uniform_of,
)
from aletheia_tune.errors import UserError
from aletheia_tune.plan import ModulePlan, Plan

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
}
LAYERS = 5


def calibration() -> Calibration:
    modules = {}
    for layer in range(LAYERS):
        modules[f"layers.{layer}.attn.q"] = ModuleShape(layer, 8, 8, "attention")
        modules[f"layers.{layer}.mlp.up"] = ModuleShape(layer, 8, 24, "mlp")
    shape = ModelShape(modules, LAYERS, "layers", attention_width=8, weight_bytes=1000)
    names = [field.name for field in dataclasses.fields(Coefficients)]
    prices = Coefficients(**{name: (1.0 + i) * 1e-6 for i, name in enumerate(names)})
    return Calibration(shape, Batch(2, 16), prices, {"machine": "none"})


PRICES = calibration()
NAMES = list(PRICES.shape.modules)


def plan_of(ranks: dict[str, int]) -> Plan:
    return Plan({name: ModulePlan(rank, 1.0) for name, rank in ranks.items()}, LAYERS, "layers")


ranks_of_some = st.dictionaries(st.sampled_from(NAMES), st.integers(1, 32), min_size=1)


@given(ranks_of_some, st.sampled_from(NAMES), st.integers(1, 8))
def test_more_rank_and_more_depth_cost_more(ranks, name, more):
    fewer = predict(plan_of(ranks), PRICES)
    deeper = predict(plan_of({**ranks, name: ranks.get(name, 0) + more}), PRICES)
    assert deeper.seconds > fewer.seconds
    assert deeper.bytes > fewer.bytes
    # What a module costs is its own price and, where it is the lowest, the way down to it.
    lowest = min(PRICES.shape.modules[each].layer for each in ranks)
    way_down = sum(PRICES.backward_seconds()[min(lowest, PRICES.shape.modules[name].layer) : lowest])
    price = PRICES.adapter_seconds(name, ranks.get(name, 0) + more) - PRICES.adapter_seconds(
        name, ranks.get(name, 0)
    )
    assert deeper.seconds - fewer.seconds == pytest.approx(price + way_down, rel=1e-6)


@given(ranks_of_some, st.floats(0, 1))
def test_the_parts_add_up_and_a_cache_saves_the_prefix(ranks, cached):
    plan = plan_of(ranks)
    cost, with_cache = predict(plan, PRICES), predict(plan, PRICES, cached=cached)
    assert cost.seconds == pytest.approx(sum(cost.seconds_by_part.values()))
    assert cost.bytes == pytest.approx(sum(cost.bytes_by_part.values()))
    assert cost.seconds - with_cache.seconds == pytest.approx(cached * cost.seconds_by_part["prefix forward"])
    parameters = plan.trainable_parameters(
        {name: (module.in_features, module.out_features) for name, module in PRICES.shape.modules.items()}
    )
    assert cost.bytes_by_part["adapters"] + cost.bytes_by_part["gradients and moments"] == 16 * parameters


def test_a_prediction_by_hand():
    cost = predict(plan_of({"layers.4.mlp.up": 3}), PRICES, Batch(1, 10, labelled=0.5))
    layer = 2 * 10 * 10 * 8 + 2 * 10 * (8 * 8 + 8 * 24)
    traffic = 10 * 32
    price = PRICES.coefficients
    assert cost.seconds_by_part == pytest.approx(
        {
            "prefix forward": 4 * layer * price.forward,
            "forward": layer * price.forward,
            "head": 5 * (price.head + price.head_backward),
            "backward": layer * price.backward,
            "adapters": traffic * (price.forward_traffic + price.backward_traffic)
            + 3 * traffic * (price.forward_rank + price.backward_rank),
            "update": price.update + price.update_parameter * 3 * 32,
        }
    )
    assert cost.bytes_by_part["activations"] == pytest.approx(
        5 * price.kept_head + (10 * 16 + 10 * 32) * price.kept + 3 * 10 * price.kept_rank
    )


def test_a_module_trained_in_full_ends_the_prefix_and_costs_its_weights_gradient():
    adapters, full = {"layers.4.mlp.up": 3}, "layers.2.attn.q"
    alone = predict(plan_of(adapters), PRICES)
    both = predict(dataclasses.replace(plan_of(adapters), full=(full,)), PRICES)
    price, product = PRICES.coefficients, 2 * 32 * 8 * 8
    parts = {name: both.seconds_by_part[name] - alone.seconds_by_part[name] for name in both.seconds_by_part}
    forward, backward = (sum(seconds()[2:4]) for seconds in (PRICES.forward_seconds, PRICES.backward_seconds))
    assert parts == pytest.approx(
        {
            "prefix forward": -forward,
            "forward": forward,
            "head": 0,
            "backward": backward + price.backward * product,
            "adapters": 0,
            "update": price.update_parameter * 64,
        },
        abs=1e-12,
    )
    held = both.bytes_by_part["adapters"] + both.bytes_by_part["gradients and moments"]
    assert held == 16 * (3 * 32 + 64)
    assert both.bytes == pytest.approx(sum(both.bytes_by_part.values()))
    with pytest.raises(UserError, match=r"knows no module 'layers\.0\.other'"):
        predict(dataclasses.replace(plan_of(adapters), full=("layers.0.other",)), PRICES)


def test_what_cannot_be_predicted():
    plan = plan_of({"layers.4.mlp.up": 3})
    with pytest.raises(UserError, match=r"cached share 1\.5"):
        predict(plan, PRICES, cached=1.5)
    with pytest.raises(UserError, match=r"knows no module 'layers\.0\.other'"):
        predict(plan_of({"layers.0.other": 3}), PRICES)
    for size, length, labelled in ((0, 8, 0.5), (1, 1, 0.5), (1, 8, 0.0), (1, 8, 1.5)):
        with pytest.raises(UserError):
            Batch(size, length, labelled)


# JSON


def test_a_calibration_survives_json():
    again = Calibration.from_json(PRICES.to_json())
    assert again == PRICES
    assert again.to_json() == PRICES.to_json()


def changed(*path: str, to: Any) -> str:
    data = json.loads(PRICES.to_json())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    if to is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a calibration"),
        (changed("format", to="aletheia-plan"), "not a calibration"),
        (changed("version", to=2), "version 2 is not known"),
        (changed("coefficients", "head", to=...), "missing or broken"),
        (changed("coefficients", "more", to=1.0), "missing or broken"),
        (changed("coefficients", "head", to=-1.0), "missing or broken"),
        (changed("coefficients", "head", to=float("nan")), "missing or broken"),
        (changed("coefficients", "head", to="1"), "missing or broken"),
        (changed("shape", "modules", to={}), "no modules"),
        (changed("shape", "num_layers", to=3), "layer that is not there"),
        (changed("shape", "num_layers", to=True), "whole number"),
        (changed("shape", "modules", NAMES[0], "in_features", to=0), "no shape of a module"),
        (changed("shape", "modules", NAMES[0], "kind", to=...), "missing or broken"),
        (changed("batch", "size", to=1.5), "whole number"),
        (changed("meta", to=...), "missing or broken"),
    ],
)
def test_a_foreign_or_broken_calibration_is_refused(text, said):
    with pytest.raises(UserError, match=said) as raised:
        Calibration.from_json(text)
    assert "\n" not in str(raised.value)


# Calibration


@given(
    st.lists(st.floats(1e-3, 10), min_size=3, max_size=3),
    st.lists(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), min_size=6, max_size=6),
)
def test_the_fit_finds_prices_that_explain_everything(prices, rows):
    measured = [sum(p * x for p, x in zip(prices, row, strict=True)) for row in rows]
    fitted = _fit(rows, measured)
    assert all(price >= 0 for price in fitted)
    again = [sum(p * x for p, x in zip(fitted, row, strict=True)) for row in rows]
    assert again == pytest.approx(measured, rel=1e-4)


def test_a_price_that_would_be_negative_is_zero():
    # Falls as the second column rises: unbounded, its price would be -1.
    assert _fit([[1, 0], [1, 1], [1, 2]], [5, 4, 3]) == pytest.approx([3.6, 0], abs=0.2)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


def test_calibrating_leaves_the_model_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    found = calibrate(model, Batch(2, 16), rounds=2)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert found.shape.attention_width == 16
    assert Calibration.from_json(found.to_json()) == found
    assert {entry["measured_s"] > 0 for entry in found.meta["plans"].values()} == {True}
    assert predict(uniform_of(found.shape, 4), found).seconds > 0


def test_the_bytes_of_a_plan_not_calibrated_on(model):
    batch = Batch(2, 16)
    found = calibrate(model, batch, rounds=1)
    names = [name for name, module in found.shape.modules.items() if module.layer >= 1]
    plan = Plan({name: ModulePlan(7, 14.0) for name in names}, 4, "model.layers")
    with timed_plans(model, [plan], batch) as timed:
        kept = timed[0].kept_bytes()
    assert predict(plan, found).bytes_by_part["activations"] == pytest.approx(kept, rel=0.1)


def test_the_bytes_of_a_plan_with_modules_in_full(model):
    batch = Batch(2, 16)
    found = calibrate(model, batch, rounds=1)
    full = "model.layers.1.self_attn.q_proj"
    names = [name for name, module in found.shape.modules.items() if module.layer >= 1 and name != full]
    plan = Plan({name: ModulePlan(7, 14.0) for name in names}, 4, "model.layers", full=(full,))
    with timed_plans(model, [plan], batch) as timed:
        kept = timed[0].kept_bytes()
        assert timed[0].step().seconds > 0
    assert predict(plan, found).bytes_by_part["activations"] == pytest.approx(kept, rel=0.1)


def test_plans_side_by_side_train_their_own_adapters(model):
    shape = ModelShape.of(model)
    plans = list(calibration_plans(shape).values())
    assert len(plans) == 5
    with timed_plans(model, plans, Batch(2, 16)) as timed:
        records = interleaved(timed, rounds=2)
    assert [len(record) for record in records] == [2] * 5
    for record in records:
        for phases in record:
            assert min(dataclasses.astuple(phases)) > 0
            assert phases.seconds == pytest.approx(sum(dataclasses.astuple(phases)))


def test_experts_count_by_what_a_token_passes():
    torch.manual_seed(0)
    shape = ModelShape.of(
        MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))
    )
    name = "model.layers.1.mlp.experts.down_proj"
    assert shape.modules[name] == ModuleShape(1, 24, 16, "mlp", copies=4, uses=2)
    assert shape.rank_parameters(name) == 4 * (24 + 16)
    assert shape.traffic(name, Batch(1, 10)) == 10 * 2 * (24 + 16)
