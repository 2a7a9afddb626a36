from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from aletheia_tune.errors import UserError
from aletheia_tune.plan import ModulePlan, Plan, make_plan, ranks_by_score, uniform_plan
from aletheia_tune.scores import ModuleScore, Scores

SHAPES = {"q_proj": (16, 16), "k_proj": (16, 8), "up_proj": (16, 24), "down_proj": (24, 16)}
KINDS = {"q_proj": "attention", "k_proj": "attention", "up_proj": "mlp", "down_proj": "mlp"}
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def scores(*layers: float, module_scores: dict[str, float] | None = None) -> Scores:
    modules = {}
    for layer, score in enumerate(layers):
        for leaf, (in_features, out_features) in SHAPES.items():
            name = f"model.layers.{layer}.{'self_attn' if KINDS[leaf] == 'attention' else 'mlp'}.{leaf}"
            own = score if module_scores is None else module_scores[leaf]
            modules[name] = ModuleScore(layer, own, in_features, out_features, KINDS[leaf])
    return Scores("aletheia", tuple(layers), modules, "model.layers", {"model": "small"})


def llama(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, num_hidden_layers=layers))


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SMALL, num_hidden_layers=2, num_local_experts=4))


def lora_layers(peft_model) -> dict[str, tuple[int, float]]:
    """Rank and scaling of each LoRA linear, as stock PEFT has them."""
    return {
        name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for name, module in peft_model.named_modules()
        if isinstance(module, LoraLayer)
    }


def planned(plan: Plan) -> dict[str, tuple[int, float]]:
    return {name: (module.rank, module.alpha / module.rank) for name, module in plan.modules.items()}


# make_plan


@pytest.mark.parametrize(
    ("layers", "share", "chosen"),
    [
        ((3.0, 1.0, 2.0, 4.0), 50, (0, 3)),
        ((3.0, 1.0, 2.0, 4.0, 9.0), 50, (3, 4)),
        ((1.0, 1.0, 1.0, 1.0), 50, (0, 1)),
        ((1.0, 2.0, 2.0, 2.0), 50, (1, 2)),
        ((1.0, 2.0), 0.01, (1,)),
        ((1.0, 2.0, 3.0), 100, (0, 1, 2)),
        (tuple(float(i) for i in range(100)), 0.29 * 100, tuple(range(71, 100))),
    ],
)
def test_the_highest_layers_are_chosen_ties_to_the_lower_index(layers, share, chosen):
    plan = make_plan(scores(*layers), layers=share)
    assert plan.layers == chosen
    assert plan.num_layers == len(layers)
    assert len(plan.modules) == 4 * len(chosen)


def test_rslora_scales_by_the_root_of_the_rank_in_stock_peft_too():
    given_scores = scores(1.0, 2.0)
    by_type = {"ranks": "by-type", "attention_rank": 4, "mlp_rank": 9, "rslora": True}
    plan = make_plan(given_scores, layers=100, alpha=6, **by_type)
    model = llama(2)
    stock = lora_layers(get_peft_model(model, plan.to_lora_config(model)))
    assert dict(stock.values()) == {
        4: pytest.approx(6 / 2),
        9: pytest.approx(6 / 3),
    }
    assert Plan.from_json(plan.to_json()) == plan
    # By default what alpha / rank is by default, at rank 16.
    default = make_plan(given_scores, rank=16, rslora=True)
    assert planned(default) == planned(make_plan(given_scores, rank=16))
    assert {scaling for _, scaling in planned(make_plan(given_scores, rank=4, rslora=True)).values()} == {4.0}


def test_ranks_uniform_and_by_type_and_alpha():
    given_scores = scores(1.0, 2.0)
    uniform = make_plan(given_scores, rank=4)
    assert {(m.rank, m.alpha) for m in uniform.modules.values()} == {(4, 8.0)}
    by_type = make_plan(given_scores, ranks="by-type", attention_rank=3, mlp_rank=5)
    assert {name.rpartition(".")[2]: m for name, m in by_type.modules.items()} == {
        "q_proj": ModulePlan(3, 6.0),
        "k_proj": ModulePlan(3, 6.0),
        "up_proj": ModulePlan(5, 10.0),
        "down_proj": ModulePlan(5, 10.0),
    }
    explicit = make_plan(given_scores, ranks="by-type", attention_rank=3, mlp_rank=5, alpha=7)
    assert {m.alpha for m in explicit.modules.values()} == {7}


def test_targets_match_by_name_or_end():
    assert set(make_plan(scores(1.0, 2.0), targets=["q_proj", "mlp.up_proj"]).modules) == {
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    }
    # "proj" ends every name, but not at a dot.
    with pytest.raises(
        UserError, match="target 'proj' matches no module: there are q_proj, k_proj, up_proj, down_proj"
    ):
        make_plan(scores(1.0), targets=["q_proj", "proj"])
    with pytest.raises(UserError, match=r"no module in the chosen layers \[1\]"):
        make_plan(scores(1.0, 2.0), targets=["model.layers.0.mlp.up_proj"])
    with pytest.raises(UserError, match="is one string"):
        make_plan(scores(1.0), targets="q_proj")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": 0}, "outside"),
        ({"layers": -1}, "outside"),
        ({"layers": 100.1}, "outside"),
        ({"layers": math.nan}, "outside"),
        ({"rank": 0}, "rank 0 is not"),
        ({"rank": -4}, "rank -4 is not"),
        ({"rank": 2.5}, "rank 2.5 is not"),
        ({"rank": 25}, "rank 25 of .* above its in . out features, 24"),
        ({"ranks": "by-type", "attention_rank": 0}, "attention rank 0"),
        ({"ranks": "by-type", "mlp_rank": 0}, "mlp rank 0"),
        ({"ranks": "by-size"}, "'by-size' is unknown"),
        ({"budget": 1000}, "budget goes with ranks by-score"),
        ({"ranks": "by-score", "budget": 10}, "at least 136"),
        ({"alpha": 0}, "alpha 0 is not a positive number"),
        ({"alpha": math.inf}, "alpha inf is not a positive number"),
        ({"dropout": 1.0}, "dropout 1.0 is not in"),
    ],
)
def test_what_no_plan_can_be_made_of(options, said):
    with pytest.raises(UserError, match=said) as raised:
        make_plan(scores(1.0, 2.0), **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(bad):
    with pytest.raises(UserError, match="score of layer 1 is"):
        make_plan(scores(1.0, bad))
    with pytest.raises(UserError, match="cannot be shared out"):
        make_plan(scores(1.0, module_scores=dict.fromkeys(SHAPES, bad)), ranks="by-score")


# In full


OWN = {"q_proj": 4.0, "k_proj": 1.0, "up_proj": 3.0, "down_proj": 2.0}


@pytest.mark.parametrize(
    ("share", "in_full"),
    [
        (10, {"0.self_attn.q_proj"}),
        (1, {"0.self_attn.q_proj"}),
        (25, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        (50, {f"{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")}),
    ],
)
def test_the_highest_modules_are_trained_in_full_and_the_others_adapted(share, in_full):
    given_scores = scores(1.0, 2.0, module_scores=OWN)
    plan = make_plan(given_scores, layers=100, full=share, rank=3)
    assert set(plan.full) == {f"model.layers.{name}" for name in in_full}
    assert set(plan.modules) == given_scores.modules.keys() - set(plan.full)
    assert plan.layers == (0, 1)
    assert plan.meta["full_share"] == share
    assert plan.meta["full_scores"] == {name: given_scores.modules[name].score for name in plan.full}
    assert Plan.from_json(plan.to_json()) == plan
    # What is chosen is chosen among the layers and targets that the plan is of.
    of_one = make_plan(given_scores, layers=50, full=share, targets=["k_proj", "down_proj"])
    assert of_one.full == ("model.layers.1.mlp.down_proj",)
    assert set(of_one.modules) == {"model.layers.1.self_attn.k_proj"}


def test_the_layers_of_a_plan_are_those_of_its_full_modules_too():
    plan = Plan({"layers.3.up": ModulePlan(2, 4.0)}, 4, "layers", full=("layers.1.down",))
    assert plan.layers == (1, 3)
    assert plan.trainable_parameters({"layers.3.up": (5, 7), "layers.1.down": (7, 5)}) == 2 * 12 + 35


def test_explain_names_what_is_trained_in_full():
    lines = make_plan(scores(1.0, 2.0, module_scores=OWN), layers=100, full=10, rank=3).explain().splitlines()
    assert lines[1].split() == ["0", "1", "in", "3:", "k_proj", "up_proj", "down_proj", "full:", "q_proj"]
    assert lines[2].split() == ["1", "2", "in", "3:", "q_proj", "k_proj", "up_proj", "down_proj"]
    assert lines[3] == "2 of 2 layers, 7 modules adapted, 1 trained in full"
    assert lines[4:] == ["in full for its score of 4: model.layers.0.self_attn.q_proj"]


def test_expert_parameters_are_never_trained_in_full():
    modules = {
        "layers.0.experts.up": ModuleScore(0, 9.0, 5, 5, "mlp"),
        "layers.0.q": ModuleScore(0, 1.0, 5, 5, "attention"),
        "layers.0.k": ModuleScore(0, 2.0, 5, 5, "attention"),
    }
    meta = {"experts": {"layers.0.experts.up": [0.5] * 4}}
    plan = make_plan(Scores("hybrid", (1.0,), modules, "layers", meta), full=10, rank=2)
    assert plan.full == ("layers.0.k",)
    assert set(plan.modules) == {"layers.0.experts.up", "layers.0.q"}
    alone = {"layers.0.experts.up": modules["layers.0.experts.up"]}
    with pytest.raises(UserError, match="no linear to train in full"):
        make_plan(Scores("hybrid", (1.0,), alone, "layers", meta), full=10, rank=2)
    experts, q = "model.layers.0.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj"
    plan = Plan({q: ModulePlan(2, 4.0)}, 2, "model.layers", full=(experts,))
    with pytest.raises(UserError, match=r"experts\.down_proj' cannot be trained in full"):
        plan.to_lora_config(mixtral())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"full": -1}, "train in full -1 is outside"),
        ({"full": 100}, "train in full 100 is outside"),
        ({"full": math.nan}, "train in full nan is outside"),
        ({"full": 10, "control": "top"}, "not by control 'top'"),
        ({"full": 10, "targets": ["q_proj"], "layers": 1}, "leaves no module for adapters"),
    ],
)
def test_what_cannot_be_trained_in_full(options, said):
    with pytest.raises(UserError, match=said):
        make_plan(scores(1.0, 2.0), **options)
    with pytest.raises(UserError, match="probe again"):
        make_plan(scores(1.0, 2.0, module_scores={**OWN, "up_proj": math.nan}), full=10)


# by-score


def cost(shapes, name) -> int:
    shape = shapes[name]
    return (shape[0] if len(shape) == 3 else 1) * (shape[-2] + shape[-1])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_by_score_stays_within_the_budget_nearly_uses_it_and_is_in_proportion(data):
    count = data.draw(st.integers(1, 12))
    side = st.integers(1, 300)
    shape = st.one_of(st.tuples(side, side), st.tuples(st.integers(1, 8), side, side))
    shapes = {f"m{i}": data.draw(shape) for i in range(count)}
    given_scores = {name: data.draw(st.floats(0, 1e6, allow_subnormal=False)) for name in shapes}
    given_scores["m0"] += 1.0
    least = sum(cost(shapes, name) for name in shapes)
    most = sum(cost(shapes, name) * min(shapes[name][-2:]) for name in shapes)
    budget = data.draw(st.integers(least, 2 * most))

    ranks = ranks_by_score(given_scores, shapes, budget)

    assert all(isinstance(rank, int) and 1 <= rank <= min(shapes[name][-2:]) for name, rank in ranks.items())
    used = sum(rank * cost(shapes, name) for name, rank in ranks.items())
    assert used <= budget
    scored = [name for name, score in given_scores.items() if score > 1e-12 * max(given_scores.values())]
    free = [name for name in scored if ranks[name] < min(shapes[name][-2:])]
    assert not free or budget - used < max(cost(shapes, name) for name in shapes)
    # In proportion: there is a λ such that every rank is within 1 of λ s, but for those that a bound holds.
    low = max(((ranks[name] - 1) / given_scores[name] for name in scored if ranks[name] > 1), default=0.0)
    high = min(((ranks[name] + 1) / given_scores[name] for name in free), default=math.inf)
    assert low <= high * (1 + 1e-6)
    assert all(ranks[name] == 1 for name in ranks if name not in scored)


def test_by_score_exactly():
    # One rank costs 10 on each, so 60 is six ranks: 1 : 2 : 3.
    shapes = dict.fromkeys("abc", (5, 5))
    assert ranks_by_score({"a": 1.0, "b": 2.0, "c": 3.0}, shapes, 60) == {"a": 1, "b": 2, "c": 3}
    # Ten ranks: 1.67, 3.33, 5 leave one over for the largest remainder.
    assert ranks_by_score({"a": 1.0, "b": 2.0, "c": 3.0}, shapes, 100) == {"a": 2, "b": 3, "c": 5}
    # c is bound by its size and b takes what it leaves.
    assert ranks_by_score({"a": 0.0, "b": 2.0, "c": 300.0}, shapes, 80) == {"a": 1, "b": 2, "c": 5}
    # An expert parameter costs a rank for every expert.
    assert ranks_by_score({"a": 1.0, "e": 1.0}, {"a": (5, 5), "e": (4, 5, 5)}, 100) == {"a": 2, "e": 2}


def test_by_score_in_a_plan():
    own = {"q_proj": 1.0, "k_proj": 1.0, "up_proj": 3.0, "down_proj": 3.0}
    given_scores = scores(1.0, 2.0, module_scores=own)
    plan = make_plan(given_scores, ranks="by-score", budget=544)
    assert plan.trainable_parameters({name: SHAPES[name.rpartition(".")[2]] for name in plan.modules}) <= 544
    rank = {name.rpartition(".")[2]: m.rank for name, m in plan.modules.items()}
    assert rank == {"q_proj": 2, "k_proj": 2, "up_proj": 5, "down_proj": 5}
    assert all(m.alpha == 2 * m.rank for m in plan.modules.values())
    # By default the budget is what the uniform rank would cost.
    default = make_plan(given_scores, ranks="by-score", rank=4)
    assert default == make_plan(given_scores, ranks="by-score", rank=4, budget=None)
    assert (
        544 - 40
        < default.trainable_parameters({n: SHAPES[n.rpartition(".")[2]] for n in default.modules})
        <= 544
    )
    with pytest.raises(UserError, match="every score is 0"):
        make_plan(scores(1.0, module_scores=dict.fromkeys(SHAPES, 0.0)), ranks="by-score")


def test_by_score_counts_experts():
    modules = {"layers.0.experts.up": ModuleScore(0, 1.0, 5, 5, "mlp")}
    given_scores = Scores(
        "aletheia", (1.0,), modules, "layers", {"experts": {"layers.0.experts.up": [0.5] * 4}}
    )
    plan = make_plan(given_scores, ranks="by-score", budget=130)
    assert plan.modules["layers.0.experts.up"].rank == 3
    with pytest.raises(UserError, match="at least 40"):
        make_plan(given_scores, ranks="by-score", budget=39)


# JSON


def test_a_plan_survives_json():
    plan = make_plan(scores(1.0, 2.0, 3.0), ranks="by-type", mlp_rank=9, alpha=24.5, layers=67, dropout=0.1)
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()


def changed(**changes) -> str:
    data = json.loads(make_plan(scores(1.0, 2.0)).to_json())
    data.update(changes)
    return json.dumps({key: value for key, value in data.items() if value is not ...})


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not a plan"),
        ("{}", "not a plan"),
        (changed(format="aletheia-scores"), "not a plan"),
        (changed(version=2), "version 2 is unknown"),
        (changed(version=...), "version None is unknown"),
        (changed(num_layers=0), "'num_layers' is not"),
        (changed(num_layers=True), "'num_layers' is not"),
        (changed(layer_path=None), "'layer_path' is not a string"),
        (changed(modules=[]), "'modules' is not an object"),
        (changed(meta=...), "'meta' is not an object"),
        (changed(modules={}), "adapts no module"),
        (changed(modules={NAME: 16}), "up_proj' is not an object of rank and alpha"),
        (changed(modules={NAME: {"rank": 16}}), "up_proj' is not an object of rank and alpha"),
        (changed(modules={NAME: {"rank": 0, "alpha": 1}}), "up_proj': rank 0"),
        (changed(modules={NAME: {"rank": -1, "alpha": 1}}), "up_proj': rank -1"),
        (changed(modules={NAME: {"rank": 1.5, "alpha": 1}}), "up_proj': rank 1.5"),
        (changed(modules={NAME: {"rank": True, "alpha": 1}}), "up_proj': rank True"),
        (changed(modules={NAME: {"rank": "16", "alpha": 1}}), "up_proj': rank '16'"),
        (changed(modules={NAME: {"rank": 16, "alpha": 0}}), "up_proj': alpha 0"),
        (changed(modules={NAME: {"rank": 16, "alpha": math.nan}}), "up_proj': alpha nan"),
        (changed(modules={NAME: {"rank": 16, "alpha": "x"}}), "up_proj': alpha 'x'"),
        (changed(modules={"model.layers.2.up_proj": {"rank": 1, "alpha": 1}}), "in none of the 2 layers"),
        (changed(modules={"model.layersX1.up_proj": {"rank": 1, "alpha": 1}}), "in none of the 2 layers"),
        (changed(full="q"), "'full' is not a list of module names"),
        (changed(full=[1]), "'full' is not a list of module names"),
        (changed(full=[NAME]), "up_proj' is named twice"),
        (changed(full=["model.layers.0.q", "model.layers.0.q"]), "q' is named twice"),
        (changed(full=["model.layers.2.q"]), "in none of the 2 layers"),
        (changed(dropout=-0.1), "dropout -0.1"),
        (changed(dropout="0"), "dropout '0'"),
    ],
)
def test_a_foreign_or_broken_plan_is_refused(text, said):
    with pytest.raises(UserError, match=said) as raised:
        Plan.from_json(text)
    assert "\n" not in str(raised.value)


def test_explain_shows_every_layer():
    lines = make_plan(scores(1.5, 2.5), ranks="by-type", attention_rank=3, mlp_rank=5).explain().splitlines()
    assert lines[1].split() == ["0", "1.5", "out"]
    assert lines[2].split() == ["1", "2.5", "in", "3:", "q_proj", "k_proj", "5:", "up_proj", "down_proj"]
    assert lines[-1] == "1 of 2 layers, 4 modules adapted"


def test_explain_of_a_budgeted_plan_shows_prices_and_reasons():
    meta = {
        "layer_scores": [1.5, 2.5],
        "layer_prices_ms": [12.25, 20.5],
        "layer_reasons": ["under the cut", "lowest"],
        "time_budget": 0.6,
        "predicted_time": 0.591,
        "score_kept": 0.625,
    }
    lines = (
        Plan({"layers.1.up": ModulePlan(3, 6.0)}, num_layers=2, layer_path="layers", meta=meta)
        .explain()
        .splitlines()
    )
    assert lines[0].split() == ["layer", "score", "price", "ms", "ranks"]
    assert lines[1].split() == ["0", "1.5", "12.25", "out", "(under", "the", "cut)"]
    assert lines[2].split() == ["1", "2.5", "20.5", "in", "3:", "up", "(lowest)"]
    assert lines[-1] == "predicted step 59.1% of uniform's (budget 60.0%), score kept 62.5%"


# PEFT


def test_peft_gives_the_planned_ranks_where_suffixes_and_prefixes_mislead():
    # 12 layers: layers.1 is a beginning of layers.10 and layers.11, and 1.… an end of 11.….
    model = llama(12)
    modules = {
        f"model.layers.{layer}.{leaf}": ModulePlan(rank, alpha)
        for layer, leaf, rank, alpha in [
            (1, "self_attn.q_proj", 2, 4.0),
            (1, "mlp.up_proj", 7, 3.5),
            (11, "self_attn.q_proj", 3, 6.0),
            (10, "self_attn.v_proj", 5, 10.0),
            (0, "self_attn.k_proj", 2, 4.0),
        ]
    }
    plan = Plan(modules, 12, "model.layers")
    before = torch.get_rng_state()
    config = plan.to_lora_config(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(isinstance(module, LoraLayer) for module in model.modules())
    assert (config.r, config.lora_alpha) == (2, 4)
    assert set(config.rank_pattern) == {
        rf"^{name}".replace(".", r"\.") for name, m in modules.items() if m.rank != 2
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        peft_model = get_peft_model(model, config)
    assert lora_layers(peft_model) == planned(plan)
    plan.check(peft_model)
    assert plan.trainable_parameters(peft_model) == peft_model.get_nb_trainable_parameters()[0]


@given(st.sets(st.integers(0, 11), min_size=1), st.data())
@settings(max_examples=15, deadline=None)
def test_any_choice_of_layers_and_ranks_is_what_peft_gives(chosen, data):
    names = [f"model.layers.{i}.{leaf}" for i in chosen for leaf in ("self_attn.q_proj", "mlp.down_proj")]
    modules = {n: ModulePlan(data.draw(st.integers(1, 24)), data.draw(st.integers(1, 99)) / 2) for n in names}
    plan = Plan(modules, 12, "model.layers")
    model = llama(12)
    assert lora_layers(get_peft_model(model, plan.to_lora_config(model))) == planned(plan)


def test_a_plan_for_a_model_of_another_depth_is_refused():
    plan = make_plan(scores(1.0, 3.0, 2.0), layers=67)
    with pytest.raises(
        UserError, match="the plan is for 3 layers and the model has 4: make it with this model"
    ):
        plan.to_lora_config(llama(4))


def test_the_config_survives_saving(tmp_path):
    model = llama(3)
    plan = make_plan(scores(1.0, 3.0, 2.0), layers=67, ranks="by-type", attention_rank=2, mlp_rank=3, alpha=5)
    peft_model = get_peft_model(model, plan.to_lora_config(model))
    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(3), tmp_path)
    assert lora_layers(again) == planned(plan)
    plan.check(again)
    saved = LoraConfig.from_pretrained(tmp_path)
    assert saved.rank_pattern == plan.to_lora_config(llama(3)).rank_pattern
    assert saved.task_type == "CAUSAL_LM"


def in_full(peft_model) -> set[str]:
    """What stock PEFT trains in full."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".modules_to_save.default.weight")
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad and "lora_" not in name
    }


def test_peft_trains_the_planned_modules_in_full_where_suffixes_mislead(tmp_path):
    # layers.1 ends as layers.11 does, and other layers have modules of the same names.
    model = llama(12)
    full = ("model.layers.1.self_attn.q_proj", "model.layers.10.mlp.down_proj")
    everywhere = uniform_plan(model, rank=2, alpha=4)
    plan = Plan(
        {name: module for name, module in everywhere.modules.items() if name not in full},
        12,
        "model.layers",
        full=full,
    )
    config = plan.to_lora_config(model)
    assert config.modules_to_save == list(full)
    peft_model = get_peft_model(model, config)
    assert in_full(peft_model) == set(full)
    assert lora_layers(peft_model) == planned(plan)
    plan.check(peft_model)
    assert plan.trainable_parameters(peft_model) == peft_model.get_nb_trainable_parameters()[0]
    assert uniform_plan(peft_model, rank=2, alpha=4) == everywhere
    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(llama(12), tmp_path, is_trainable=True)
    plan.check(again)
    assert in_full(again) == set(full)
    adapted = Plan(everywhere.modules, 12, "model.layers")
    with pytest.raises(UserError, match="would not adapt"):
        adapted.check(peft_model)
    one_less = Plan(plan.modules, 12, "model.layers", full=full[:1])
    with pytest.raises(UserError, match=r"would train 'model\.layers\.10\.mlp\.down_proj' in full too"):
        one_less.check(peft_model)


def test_biases_are_trained_in_full_and_counted():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    plan = Plan(
        {"transformer.h.0.mlp.c_fc": ModulePlan(2, 4.0)},
        2,
        "transformer.h",
        full=("transformer.h.1.attn.c_attn",),
    )
    peft_model = get_peft_model(model, plan.to_lora_config(model))
    plan.check(peft_model)
    assert plan.trainable_parameters(model) == peft_model.get_nb_trainable_parameters()[0]
    assert plan.trainable_parameters(model) == 2 * (16 + 64) + 16 * 48 + 48


def test_a_module_that_peft_would_train_in_full_beside_the_planned_one_is_an_error():
    # PEFT asks whether a name ends like the module's, without regard to dots.
    model = TwoTowers("model", "other_model")
    plan = Plan(
        {"model.layers.0.self_attn.q_proj": ModulePlan(2, 4.0)},
        2,
        "model.layers",
        full=("model.layers.1.self_attn.q_proj",),
    )
    with pytest.raises(
        UserError,
        match=r"would train 'other_model\.layers\.1\.self_attn\.q_proj' in full too, whose name ends",
    ):
        plan.to_lora_config(model)


def test_a_model_that_is_adapted_already():
    model = llama(2)
    first = uniform_plan(model, rank=2)
    peft_model = get_peft_model(model, first.to_lora_config(model))
    second = make_plan(scores(1.0, 2.0), rank=3)
    peft_model.add_adapter("second", second.to_lora_config(peft_model))
    second.check(peft_model, "second")
    first.check(peft_model)
    assert uniform_plan(peft_model, rank=2) == first


class Tower(nn.Module):
    def __init__(self, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Module() for _ in range(layers))
        for layer in self.layers:
            layer.self_attn = nn.Module()
            layer.self_attn.q_proj = nn.Linear(8, 8)


class TwoTowers(nn.Module):
    """Two parts with layers of the same names, as in a vision-language or an encoder-decoder model."""

    def __init__(self, first: str, second: str):
        super().__init__()
        self.add_module(first, Tower(2))
        self.add_module(second, Tower(3))


@pytest.mark.parametrize(
    ("first", "second"), [("vision", "language"), ("encoder", "decoder"), ("model", "other_model")]
)
def test_of_two_towers_only_the_planned_one_is_adapted(first, second):
    model = TwoTowers(first, second)
    plan = Plan(
        {f"{first}.layers.{i}.self_attn.q_proj": ModulePlan(i + 1, 2.0) for i in range(2)},
        2,
        f"{first}.layers",
    )
    assert lora_layers(get_peft_model(model, plan.to_lora_config(model))) == planned(plan)


def test_a_key_that_peft_would_match_to_another_module_is_an_error():
    class Outer(Tower):  # "layers.0.self_attn.q_proj" also ends the vision tower's names
        def __init__(self):
            super().__init__(2)
            self.vision = Tower(2)

    plan = Plan({"layers.0.self_attn.q_proj": ModulePlan(2, 4.0)}, 2, "layers")
    with pytest.raises(
        UserError,
        match=r"'vision\.layers\.0\.self_attn\.q_proj', through .*'layers\.0\.self_attn\.q_proj'",
    ):
        plan.to_lora_config(Outer())


def test_check_compares_ranks_and_modules():
    model = llama(2)
    plan = uniform_plan(model, rank=2, alpha=4, targets=["q_proj"])
    peft_model = get_peft_model(model, plan.to_lora_config(model))
    name = "model.layers.1.self_attn.q_proj"
    for changed_module in (ModulePlan(3, 6.0), ModulePlan(2, 5.0)):
        other = Plan({**plan.modules, name: changed_module}, 2, "model.layers")
        with pytest.raises(UserError, match=r"would give 'model\.layers\.1\.self_attn\.q_proj' rank 2"):
            other.check(peft_model)
    fewer = Plan({n: m for n, m in plan.modules.items() if n != name}, 2, "model.layers")
    with pytest.raises(UserError, match=r"would adapt 'model\.layers\.1"):
        fewer.check(peft_model)
    more = Plan({**plan.modules, "model.layers.1.mlp.up_proj": ModulePlan(2, 4.0)}, 2, "model.layers")
    with pytest.raises(UserError, match=r"would not adapt 'model\.layers\.1\.mlp\.up_proj'"):
        more.check(peft_model)


def test_every_pattern_key_matches_one_name_by_pefts_own_matching():
    model = llama(12)
    plan = uniform_plan(model, rank=2)
    odd = {name: ModulePlan(3 + i % 2, 2.0 + i % 3) for i, name in enumerate(plan.modules)}
    config = Plan(odd, 12, "model.layers").to_lora_config(model)
    names = [name for name, _ in model.named_modules()]
    for pattern in (config.rank_pattern, config.alpha_pattern):
        assert len(pattern) > 12
        for key in pattern:
            (matched,) = [name for name in names if get_pattern_key([key], name) == key]
            assert key == "^" + matched.replace(".", r"\.")


@pytest.mark.parametrize(
    ("name", "rank", "said"),
    [
        ("model.layers.0.self_attn.qkv", 1, "is not in this model"),
        ("model.layers.0.mlp", 1, "is no linear layer"),
        ("model.layers.0.input_layernorm.weight", 1, "is no linear layer"),
        ("model.layers.0.self_attn.k_proj", 25, "rank 25 .* above its in . out features, 24"),
    ],
)
def test_modules_that_the_model_cannot_adapt(name, rank, said):
    plan = Plan({name: ModulePlan(rank, 1.0)}, 2, "model.layers")
    with pytest.raises(UserError, match=said):
        plan.to_lora_config(llama(2))


def test_gpt2_conv1d():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    plan = uniform_plan(model, rank=3, alpha=6)
    assert set(plan.modules) == {
        f"transformer.h.{i}.{leaf}"
        for i in range(2)
        for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft_model = get_peft_model(model, plan.to_lora_config(model))
    assert lora_layers(peft_model) == planned(plan)
    assert plan.trainable_parameters(model) == peft_model.get_nb_trainable_parameters()[0]


# Experts


def test_expert_parameters_get_their_ranks(tmp_path):
    model = mixtral()
    ranks = {
        "model.layers.0.self_attn.q_proj": 2,
        "model.layers.0.mlp.experts.gate_up_proj": 5,
        "model.layers.1.mlp.experts.down_proj": 3,
        "model.layers.1.mlp.experts.gate_up_proj": 3,
    }
    plan = Plan({name: ModulePlan(rank, 2.0 * rank) for name, rank in ranks.items()}, 2, "model.layers")
    config = plan.to_lora_config(model)
    assert set(config.target_parameters) == {name for name in ranks if "experts" in name}
    peft_model = get_peft_model(model, config)
    plan.check(peft_model)
    # gate_up_proj [4 experts, 48 out, 16 in] with rank 5: A [4·5, 16], B [48, 4·5].
    entries = {
        tuple(parameter.shape)
        for name, parameter in peft_model.named_parameters()
        if ".layers.0.mlp" in name and "lora" in name
    }
    assert entries == {(20, 16), (48, 20)}
    assert plan.trainable_parameters(peft_model) == peft_model.get_nb_trainable_parameters()[0]
    peft_model.save_pretrained(tmp_path)
    plan.check(PeftModel.from_pretrained(mixtral(), tmp_path))


def test_expert_parameters_have_no_dropout():
    model = mixtral()
    with pytest.raises(UserError, match="cannot have dropout"):
        uniform_plan(model, rank=2, dropout=0.1).to_lora_config(model)
    assert (
        uniform_plan(model, rank=2, targets=["q_proj"], dropout=0.1).to_lora_config(model).lora_dropout == 0.1
    )


def test_a_plan_that_peft_would_rewrite_is_an_error():
    # PEFT reads targets named like the experts' projections in older versions of this architecture, as those
    # of its dense layers are, as the stacked experts of every layer.
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **SMALL, num_hidden_layers=2, num_experts=4, moe_intermediate_size=8, mlp_only_layers=[0]
    )
    model = Qwen3MoeForCausalLM(config)
    plan = uniform_plan(model, rank=2, targets=["model.layers.0.mlp.down_proj"])
    with pytest.raises(
        UserError, match=r"PEFT would adapt .*experts\.down_proj', through .*\.0\.mlp\.down_proj'"
    ):
        plan.to_lora_config(model)
    partly = uniform_plan(model, rank=2, targets=["model.layers.0.mlp.up_proj"])
    with pytest.raises(UserError, match="PEFT refuses the plan: Cannot convert"):
        partly.to_lora_config(model)
    q = uniform_plan(model, rank=2, targets=["q_proj"])
    assert lora_layers(get_peft_model(model, q.to_lora_config(model))) == planned(q)


def test_uniform_plan_is_every_linear_and_expert_parameter():
    plan = uniform_plan(mixtral(), rank=2, alpha=3)
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    experts = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    assert set(plan.modules) == {f"model.layers.{i}.{leaf}" for i in range(2) for leaf in (*leaves, *experts)}
    assert plan.layers == (0, 1)
    assert set(plan.modules.values()) == {ModulePlan(2, 3)}
    for options, said in [
        ({"rank": 0}, "rank 0"),
        ({"rank": 99}, "above its in"),
        ({"alpha": -1}, "alpha -1"),
        ({"targets": ["nope"]}, "there are q_proj, k_proj, v_proj, o_proj, gate_up_proj, down_proj"),
    ]:
        with pytest.raises(UserError, match=said):
            uniform_plan(mixtral(), **options)
    with pytest.raises(UserError):
        uniform_plan(nn.Linear(2, 2))
