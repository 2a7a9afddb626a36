"""The probe against autograd's own gradients, the published package, and its promise to leave no trace."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from aletheia_tune.errors import NonFiniteLoss, UserError
from aletheia_tune.probe import faithful_batches, probe
from aletheia_tune.scores import Scores
from aletheia_tune.scores.gradient import spearman
from tests.probe_case import (
    VOCABULARY,
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

CAUSAL = [llama, gpt2, gpt_neox, mixtral]
ALL = [*CAUSAL, bert, shared_module, hidden_uses]


def named(builders: list[Callable[..., nn.Module]]) -> list:
    return [pytest.param(builder, id=builder.__name__) for builder in builders]


def autograd_norms(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Σ over batches of each layer parameter's gradient norm, by plain autograd, one batch after another."""
    prefix = layer_prefix(model)
    model.train()
    model.requires_grad_(True)
    model.config._experts_implementation = "eager"  # the grouped product has no float64
    norms: dict[str, float] = {}
    for batch in batches:
        model.zero_grad()
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            if name.startswith(prefix):
                norm = 0.0 if parameter.grad is None else parameter.grad.double().norm().item()
                norms[name] = norms.get(name, 0.0) + norm
    model.zero_grad()
    return norms


def by_layer(model: nn.Module, norms: dict[str, float]) -> list[float]:
    prefix = layer_prefix(model)
    indices = {name: int(name.removeprefix(prefix).split(".")[0]) for name in norms}
    return [
        sum(n for name, n in norms.items() if indices[name] == i) for i in range(max(indices.values()) + 1)
    ]


@pytest.mark.parametrize("builder", named(ALL))
def test_scores_are_the_norms_of_autograds_gradients(builder):
    model = build(builder).double()
    batches = some_batches(model)
    scores = probe(model, batches)
    expected = autograd_norms(model, batches)
    assert list(scores.layers) == pytest.approx(by_layer(model, expected), rel=1e-6)
    assert scores.layer_path == layer_prefix(model).removesuffix(".")
    for name, module in scores.modules.items():
        tensor = name if name in expected else f"{name}.weight"
        if tensor in expected:
            assert module.score == pytest.approx(expected[tensor], rel=1e-6), name
    assert {name.rsplit(".", 1)[-1] for name in scores.modules} - {"experts"}, "no module has a score"


def test_stacked_experts_have_scores_of_their_own():
    model = build(mixtral).double()
    batches = some_batches(model, 1)
    scores = probe(model, batches)
    model.requires_grad_(True)
    model.config._experts_implementation = "eager"
    model(**batches[0]).loss.backward()
    for index, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            full = f"model.layers.{index}.mlp.experts.{name}"
            gradient = getattr(layer.mlp.experts, name).grad
            assert scores.modules[full].score == pytest.approx(gradient.norm().item(), rel=1e-6)
            each = [expert.norm().item() for expert in gradient]
            assert scores.meta["experts"][full] == pytest.approx(each, rel=1e-6, abs=1e-15)
            assert scores.modules[full].kind == "mlp"
    assert (scores.modules["model.layers.0.mlp.experts.gate_up_proj"].in_features) == 32
    assert (scores.modules["model.layers.0.mlp.experts.gate_up_proj"].out_features) == 80


def test_a_shared_weight_scores_once_by_layer_and_under_each_of_its_names():
    model = build(shared_module)
    scores = probe(model, some_batches(model, 1))
    names = [f"model.layers.{index}.self_attn.q_proj" for index in (1, 3)]
    assert scores.modules[names[0]].score == scores.modules[names[1]].score > 0
    assert scores.modules[names[1]].layer == 3


@pytest.mark.parametrize("builder", named(CAUSAL))
def test_faithful_probe_agrees_with_the_published_package(builder):
    aletheia_lora = pytest.importorskip("aletheia_lora")
    model = build(builder).float()
    generator = torch.Generator().manual_seed(3)
    examples = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.full_like(ids, -100)}
        for ids in torch.randint(VOCABULARY, (9, 16), generator=generator)
    ]
    scores = probe(model, faithful_batches(examples), faithful=True)
    theirs = aletheia_lora.gradient_probe(model, examples, len(scores.layers), device=torch.device("cpu"))
    expected = [theirs[index] for index in range(len(scores.layers))]
    assert list(scores.layers) == pytest.approx(expected, rel=1e-3)
    half = len(expected) // 2

    def chosen(values: list[float]) -> set[int]:
        return set(sorted(range(len(values)), key=lambda index: -values[index])[:half])

    assert chosen(list(scores.layers)) == chosen(expected)


def test_faithful_labels_are_the_input():
    model = build(llama)
    batches = some_batches(model, 1)
    unmasked = [{**batches[0], "labels": batches[0]["input_ids"].clone()}]
    assert probe(model, batches, faithful=True).layers == probe(model, unmasked).layers
    assert probe(model, batches).layers != probe(model, unmasked).layers


@pytest.mark.parametrize("builder", named([llama, gpt2, mixtral]))
def test_bfloat16_is_at_most_twice_as_far_off_as_autograd(builder):
    autograd, ours = [], []
    for seed in range(4):
        model, wide = build(builder, seed), build(builder, seed).double()
        model.bfloat16()
        wide.load_state_dict(model.state_dict())
        batches = some_batches(model)
        truth = torch.tensor(by_layer(wide, autograd_norms(wide, batches)))
        autograd.append(torch.tensor(by_layer(model, autograd_norms(model, batches))) / truth - 1)
        ours.append(torch.tensor(probe(model, batches).layers) / truth - 1)
    # Rounding of a norm is luck in a single layer: the root mean square over layers and models is compared.
    assert torch.cat(ours).square().mean().sqrt() <= 2 * torch.cat(autograd).square().mean().sqrt() + 1e-5


def test_sketch_is_within_four_standard_errors():
    model = build(llama).double()
    batches = some_batches(model, 4)
    exact = probe(model, batches)
    sketch = probe(model, batches, exact=False, sketch_columns=16, seed=5)
    errors = sketch.meta["standard_error"]
    for index, error in enumerate(errors):
        assert 0 < error < exact.layers[index] / 4
        assert abs(sketch.layers[index] - exact.layers[index]) <= 4 * error
    assert sketch.layers != exact.layers
    again = probe(model, batches, exact=False, sketch_columns=16, seed=5)
    assert again.layers == sketch.layers


class Shapes(TorchDispatchMode):
    """Records the shapes of all tensors that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else (out,):
            if isinstance(tensor, Tensor) and func.namespace == "aten" and not is_view(func):
                self.made.add(tuple(tensor.shape))
        return out


def is_view(func) -> bool:
    return any(argument.alias_info is not None for argument in func._schema.arguments)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("builder", named([llama, gpt2, gpt_neox]))
def test_no_weight_gradient_is_held(builder, exact):
    model = build(builder)
    weights = {
        shape
        for name, p in model.named_parameters()
        if name.startswith(layer_prefix(model)) and p.dim() == 2
        for shape in (tuple(p.shape), tuple(p.shape)[::-1])
    }
    batches = some_batches(model, 1)
    model.requires_grad_(True)
    with Shapes() as plain:
        model(**batches[0]).loss.backward()
    assert plain.made & weights, "the recorder misses the weight gradients that autograd makes"
    model.zero_grad()
    # Twice twelve tokens are few enough for the Gram form; a tile of weights this small would be all of them.
    with Shapes() as probed:
        probe(model, batches, exact=exact, sketch_columns=5)
    assert probed.made & weights == set()


def test_nothing_is_held_after_the_probe():
    model = build(gpt2)
    inputs: list[weakref.ref] = []
    handles = [
        block.mlp.c_proj.register_forward_pre_hook(
            lambda module, args: inputs.append(weakref.ref(args[0].untyped_storage()))
        )
        for block in model.transformer.h
    ]
    probe(model, some_batches(model, 1))
    for handle in handles:
        handle.remove()
    assert len(inputs) >= len(model.transformer.h)
    assert all(reference() is None for reference in inputs)


def state_of(model: nn.Module) -> dict:
    hooks = [
        len(getattr(module, kind) or ())
        for module in model.modules()
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    parameters = list(model.parameters())
    return {
        "requires_grad": [p.requires_grad for p in parameters],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.sum().item()) for p in parameters],
        "values": [p.detach().double().sum().item() for p in parameters],
        "modes": [module.training for module in model.modules()],
        "hooks": hooks,
        "parameter_hooks": [
            len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in parameters
        ],
        "rng": torch.get_rng_state().tolist(),
        "config": model.config.to_dict(),
        "experts": model.config._experts_implementation,
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "checkpointing": [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        "loss": model.loss_function,
    }


def unusual_state(builder) -> nn.Module:
    model = build(builder)
    model(**some_batches(model, 1)[0])  # transformers installs some hooks of its own at the first call
    model.gradient_checkpointing_enable()
    model.eval()
    next(model.modules()).training = True
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
        if index % 4 == 0:
            parameter.grad = torch.full_like(parameter, 2.0)
    return model


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("builder", named(ALL))
def test_leaves_the_model_as_it_was(builder, exact):
    model = unusual_state(builder)
    torch.manual_seed(7)
    before = state_of(model)
    probe(model, some_batches(model), exact=exact)
    assert state_of(model) == before


@pytest.mark.parametrize("builder", named([llama, mixtral]))
def test_leaves_the_model_as_it_was_after_an_error(builder):
    model = unusual_state(builder)
    torch.manual_seed(7)
    before = state_of(model)
    batches = some_batches(model)
    batches[1]["attention_mask"] = torch.ones(3, 5, 7, 9)  # fits nothing: the second forward pass fails
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        probe(model, batches)
    assert state_of(model) == before


def test_leaves_the_model_as_it_was_after_an_error_in_the_backward_pass(monkeypatch):
    model = unusual_state(llama)
    torch.manual_seed(7)
    before = state_of(model)

    def fail(x, dy):
        raise RuntimeError("no norm today")

    monkeypatch.setattr("aletheia_tune.probe.weight_grad_norm_sq", fail)
    with pytest.raises(RuntimeError, match="no norm today"):
        probe(model, some_batches(model))
    monkeypatch.undo()
    assert state_of(model) == before


def test_dropout_follows_the_seed_alone():
    model = build(gpt2, resid_pdrop=0.2)
    batches = some_batches(model)
    torch.manual_seed(1)
    first = probe(model, batches, seed=3).layers
    torch.manual_seed(2)
    assert probe(model, batches, seed=3).layers == first
    assert probe(model, batches, seed=4).layers != first


def test_a_peft_model_is_probed_as_the_model_it_wraps():
    peft = pytest.importorskip("peft")
    model = build(llama)
    batches = some_batches(model)
    expected = probe(model, batches)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    before = [(name, p.requires_grad) for name, p in wrapped.named_parameters()]
    scores = probe(wrapped, batches)
    assert scores.layers == expected.layers
    assert scores.modules == expected.modules
    assert [(name, p.requires_grad) for name, p in wrapped.named_parameters()] == before


def test_meta_says_how_the_scores_came_about():
    model = build(llama)
    batches = some_batches(model, 3)
    scores = probe(model, batches)
    meta = scores.meta
    assert meta["batches"] == 3
    assert meta["tokens"] == 3 * 21
    assert meta["labelled_tokens"] == 3 * 16
    assert meta["dtype"] == "float32"
    assert meta["faithful"] is False
    assert meta["head"] is None
    losses = [model(**batch).loss.item() for batch in batches]
    assert meta["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert -1.0 <= meta["stability"] <= 1.0
    assert meta["seconds"] > 0
    assert meta["peak_memory_bytes"] > 0
    assert probe(model, batches[:1]).meta["stability"] is None
    assert Scores.from_json(scores.to_json()) == scores


def test_spearman():
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5.0))
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def test_the_model_that_no_gradient_reaches_from_below():
    """Without anything trained under the first product its input is made to carry a gradient."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 7, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Block(), Block()])

        def forward(self, x: Tensor, labels: Tensor):
            for layer in self.layers:
                x = layer(x)
            return type("Output", (), {"loss": nn.functional.mse_loss(x, labels)})

    torch.manual_seed(0)
    model = Model()
    batch = {"x": torch.randn(3, 5, 7), "labels": torch.randn(3, 5, 7)}
    scores = probe(model, [batch])
    assert batch["x"].requires_grad is False
    assert batch["x"].grad is None
    model(**batch).loss.backward()
    expected = [layer.linear.weight.grad.norm().item() for layer in model.layers]
    assert list(scores.layers) == pytest.approx(expected, rel=1e-5)


def bad_label(model, batches) -> Iterator[dict]:
    yield batches[0]
    yield {**batches[1], "labels": torch.full_like(batches[1]["labels"], -100)}


def test_bad_input_is_one_line_that_says_where():
    model = build(llama)
    batches = some_batches(model)
    with pytest.raises(NonFiniteLoss, match="batch 2: the loss is nan") as caught:
        probe(model, bad_label(model, batches))
    assert caught.value.step == 2
    with pytest.raises(UserError, match="no batches"):
        probe(model, [])
    with pytest.raises(UserError, match="batch 1 has no labels"):
        probe(model, [{"input_ids": batches[0]["input_ids"]}])
    with pytest.raises(UserError, match="method 'other'"):
        probe(model, batches, method="other")
    with pytest.raises(UserError, match="sketch_columns is 1"):
        probe(model, batches, exact=False, sketch_columns=1)
    with pytest.raises(UserError, match="no examples"):
        faithful_batches([])


def test_a_gradient_that_is_not_finite_names_its_parameter():
    model = build(llama)
    batches = some_batches(model)
    handle = model.model.layers[1].mlp.down_proj.register_full_backward_hook(
        lambda module, grad_input, grad_output: (grad_input[0] * math.inf,)
    )
    with pytest.raises(UserError, match=r"batch 1: the gradient of model\.layers\..*is not finite"):
        probe(model, batches)
    handle.remove()
