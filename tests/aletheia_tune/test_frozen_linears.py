"""Linears without adapters run on the operator where the processor has no products in their dtype, and only there."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import aletheia_kernels
from aletheia_kernels import backends
from aletheia_kernels.dtypes import has_vendor_products
from aletheia_tune import patch
from aletheia_tune.patch import apply_kernels, restore

pytestmark = pytest.mark.skipif(
    backends.choose("lora_group", "cpu", torch.bfloat16).backend != "cpu",
    reason="the operator is compiled, and the C++ extension is not here",
)


def adapted(dtype: torch.dtype = torch.float32, **options) -> nn.Module:
    """A Llama with adapters on q and v unless ``options`` say otherwise: k, o, the MLPs and the head have none."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options
    return get_peft_model(LlamaForCausalLM(config).to(dtype), LoraConfig(**settings))


def batch() -> dict[str, torch.Tensor]:
    # Enough rows for the products that are not left to the module.
    ids = torch.randint(0, 64, (4, 20), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def slow(monkeypatch) -> None:
    """A processor that has no products in any dtype, as far as patching knows."""
    monkeypatch.setattr(patch, "has_vendor_products", lambda dtype: False)


@pytest.fixture
def ranks(monkeypatch) -> list[list[int]]:
    """The ranks of the projections in each call of the operator."""
    seen: list[list[int]] = []
    original = aletheia_kernels.lora_group

    def counting(x, weights, biases, lora_As, *rest, **options):
        seen.append([lora_A.shape[0] for lora_A in lora_As])
        return original(x, weights, biases, lora_As, *rest, **options)

    monkeypatch.setattr(aletheia_kernels, "lora_group", counting)
    return seen


def gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradient of everything that is trained, by name."""
    model.zero_grad()
    loss = model(**batch()).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def in_one(named: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([gradient.double().flatten() for gradient in named.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_same_loss_and_gradients(dtype, slow, ranks):
    model = adapted(dtype)
    exact = adapted(torch.float64)
    exact.load_state_dict(model.state_dict())
    (exact_loss, exact_gradient), (plain_loss, plain_gradient) = gradients(exact), gradients(model)
    apply_kernels(model, strict=True)
    ranks.clear()
    loss, gradient = gradients(model)
    assert ranks == [[4, 0, 4], [0]] * 2 + [[0]]
    slack = max(torch.finfo(dtype).eps, 1e-5)
    assert (loss - exact_loss).abs() <= 2 * (plain_loss - exact_loss).abs() + slack
    error, plain_error = ((in_one(g) - in_one(exact_gradient)).norm() for g in (gradient, plain_gradient))
    assert error <= 2 * plain_error + 1e-5


def test_only_where_the_processor_has_no_products_in_their_dtype(ranks):
    model = adapted(torch.bfloat16)
    report = apply_kernels(model)
    ranks.clear()
    model(**batch())
    assert ranks == ([[4, 4]] * 2 if has_vendor_products(torch.bfloat16) else [[4, 0, 4], [0]] * 2 + [[0]])
    assert ("5 linears without adapters" in str(report)) != has_vendor_products(torch.bfloat16)


def test_a_few_rows_are_left_to_the_module(slow, ranks):
    model = adapted()
    apply_kernels(model)
    ranks.clear()
    model(input_ids=batch()["input_ids"][:1, :7])
    assert ranks == [[4, 4]] * 2


def test_the_report_says_so_and_counts_no_adapted_module_more(slow):
    report = apply_kernels(adapted(torch.bfloat16))
    assert len(report.entries) == len(report.fast) == 4
    assert str(report).splitlines() == [
        "4 of 4 adapted modules run on the kernels, in 2 calls a forward pass",
        "  2 gated MLPs without adapters run on the operator as well",
        "  5 linears without adapters run on the operator as well: this processor has no products in bfloat16",
    ]


def test_restore_is_bit_identical(slow):
    model = adapted(torch.bfloat16)
    before = model(**batch()).logits
    apply_kernels(model)
    restore(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(**batch()).logits, before)


def test_one_that_is_trained_in_full_computes_its_own_gradient(slow, ranks):
    model = adapted(modules_to_save=["o_proj"])
    _, expected = gradients(model)
    apply_kernels(model)
    ranks.clear()
    _, given = gradients(model)
    assert ranks == [[4, 0, 4]] * 2 + [[0]]
    assert any("o_proj" in name for name in given)
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_one_that_is_unfrozen_later_computes_its_own_gradient(slow):
    model = adapted()
    apply_kernels(model)
    head = model.get_output_embeddings()
    head.weight.requires_grad_(True)
    model(**batch()).loss.backward()
    assert head.weight.grad is not None


def test_dropout_of_siblings_does_not_reach_it(slow, ranks):
    model = adapted(lora_dropout=0.5).train()
    apply_kernels(model)
    ranks.clear()
    model(**batch())
    assert ranks == [[4, 4], [0], [0]] * 2 + [[0]]


def test_a_hook_sees_every_call(slow):
    model = adapted()
    apply_kernels(model)
    seen = []
    for name, module in model.named_modules():
        if name.endswith(("k_proj", "o_proj")):
            module.register_forward_hook(lambda module, args, output: seen.append(output.shape[-1]))
    model(**batch())
    assert seen == [16, 32] * 2


def test_a_forward_that_is_already_replaced_stays(slow):
    model = adapted()
    head = model.get_output_embeddings()
    head.forward = lambda hidden: torch.zeros(*hidden.shape[:-1], 64)
    apply_kernels(model)
    assert (model(**batch()).logits == 0).all()


def test_a_weight_of_another_class_multiplies_in_its_own_way(slow, ranks):
    class Quantised(nn.Parameter):
        """A tensor subclass, as quantisation libraries put into a linear."""

    model = adapted()
    head = model.get_output_embeddings()
    head.weight = Quantised(head.weight.detach(), requires_grad=False)
    apply_kernels(model)
    assert "forward" not in head.__dict__
    ranks.clear()
    model(**batch())
    assert ranks == [[4, 0, 4], [0]] * 2


def test_autocast(slow, ranks):
    model = adapted(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch()).logits
        apply_kernels(model)
        ranks.clear()
        given = model(**batch()).logits
    # The MLP operator leaves autocast to its parts.
    assert ranks == [[4, 0, 4], [0], [0, 0], [0]] * 2 + [[0]]
    assert given.dtype == expected.dtype
    torch.testing.assert_close(given, expected, rtol=5e-2, atol=2e-2)


def test_compiles_as_one_graph(slow):
    model = adapted()
    apply_kernels(model)
    loss, expected = gradients(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled_loss, given = gradients(compiled)
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(in_one(given), in_one(expected), rtol=1e-4, atol=1e-5)
