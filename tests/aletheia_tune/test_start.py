"""A start from the gradient: the space that A spans, against a float64 SVD of the gradient itself."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from aletheia_kernels import linear_cross_entropy
from aletheia_tune import head
from aletheia_tune.data import batches, load_examples
from aletheia_tune.errors import NonFiniteLoss, UserError
from aletheia_tune.loading import load_model
from aletheia_tune.plan import ModulePlan, Plan, uniform_plan
from aletheia_tune.start import gradient_start

RANK = 4


def adapted(model, rank: int = RANK) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(model, uniform_plan(model, rank=rank).to_lora_config(model))


@pytest.fixture
def chosen(tiny_model_dir, train_file) -> list[dict[str, Tensor]]:
    _, tokenizer = load_model(tiny_model_dir)
    return batches(load_examples(train_file, tokenizer), 4, tokenizer.pad_token_id, seed=0, count=3)


@pytest.fixture
def started(tiny_model_dir, chosen) -> PeftModel:
    model = adapted(load_model(tiny_model_dir, "float32")[0])
    gradient_start(model, chosen)
    return model


def true_gradients(model, given) -> dict[str, Tensor]:
    """∂(sum of the batches' losses)/∂W [out, in] by autograd in float64, by module name."""
    model = model.double().train()
    for batch in given:
        model(**batch).loss.backward()
    return {
        name.removesuffix(".weight"): p.grad.T if "c_" in name else p.grad
        for name, p in model.named_parameters()
        if p.dim() == 2
    }


def factors(model: PeftModel) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, in] and B [out, r] of every adapted module."""
    return {
        name: (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }


def share_of_best(gradient: Tensor, a: Tensor) -> float:
    """‖G P‖² for P the projection on A's rows, over that of the best projection of that rank."""
    basis = torch.linalg.qr(a.double().T).Q
    best = torch.linalg.svdvals(gradient)[: a.shape[0]].square().sum()
    return float((gradient @ basis).square().sum() / best)


def test_a_spans_the_leading_directions_of_the_gradient(tiny_model_dir, chosen, started):
    gradients = true_gradients(load_model(tiny_model_dir, "float32")[0], chosen)
    shares = {name: share_of_best(gradients[name], a) for name, (a, _) in factors(started).items()}
    assert len(shares) == 4 * 7
    assert min(shares.values()) >= 0.95
    assert max(shares.values()) <= 1 + 1e-6
    unguided = adapted(load_model(tiny_model_dir, "float32")[0])
    assert max(share_of_best(gradients[name], a) for name, (a, _) in factors(unguided).items()) < 0.8


def test_a_is_orthogonal_at_the_scale_of_pefts_own_and_b_is_zero(started):
    for a, b in factors(started).values():
        torch.testing.assert_close(a @ a.T, torch.eye(RANK) / 3, atol=1e-5, rtol=0)
        assert not b.any()
        assert a.dtype == torch.float32


def test_the_function_is_unchanged_and_all_else_is_left_as_it_was(tiny_model_dir, chosen):
    plain, _ = load_model(tiny_model_dir, "float32")
    model = adapted(load_model(tiny_model_dir, "float32")[0])
    model.train()
    for _, module in model.named_modules():
        if hasattr(module, "lora_B"):
            torch.nn.init.ones_(module.lora_B["default"].weight)  # whatever was there
    frozen = next(parameter for name, parameter in model.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    trained = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    gradient_start(model, chosen)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)


def test_the_seed_alone_decides(tiny_model_dir, chosen, started):
    again, other = (adapted(load_model(tiny_model_dir, "float32")[0]) for _ in range(2))
    torch.manual_seed(99)
    gradient_start(again, chosen)
    gradient_start(other, chosen, seed=1)
    for (a, _), (b, _), (c, _) in zip(*(factors(m).values() for m in (started, again, other)), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_logits_are_made_for_labelled_rows_alone(tiny_model_dir, chosen, monkeypatch):
    model = adapted(load_model(tiny_model_dir, "float32")[0])
    rows: list[int] = []

    def counting(hidden: Tensor, *args, **kwargs) -> Tensor:
        rows.append(len(hidden))
        return linear_cross_entropy(hidden, *args, **kwargs)

    monkeypatch.setattr(head, "linear_cross_entropy", counting)
    gradient_start(model, chosen)
    labelled = [int((batch["labels"][:, 1:] != -100).sum()) for batch in chosen]
    assert rows[-len(chosen) :] == labelled
    assert all(count < batch["labels"].numel() for count, batch in zip(labelled, chosen, strict=True))


def test_stock_peft_loads_what_is_saved(tiny_model_dir, started, tmp_path):
    for _, b in factors(started).values():
        b.fill_(0.01)
    started.save_pretrained(tmp_path, save_embedding_layers=False)
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path)
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        assert torch.equal(stock.eval()(input_ids=ids).logits, started.eval()(input_ids=ids).logits)


def test_one_step_on_b_is_the_projected_step_of_full_fine_tuning(tiny_model_dir, chosen, started):
    gradients = true_gradients(load_model(tiny_model_dir, "float32")[0], chosen)
    for batch in chosen:
        started.eval()(**batch).loss.backward()
    for name, module in started.get_base_model().named_modules():
        if hasattr(module, "lora_B"):
            a = module.lora_A["default"].weight.detach().double()
            dw = module.scaling["default"] * module.lora_B["default"].weight.grad.double() @ a
            expected = module.scaling["default"] ** 2 / 3 * gradients[name] @ (3 * a.T @ a)
            torch.testing.assert_close(dw, expected, atol=1e-5 * float(expected.norm()), rtol=1e-3)


def test_conv1d_and_bfloat16():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.1)
    ).to(torch.bfloat16)
    ids = torch.randint(0, 40, (4, 20))
    given = [{"input_ids": ids, "labels": ids}]
    peft_model = adapted(model)
    gradient_start(peft_model, given)
    reference = GPT2LMHeadModel(model.config)
    reference.load_state_dict(
        {
            name.replace(".base_layer", ""): tensor
            for name, tensor in model.state_dict().items()
            if "lora_" not in name
        }
    )
    for module in reference.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = true_gradients(reference, given)
    for name, (a, _) in factors(peft_model).items():
        assert share_of_best(gradients[name], a) >= 0.95, name


def test_what_has_no_gradient_to_start_from(tiny_model_dir, chosen):
    def fresh(rank: int = RANK) -> PeftModel:
        return adapted(load_model(tiny_model_dir, "float32")[0], rank)

    with pytest.raises(UserError, match="at least one batch"):
        gradient_start(fresh(), [])
    with pytest.raises(UserError, match=r"rank 17 of 'model.layers.0.self_attn.k_proj' .* 16 at most"):
        gradient_start(fresh(17), chosen)
    dead = fresh()
    with torch.no_grad():
        dead.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight.zero_()
    with pytest.raises(UserError, match=r"gradient of 'model.layers.1.mlp.gate_proj' is 0"):
        gradient_start(dead, chosen)
    broken = fresh()
    with torch.no_grad():
        broken.get_base_model().model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteLoss, match="the loss is nan before training"):
        gradient_start(broken, chosen)


def test_expert_parameters_are_refused():
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_hidden_layers=1,
            num_local_experts=2,
        )
    )
    plan = Plan({"model.layers.0.mlp.experts.down_proj": ModulePlan(2, 4.0)}, 1, "model.layers")
    peft_model = get_peft_model(model, plan.to_lora_config(model))
    with pytest.raises(UserError, match=r"linears only, not 'model.layers.0.mlp.experts"):
        gradient_start(peft_model, [{}])
