"""The probe's further scores against what float64 autograd and plain formulas make of the same model and batches."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from aletheia_tune.errors import UserError
from aletheia_tune.plan import make_plan, share_of_layers
from aletheia_tune.probe import METHODS, probe, probe_all
from aletheia_tune.scores import ModuleScore, Scores
from aletheia_tune.scores.controls import CONTROLS, control_layers
from aletheia_tune.scores.energy import Energy
from aletheia_tune.scores.gradient import ranks, spearman
from aletheia_tune.scores.saliency import Saliency
from tests.probe_case import (
    bert,
    build,
    gpt2,
    gpt_neox,
    hidden_uses,
    layer_prefix,
    llama,
    mixtral,
    shared_module,
    some_batches,
)

MODELS = [llama, gpt2, mixtral, shared_module, hidden_uses]
NORM_SUMS = {"aletheia": lambda g: g.norm().item(), "fisher": lambda g: g.square().sum().item()}


def gradients(model: nn.Module, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """By batch, the gradient of every parameter of the layers."""
    model.train().requires_grad_(True)
    model.config._experts_implementation = "eager"  # the grouped product has no float64
    found = []
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        found.append(
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
                for name, p in model.named_parameters()
                if name.startswith(layer_prefix(model))
            }
        )
    model.zero_grad()
    return found


def layer_of(name: str, model: nn.Module) -> int:
    return int(name.removeprefix(layer_prefix(model)).split(".")[0])


def weights_of(scores: Scores, model: nn.Module) -> dict[str, str]:
    """By module, the name of its weight; of a weight that several share, under the first."""
    first = {id(p): name for name, p in model.named_parameters()}
    every = dict(model.named_parameters(remove_duplicate=False))
    return {name: first[id(every.get(name, every.get(f"{name}.weight")))] for name in scores.modules}


def summed(values: dict[str, float], model: nn.Module, num_layers: int) -> list[float]:
    return [sum(v for name, v in values.items() if layer_of(name, model) == i) for i in range(num_layers)]


def naive_stability(by_batch: list[list[float]]) -> float:
    pairs = [spearman(a, b) for a, b in itertools.combinations(by_batch, 2)]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("builder", MODELS, ids=lambda builder: builder.__name__)
def test_gradient_scores_are_those_of_autograds_gradients(builder):
    model = build(builder).double()
    batches = some_batches(model, 3)
    every = probe_all(model, batches, ("aletheia", "fisher", "saliency", "energy", "hybrid"), rank=4)
    assert list(every) == ["aletheia", "fisher", "saliency", "energy", "hybrid"]
    found = gradients(model, batches)
    count = len(every["aletheia"].layers)
    weight = weights_of(every["aletheia"], model)
    parameters = dict(model.named_parameters())
    assert all(scores.modules.keys() == weight.keys() for scores in every.values())

    for method, term in NORM_SUMS.items():
        by_batch = [{name: term(g) for name, g in batch.items()} for batch in found]
        total = {name: sum(batch[name] for batch in by_batch) for name in by_batch[0]}
        assert list(every[method].layers) == pytest.approx(summed(total, model, count), rel=1e-6)
        for name, module in every[method].modules.items():
            assert module.score == pytest.approx(total[weight[name]], rel=1e-6), name
        single = [summed(batch, model, count) for batch in by_batch]
        assert every[method].meta["stability"] == pytest.approx(naive_stability(single))

    by_batch = [
        {name: (batch[name] * parameters[name]).abs().mean().item() for name in set(weight.values())}
        for batch in found
    ]
    saliency = {name: sum(batch[name] for batch in by_batch) / 3 for name in by_batch[0]}
    assert list(every["saliency"].layers) == pytest.approx(summed(saliency, model, count), rel=1e-6)
    for name, module in every["saliency"].modules.items():
        assert module.score == pytest.approx(saliency[weight[name]], rel=1e-6), name
    single = [summed(batch, model, count) for batch in by_batch]
    assert every["saliency"].meta["stability"] == pytest.approx(naive_stability(single))

    inside = dict.fromkeys(saliency, 0.0)
    for name in inside:
        for batch in found:
            inside[name] += torch.linalg.svdvals(batch[name]).square()[..., :4].sum().item()
    whole = {name: sum(batch[name].square().sum().item() for batch in found) for name in inside}
    for name, module in every["energy"].modules.items():
        best = inside[weight[name]] / max(whole[weight[name]], 1e-300)
        assert 0.2 * best <= module.score <= best + 1e-9, name
    best_layers = zip(summed(inside, model, count), summed(whole, model, count), strict=True)
    for found_share, (i, w) in zip(every["energy"].layers, best_layers, strict=True):
        assert 0.2 * i / w <= found_share <= i / w + 1e-9

    names = sorted(saliency)
    of_weight = {weight[name]: module.score for name, module in every["energy"].modules.items()}
    important, outside = ranks([saliency[n] for n in names]), ranks([1 - of_weight[n] for n in names])
    hybrid = {
        n: (i + 1) * (o + 1) / len(names) ** 2 for n, i, o in zip(names, important, outside, strict=True)
    }
    assert list(every["hybrid"].layers) == pytest.approx(summed(hybrid, model, count))
    for name, module in every["hybrid"].modules.items():
        assert module.score == pytest.approx(hybrid[weight[name]]), name
    assert -1.0 <= every["hybrid"].meta["stability"] <= 1.0


@pytest.mark.parametrize("builder", [llama, hidden_uses, mixtral], ids=lambda builder: builder.__name__)
def test_all_energy_is_inside_the_rank_of_the_whole_gradient(builder):
    model = build(builder).double()
    scores = probe(model, some_batches(model, 1), method="energy", rank=64)
    shares = {name: module.score for name, module in scores.modules.items() if "gate_proj" not in name}
    assert list(shares.values()) == pytest.approx([1.0] * len(shares))
    assert list(scores.layers) == pytest.approx([1.0] * len(scores.layers))
    assert scores.meta["rank"] == 64
    assert scores.meta["stability"] is None


def test_one_method_alone_scores_as_it_does_among_the_others():
    model = build(llama)
    batches = longer_batches(4, 2)
    every = probe_all(model, batches)
    assert list(every) == list(METHODS)
    for method, together in every.items():
        alone = probe(model, batches, method=method)
        assert alone.method == method
        assert alone.layers == together.layers
        assert alone.modules == together.modules
        assert alone.meta["stability"] == together.meta["stability"]
        assert probe(model, batches[:1], method=method).meta["stability"] is None
        assert Scores.from_json(alone.to_json()) == alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_factors_and_the_whole_gradient_give_the_same(dtype, monkeypatch):
    """A weight seen in products, its gradient in blocks of rows, and one seen as a whole; both in float32 at least."""
    monkeypatch.setattr("aletheia_tune.scores.saliency._BLOCK", 4 * 23)
    torch.manual_seed(0)
    a, b, stored = (torch.randn(*shape).to(dtype) for shape in ((11, 17), (11, 23), (17, 23)))
    gradient = a.double().T @ b.double()
    where = ({"w": stored}, {"w": 0}, 1)
    norm_sq = {"w": gradient.square().sum().item()}
    made = {}
    for way in ("factors", "whole"):
        saliency, energy = Saliency(*where), Energy(*where, rank=5, seed=3)
        for each in (saliency, energy):
            if way == "factors":
                each.weight("w", 0, a, b)
            else:
                each.gradient("w", gradient if dtype is torch.float64 else gradient.float())
            each.gradient("another", gradient)
            each.add_batch(norm_sq, {})
        made[way] = (saliency.by_parameter["w"], energy.by_parameter["w"])
    omega = torch.randn(23, 5, generator=torch.Generator().manual_seed(3)).double()
    basis = torch.linalg.qr(gradient @ omega).Q
    expected = (
        (gradient * stored.double()).abs().mean().item(),
        (basis.T @ gradient).square().sum().item() / norm_sq["w"],
    )
    assert made["factors"] == pytest.approx(expected, rel=1e-5)
    assert made["whole"] == pytest.approx(expected, rel=1e-5)


def test_energy_of_a_steep_spectrum_is_near_the_best():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q for _ in range(2))
    sigma = 0.5 ** torch.arange(40, dtype=torch.float64)
    energy = Energy({"w": torch.empty(40, 40)}, {"w": 0}, 1, rank=4, seed=0)
    energy.weight("w", 0, u, sigma[:, None] * v)
    energy.add_batch({"w": sigma.square().sum().item()}, {})
    best = (sigma[:4].square().sum() / sigma.square().sum()).item()
    assert 0.9 * best < energy.by_parameter["w"] <= best
    energy.add_batch({}, {})  # a batch that does not reach the weight
    assert energy.batches[1] == {"w": 0.0}


def test_sketched_norms_give_fisher_a_standard_error():
    model = build(llama).double()
    batches = some_batches(model, 4)
    exact = probe(model, batches, method="fisher")
    sketch = probe(model, batches, method="fisher", exact=False, seed=5)
    errors = sketch.meta["standard_error"]
    for index, error in enumerate(errors):
        assert 0 < error < exact.layers[index]
        assert abs(sketch.layers[index] - exact.layers[index]) <= 4 * error
    assert "standard_error" not in probe(model, batches[:1], method="saliency", exact=False).meta


def test_what_cannot_be_meant_is_refused():
    model = build(llama)
    batches = some_batches(model)
    for method in ("energy", "hybrid"):
        with pytest.raises(UserError, match=f"'{method}' needs exact norms"):
            probe(model, batches, method=method, exact=False)
    with pytest.raises(UserError, match="no methods"):
        probe_all(model, batches, ())
    with pytest.raises(UserError, match="method 'other' is not known"):
        probe_all(model, batches, ("aletheia", "other"))
    with pytest.raises(UserError, match="rank is 0"):
        probe(model, batches, method="energy", rank=0)


@pytest.mark.parametrize("layers", [1, 2, 7, 12])
@pytest.mark.parametrize("share", [5, 25, 50, 100])
@pytest.mark.parametrize("control", list(CONTROLS))
def test_a_plan_by_a_control_has_the_controls_layers(control, layers, share):
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(layers)]
    modules = {name: ModuleScore(index, 2.0 + index, 8, 16, "mlp") for index, name in enumerate(names)}
    given = Scores("aletheia", tuple(2.0 + i for i in range(layers)), modules, "model.layers")
    chosen = control_layers(control, layers, share_of_layers(layers, share), seed=3)
    plan = make_plan(given, layers=share, control=control, seed=3)
    assert plan.layers == chosen
    assert len(chosen) == len(set(chosen)) == share_of_layers(layers, share)
    assert plan.meta["control"] == control


def test_an_unknown_control_is_refused():
    with pytest.raises(UserError, match="control 'best' is unknown"):
        control_layers("best", 4, 1)


def hidden_states(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """The states under the first layer and above each of them, before the final norm, by transformers' own account."""
    base = model.base_model
    for norm in ("norm", "ln_f", "final_layer_norm"):
        if hasattr(base, norm):
            setattr(base, norm, nn.Identity())
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        return list(base(**inputs, output_hidden_states=True).hidden_states)


def naive_cka(x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    # Where all examples end in one token, x under layer 0 is the same for all: 0 / 0 counts as unlike.
    return ((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()).clamp(min=1e-12)).item()


def longer_batches(rows: int, count: int = 3) -> list[dict[str, Tensor]]:
    """Batches of ``rows`` examples of unequal lengths, padded on the right, that all end in tokens 5 and 7."""
    generator = torch.Generator().manual_seed(4)
    batches = []
    for _ in range(count):
        ids = torch.randint(8, 90, (rows, 11), generator=generator)
        mask = torch.ones_like(ids)
        for row in range(rows):
            end = 11 - row % 4
            ids[row, end - 2 : end] = torch.tensor([5, 7])
            ids[row, end:], mask[row, end:] = 0, 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return batches


# hidden_uses runs the first forward pass twice: nothing may be counted twice.
@pytest.mark.parametrize("methods", [("cka", "activation"), ("cka", "activation", "aletheia")])
@pytest.mark.parametrize("builder", [*MODELS, bert], ids=lambda builder: builder.__name__)
def test_forward_scores_are_those_of_the_hidden_states(builder, methods):
    model = build(builder).double()
    batches = longer_batches(4)
    if builder is bert:
        batches = [{**batch, "labels": torch.arange(4) % 3} for batch in batches]
    inputs: dict[str, list[Tensor]] = {}
    every = probe_all(model, batches, methods)
    assert every["cka"].meta["samples"] == 12
    weight = weights_of(every["cka"], model)
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: inputs.setdefault(weight[name], []).append(args[0].detach())
        )
        for name in every["activation"].modules
    ]
    states = [hidden_states(model, batch) for batch in batches]
    for handle in handles:
        handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]

    by_batch = [
        [state[mask].norm(dim=-1).mean().item() for state in per_batch[1:]]
        for per_batch, mask in zip(states, masks, strict=True)
    ]
    # Batches have equally many tokens, so the mean over all tokens is the mean over batches.
    assert list(every["activation"].layers) == pytest.approx(
        [sum(v) / 3 for v in zip(*by_batch, strict=True)]
    )
    assert every["activation"].meta["stability"] == pytest.approx(naive_stability(by_batch))
    for name, module in every["activation"].modules.items():
        norms = [
            x.norm(dim=-1).flatten()[masks[0].flatten()] if x[..., 0].numel() == 44 else x.norm(dim=-1)
            for x in inputs[weight[name]]
        ]
        assert module.score == pytest.approx(torch.cat([n.flatten() for n in norms]).mean().item()), name
    assert every["cka"].modules.keys() - every["activation"].modules.keys() == {
        name for name in every["cka"].modules if name in weight.values()
    }, "experts alone have no activation norm"

    last = [mask.sum(1) - 1 for mask in masks]
    pooled = [
        [state[torch.arange(4), at] for state in per_batch]
        for per_batch, at in zip(states, last, strict=True)
    ]
    of_all = [torch.cat(states) for states in zip(*pooled, strict=True)]
    expected = [1 - naive_cka(x, y) for x, y in itertools.pairwise(of_all)]
    assert list(every["cka"].layers) == pytest.approx(expected, abs=1e-9)
    for name, module in every["cka"].modules.items():
        assert module.score == every["cka"].layers[layer_of(weight[name], model)]
    assert every["cka"].meta["pooling"] == "last"


@pytest.mark.parametrize("padding", ["right", "left"])
def test_cka_pools_content_or_means(padding):
    model = build(gpt2).double()
    batches = longer_batches(5)
    if padding == "left":
        for batch in batches:
            for row, key in itertools.product(range(5), batch):
                batch[key][row] = batch[key][row].roll(row % 4)
    states = [hidden_states(model, batch) for batch in batches]
    ends = [batch["attention_mask"].cumsum(1).argmax(1) for batch in batches]
    rows = torch.arange(5)
    pools = {
        "last": lambda state, batch, end: state[rows, end],
        "last-content": lambda state, batch, end: state[rows, end - 2],
        "mean": lambda state, batch, end: torch.stack(
            [s[m.bool()].mean(0) for s, m in zip(state, batch["attention_mask"], strict=True)]
        ),
    }
    found = {}
    for pooling, pool in pools.items():
        scores = probe(model, batches, method="cka", pooling=pooling)
        pooled = [
            [pool(state, batch, end) for state in per_batch]
            for per_batch, batch, end in zip(states, batches, ends, strict=True)
        ]
        changes = [[1 - naive_cka(x, y) for x, y in itertools.pairwise(each)] for each in pooled]
        of_all = [torch.cat(each) for each in zip(*pooled, strict=True)]
        expected = [1 - naive_cka(x, y) for x, y in itertools.pairwise(of_all)]
        assert list(scores.layers) == pytest.approx(expected, abs=1e-9)
        assert scores.meta["stability"] == pytest.approx(naive_stability(changes))
        found[pooling] = scores.layers
    assert len(set(found.values())) == 3


def test_activation_and_cka_alone_differentiate_nothing():
    model = build(llama)
    differentiated = []
    handle = model.model.norm.register_forward_hook(
        lambda module, args, out: differentiated.append(out.requires_grad)
    )
    probe_all(model, longer_batches(3), ("activation", "cka"))
    assert differentiated
    assert not any(differentiated)
    probe(model, longer_batches(3), method="aletheia")
    assert any(differentiated)
    handle.remove()


def test_batches_of_two_have_scores_but_no_stability_of_cka():
    assert probe(build(llama), some_batches(build(llama), 3), method="cka").meta["stability"] is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("builder", [gpt2, mixtral], ids=lambda builder: builder.__name__)
def test_no_method_leaves_a_trace(builder, method):
    model = build(builder).eval()
    batches = some_batches(model)
    model(**batches[0])

    def hooks() -> list:
        return [
            (name, len(module._forward_hooks), len(module._forward_pre_hooks), module.training)
            for name, module in model.named_modules()
        ]

    before = hooks()
    values = {name: parameter.clone() for name, parameter in model.named_parameters()}
    batches.append({**batches[0], "attention_mask": torch.ones(3, 5)})  # fits nothing: the third pass fails
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        probe(model, batches, method=method)
    assert hooks() == before
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, values[name])
        assert parameter.requires_grad
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks


def test_what_cka_cannot_tell_is_refused():
    model = build(llama)
    batches = some_batches(model)
    with pytest.raises(UserError, match="given 2 example"):
        probe(model, batches[:1], method="cka")
    with pytest.raises(UserError, match="pooling 'first' is not known"):
        probe(model, batches, method="cka", pooling="first")
    single = [{key: value[:1] for key, value in batch.items()} for batch in batches]
    with pytest.raises(UserError, match="at least two a batch"):
        probe(model, single, method="cka", pooling="last-content")
    with pytest.raises(UserError, match=r"attention_mask has shape \[2, 1, 12, 12\]"):
        probe(model, [{**batches[0], "attention_mask": torch.ones(2, 1, 12, 12)}], method="activation")


@pytest.mark.parametrize("factor", [1.0, 3e3], ids=["ordinary", "beyond float16"])
def test_float16_gradients_are_scaled_into_its_range(factor):
    """With a head of `factor` times the weights and small hidden states before the last norm, they overflow."""
    model = build(gpt_neox)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            small = any(part in name for part in ("embed_in", "attention.dense", "dense_4h_to_h"))
            parameter.mul_(factor if "lm_head" in name else 0.01 if small and factor > 1 else 1.0)
    methods = ("aletheia", "fisher", "saliency", "energy")
    model, batches = model.half(), some_batches(model)
    given = probe_all(model, batches, methods)
    expected = probe_all(model.float(), batches, methods)
    assert "loss_scale" not in expected["aletheia"].meta
    assert (given["aletheia"].meta["loss_scale"] < 1.0) == (factor > 1)
    for method in methods:
        assert given[method].layers == pytest.approx(expected[method].layers, rel=2e-2), method
    grads = gradients(model.half(), batches[:1])[0]
    assert all(g.isfinite().all() for g in grads.values()) == (factor == 1)
