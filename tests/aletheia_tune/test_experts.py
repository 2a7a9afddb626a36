"""Adapters on stacked experts compute on the operator what PEFT computes with W + Δ, which is never made there."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import aletheia_kernels
from aletheia_tune.errors import UserError
from aletheia_tune.patch import apply_kernels, restore
from benchmarks.family_table import FAMILIES

MIXTURES = ("Mixtral", "Qwen3-MoE", "DeepSeek-V3", "gpt-oss")
BOTH = ("gate_up_proj", "down_proj")
HIDDEN, FFN, EXPERTS = 16, 24, 4


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The rank of each call of the operator, in order."""
    seen: list[int] = []
    original = aletheia_kernels.lora_experts

    def counting(x: Tensor, weight: Tensor, lora_A: Tensor, *rest: Any) -> Tensor:
        seen.append(lora_A.shape[1])
        return original(x, weight, lora_A, *rest)

    monkeypatch.setattr(aletheia_kernels, "lora_experts", counting)
    return seen


def settings(names=BOTH, **options) -> LoraConfig:
    given: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": [], "init_lora_weights": False}
    return LoraConfig(target_parameters=list(names), **(given | options))


def language_model(family: str = "Mixtral", **options) -> PeftModel:
    """Adapters on the experts and under them, so that the gradient of their input counts."""
    torch.manual_seed(1)
    names = [f"experts.{name}" for name in BOTH]
    return get_peft_model(
        FAMILIES[family].build(), settings(names, **({"target_modules": ["o_proj"]} | options))
    )


def batch(family: str = "Mixtral") -> dict[str, Tensor]:
    return FAMILIES[family].batch(torch.Generator().manual_seed(0))


def loss_and_grads(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(given: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(given[0], expected[0])
    assert given[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(given[1][name], grad, rtol=1e-4, atol=1e-5, msg=name)


def mixture(
    kind: Any = MixtralExperts, dtype: torch.dtype = torch.float32, implementation: str = "grouped_mm"
):
    """Experts by themselves in a module of which they are the first part."""
    torch.manual_seed(0)
    if kind is NemotronHExperts:
        config: Any = SimpleNamespace(
            n_routed_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=FFN, moe_latent_size=None,
            mlp_hidden_act="relu2",
        )  # fmt: skip
    else:
        config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=EXPERTS)
    config._experts_implementation = implementation
    module = nn.Sequential(kind(config))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.to(dtype)


def adapted_mixture(names=BOTH, **how) -> tuple[PeftModel, ParamWrapper]:
    """With adapters; and the outermost wrapper, which a model calls."""
    model = get_peft_model(mixture(**how), settings([f"0.{name}" for name in names]))
    return model, model.base_model.model[0]


def routed(dtype: torch.dtype = torch.float32, among: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of 90 tokens, the two of so many experts that each goes to, their weights."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(90, HIDDEN, generator=generator).to(dtype).requires_grad_()
    index = torch.rand(90, among, generator=generator).argsort(1)[:, :2]
    return hidden, index, torch.rand(90, 2, generator=generator).to(dtype).requires_grad_()


def results(model: nn.Module, wrapper: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """What the experts give, and the gradients of their input, of the routing weights and of every adapter."""
    hidden, _, weights = inputs
    leaves = {"hidden": hidden, "weights": weights}
    leaves |= {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = wrapper(*inputs)
    generator = torch.Generator().manual_seed(4)
    dy = torch.randn(y.shape, generator=generator).to(y.dtype)
    return {"y": y.detach(), **dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy), strict=True))}


def assert_patching_changes_nothing(
    model: nn.Module, wrapper: nn.Module, among: int = EXPERTS
) -> dict[str, Tensor]:
    """Puts the model on the operators; returns the results, which are those from before."""
    expected = results(model, wrapper, routed(among=among))
    apply_kernels(model, strict=True)
    given = results(model, wrapper, routed(among=among))
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, rtol=1e-4, atol=1e-5, msg=name)
    return given


@pytest.mark.parametrize("family", MIXTURES)
def test_same_loss_and_gradients(family, calls):
    model = language_model(family, rank_pattern={"down_proj": 3}, use_rslora=True)
    expected = loss_and_grads(model, batch(family))
    report = apply_kernels(model, strict=True)
    layers = sum(entry.module.endswith(".experts") for entry in report.entries)
    assert len(report.fast) == len(report.entries)
    assert layers > 0
    calls.clear()
    given = loss_and_grads(model, batch(family))
    assert calls == [4, 3] * layers
    assert_same(given, expected)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_same_as_every_implementation_of_transformers(implementation, calls):
    model, wrapper = adapted_mixture(implementation=implementation)
    assert_patching_changes_nothing(model, wrapper)
    assert calls[-2:] == [4, 4]


@pytest.mark.parametrize("name", BOTH)
def test_one_projection_alone_may_have_an_adapter(name, calls):
    model, wrapper = adapted_mixture((name,))
    assert_patching_changes_nothing(model, wrapper)
    assert calls[-2:] == [4 * (name == each) for each in BOTH]


def test_experts_without_a_gate(calls):
    model, wrapper = adapted_mixture(("up_proj", "down_proj"), kind=NemotronHExperts)
    assert_patching_changes_nothing(model, wrapper)
    assert calls[-2:] == [4, 4]


def test_experts_without_tokens_get_gradients_of_zero():
    model, wrapper = adapted_mixture()
    for name, value in assert_patching_changes_nothing(model, wrapper, among=2).items():
        if "lora_A" in name:
            by_expert = value.view(EXPERTS, -1)
            assert by_expert[:2].any(1).all()
            assert not by_expert[2:].any()


def test_no_tokens_at_all():
    _, wrapper = adapted_mixture()
    apply_kernels(wrapper, strict=True)
    hidden = torch.randn(0, HIDDEN).requires_grad_()
    y = wrapper(hidden, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    y.sum().backward()
    assert y.shape == (0, HIDDEN)
    assert not wrapper.lora_A["default"].weight.grad.any()


def test_bfloat16_with_float32_adapters_is_as_near_to_float64():
    """The 2× rule, against what PEFT makes of the same bfloat16 weights."""

    def made(dtype: torch.dtype, patched: bool) -> dict[str, Tensor]:
        implementation = "eager" if dtype == torch.float64 else "grouped_mm"
        model, wrapper = adapted_mixture(dtype=torch.bfloat16, implementation=implementation)
        assert wrapper.lora_A["default"].weight.dtype == torch.float32
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        if dtype == torch.float64:
            model.double()
        if patched:
            apply_kernels(model, strict=True)
        inputs = (part.detach() for part in routed(torch.bfloat16))
        hidden, index, weights = (part.to(dtype) if part.is_floating_point() else part for part in inputs)
        return results(model, wrapper, (hidden.requires_grad_(), index, weights.requires_grad_()))

    exact = made(torch.float64, patched=False)
    plain, ours = made(torch.bfloat16, patched=False), made(torch.bfloat16, patched=True)
    for name, value in exact.items():
        off, allowed = ((one[name].double() - value).norm() / value.norm() for one in (ours, plain))
        assert ours[name].dtype == plain[name].dtype
        assert off <= 2 * allowed + 1e-5, (name, off, allowed)


def test_no_weight_with_the_adapter_added_is_made(monkeypatch):
    model = language_model()
    apply_kernels(model, strict=True)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("PEFT's parametrization")

    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", refuse)
    loss_and_grads(model, batch())
    restore(model)
    with pytest.raises(AssertionError, match="parametrization"):
        model(**batch())


def test_restore_leaves_no_trace(calls):
    model = language_model().eval()
    inputs = batch()
    before = model(**inputs).logits
    trace = {name: set(vars(module)) for name, module in model.named_modules()}
    apply_kernels(model, strict=True)
    calls.clear()
    model(**inputs)
    assert calls
    restore(model)
    calls.clear()
    assert torch.equal(model(**inputs).logits, before)
    assert not calls
    assert {name: set(vars(module)) for name, module in model.named_modules()} == trace


def test_saves_what_peft_would_and_stock_peft_loads_it(tmp_path):
    model = language_model(rank_pattern={"down_proj": 3}).eval()
    model.save_pretrained(tmp_path / "before")
    apply_kernels(model, strict=True)
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = PeftModel.from_pretrained(FAMILIES["Mixtral"].build(), tmp_path / "after")
    torch.testing.assert_close(loaded(**batch()).logits, model(**batch()).logits, rtol=1e-4, atol=1e-5)


def test_disable_merge_and_unload_still_work(calls):
    model = language_model().eval()
    inputs = batch()
    with model.disable_adapter():
        base = model(**inputs).logits
    expected = model(**inputs).logits
    apply_kernels(model, strict=True)
    calls.clear()
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, base)
    model.merge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert not calls
    model.unmerge_adapter()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    assert calls
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_deep_copy_is_patched_on_its_own():
    model, _ = adapted_mixture()
    apply_kernels(model, strict=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    hidden, index, weights = routed()
    assert not torch.allclose(
        twin.base_model.model[0](hidden, index, weights), model.base_model.model[0](hidden, index, weights)
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model = language_model().train()
    apply_kernels(model, strict=True)
    expected = loss_and_grads(model, batch())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    given = loss_and_grads(model, batch())
    assert torch.equal(given[0], expected[0])
    assert_same(given, expected)


def test_compiles_as_one_graph():
    model, wrapper = adapted_mixture()
    apply_kernels(model, strict=True)
    expected = results(model, wrapper, routed())
    given = results(model, torch.compile(wrapper, fullgraph=True, backend="aot_eager"), routed())
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_autocast(calls):
    model, wrapper = adapted_mixture(dtype=torch.bfloat16)
    apply_kernels(model, strict=True)
    hidden, index, weights = routed()
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast = wrapper(hidden, index, weights)
        assert calls == [4, 4]
        restore(model)
        slow = wrapper(hidden, index, weights)
    assert fast.dtype == slow.dtype
    torch.testing.assert_close(fast, slow, rtol=5e-2, atol=5e-2)
    model, wrapper = adapted_mixture()
    apply_kernels(model, strict=True)
    calls.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wrapper(hidden, index, weights)
    assert not calls  # fp32 weights under bf16 autocast are PEFT's to cast


def two_adapters(model: PeftModel, _: Any) -> None:
    model.add_adapter("other", settings([f"0.{name}" for name in BOTH], r=2))
    model.base_model.set_adapter(["default", "other"])


STATES = {
    "2 adapters are active on it": two_adapters,
    "adapters are disabled": lambda model, _: model.base_model.disable_adapter_layers(),
    "a hook is registered on its experts": lambda _, experts: experts.register_forward_hook(lambda *_: None),
    "the forward of its experts is replaced": lambda _, experts: setattr(experts, "forward", experts.forward),
    "its base weight is trained": lambda _, experts: experts.down_proj.requires_grad_(),
    "its experts are spread over processes": lambda _, experts: setattr(experts, "_is_expert_parallel", True),
}


@pytest.mark.parametrize("reason", STATES)
def test_a_state_that_is_not_computed_stays_on_pefts_path_and_says_why(reason, calls):
    model, wrapper = adapted_mixture()
    STATES[reason](model, wrapper.get_base_layer())
    expected = wrapper(*routed())
    report = apply_kernels(model)
    assert [(entry.path, entry.reason) for entry in report.entries] == [("peft", reason)] * 2
    calls.clear()
    assert torch.equal(wrapper(*routed()), expected)
    assert not calls
    with pytest.raises(UserError, match=f"2 adapted modules stay on PEFT's path, the first .*{reason}"):
        apply_kernels(model, strict=True)


class Doubled(MixtralExperts):
    """A module of a model's own that calls itself experts and computes more."""

    def forward(self, *arguments: Tensor) -> Tensor:
        return 2 * super().forward(*arguments)


def test_experts_that_compute_something_else_stay_on_pefts_path(calls):
    model, wrapper = adapted_mixture(kind=Doubled)
    expected = wrapper(*routed())
    report = apply_kernels(model)
    assert [entry.reason for entry in report.entries] == ["Doubled computes something of its own"] * 2
    calls.clear()
    assert torch.equal(wrapper(*routed()), expected)
    assert not calls


def test_an_implementation_of_someones_own_is_used(monkeypatch, calls):
    model, wrapper = adapted_mixture()
    apply_kernels(model, strict=True)
    monkeypatch.setitem(ExpertsInterface._global_mapping, "own", lambda _, hidden, *routing: 3 * hidden)
    wrapper.get_base_layer().config._experts_implementation = "own"
    calls.clear()
    hidden, *routing = routed()
    assert torch.equal(wrapper(hidden, *routing), 3 * hidden)
    assert not calls
    report = apply_kernels(model)
    assert [entry.reason for entry in report.entries] == ["its experts run on 'own'"] * 2


def test_a_parameter_of_no_experts_stays_on_pefts_path():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), settings(["0.weight"]))
    report = apply_kernels(model)
    assert report.entries[0].path == "peft"
    assert report.entries[0].reason == "Linear is no module of transformers' experts interface"
