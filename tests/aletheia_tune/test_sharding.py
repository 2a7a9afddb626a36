"""Models whose parameters FSDP2 holds in shards, in a process group of this one process: what runs, what is refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import aletheia_kernels
from aletheia_tune.errors import UserError
from aletheia_tune.kernels import use_kernels
from aletheia_tune.layers import find_layers
from aletheia_tune.patch import apply_kernels
from aletheia_tune.plan import Plan, uniform_plan
from aletheia_tune.probe import probe
from aletheia_tune.processes import plan_of_first, scores_of_all
from aletheia_tune.sampled_depth import sampled_depth
from aletheia_tune.sharding import is_sharded, laid_out_like, whole
from aletheia_tune.train import fine_tune
from aletheia_tune.training_config import TrainConfig
from aletheia_tune.whole_checkpoint import load_optimizer, save_checkpoint

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def bare() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2))


def adapted(rank: int = 3) -> PeftModel:
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(bare(), config).train()


def shard(model: nn.Module) -> nn.Module:
    for layer in find_layers(model).layers:
        fully_shard(layer)
    return fully_shard(model)


def gradients(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def agree(given: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    torch.testing.assert_close(given[0], expected[0])
    assert given[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(given[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_sharded_layers_run_on_the_operators(alone, monkeypatch):
    plain, sharded = adapted(), adapted()
    expected = gradients(plain)
    seen: list[str] = []
    for name in ("lora_group", "lora_gated_mlp"):
        operator = getattr(aletheia_kernels, name)

        def counted(*arguments, _name=name, _operator=operator, **named):
            seen.append(_name)
            return _operator(*arguments, **named)

        monkeypatch.setattr(aletheia_kernels, name, counted)
    with use_kernels(sharded) as kernels:
        assert kernels.head.active
        shard(sharded)
        assert all(is_sharded(parameter) for parameter in sharded.parameters())
        seen.clear()
        agree(gradients(sharded), expected)
    # q, k, v in one call and o in another; the MLP is one.
    assert sorted(seen) == ["lora_gated_mlp"] * 2 + ["lora_group"] * 4


def test_siblings_sharded_by_themselves_run_by_themselves(alone):
    expected = gradients(adapted())
    model = adapted()
    with use_kernels(model):
        for layer in find_layers(model).layers:
            fully_shard(layer.self_attn.k_proj)
            fully_shard(layer.mlp.up_proj)
        agree(gradients(shard(model)), expected)


def test_what_looks_at_a_models_parts_refuses_one_that_is_sharded(alone):
    model = shard(adapted())
    with pytest.raises(UserError, match=r"embed_tokens.* is sharded: .*before fully_shard"):
        apply_kernels(model)
    with pytest.raises(UserError, match=r"before fully_shard"):
        probe(shard(bare()), [{"input_ids": IDS, "labels": IDS}])
    agree(gradients(model), gradients(adapted()))  # neither touched it


def test_a_head_that_is_gone_by_the_time_of_the_loss_says_so(alone):
    model = adapted()
    with use_kernels(model):
        fully_shard(model.get_base_model().lm_head)
        with pytest.raises(UserError, match=r"reshard_after_forward=False"):
            gradients(shard(model))


def test_a_head_that_is_kept_until_the_loss_runs_on_labelled_rows(alone):
    """Accelerate's layout: the embeddings by themselves, the last norm and the head together."""
    expected = gradients(adapted())
    model = adapted()
    with use_kernels(model) as kernels:
        assert kernels.head.active
        bare_model = model.get_base_model()
        fully_shard(bare_model.model.embed_tokens)
        fully_shard([bare_model.model.norm, bare_model.lm_head], reshard_after_forward=False)
        agree(gradients(shard(model)), expected)


def trained(model: PeftModel, steps: int, optimizer: torch.optim.Optimizer | None = None):
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        gradients(model)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("layouts", [(False, True), (True, False), (False, False)])
def test_training_goes_on_in_another_layout(layouts, alone, tmp_path):
    first, second = (shard if sharded else lambda model: model for sharded in layouts)
    reference = adapted()
    trained(reference, 5)
    before = first(adapted())
    save_checkpoint(before, trained(before, 3), tmp_path / "checkpoint")
    after = second(PeftModel.from_pretrained(bare(), tmp_path / "checkpoint", is_trainable=True).train())
    optimizer = torch.optim.AdamW([p for p in after.parameters() if p.requires_grad], lr=1e-2)
    load_optimizer(after, optimizer, tmp_path / "checkpoint")
    trained(after, 2, optimizer)
    expected = {name: p for name, p in reference.named_parameters() if p.requires_grad}
    got = {name: whole(p.detach()) for name, p in after.named_parameters() if p.requires_grad}
    assert got.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(got[name], parameter.detach(), rtol=1e-4, atol=1e-5, msg=name)


def lower_layer(model: PeftModel) -> list[nn.Parameter]:
    return list(find_layers(model).layers[0].parameters())


def all_a(model: PeftModel) -> list[nn.Parameter]:
    return [parameter for name, parameter in model.named_parameters() if "lora_A" in name]


@pytest.mark.parametrize("frozen", [lower_layer, all_a])
@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_frozen_at_the_moment_is_in_the_checkpoint(frozen, sharded, alone, tmp_path):
    reference = adapted()
    trained(reference, 5)
    before = shard(adapted()) if sharded else adapted()
    optimizer = trained(before, 3)
    for parameter in frozen(before):
        parameter.requires_grad_(False)
    save_checkpoint(before, optimizer, tmp_path / "checkpoint")
    after = PeftModel.from_pretrained(bare(), tmp_path / "checkpoint", is_trainable=True).train()
    optimizer = trained(after, 0)
    load_optimizer(after, optimizer, tmp_path / "checkpoint")
    assert len(optimizer.state) == len([p for p in after.parameters() if p.requires_grad])
    trained(after, 2, optimizer)
    expected = dict(reference.named_parameters())
    for name, parameter in after.named_parameters():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_depth_drawn_leaves_no_adapter_out(tmp_path):
    model = adapted()
    optimizer = trained(model, 1)
    with sampled_depth(model, {0: 1, 1: 1}, seed=0) as depth:
        while depth.draw() == 0:
            pass
        save_checkpoint(model, optimizer, tmp_path / "checkpoint")
    after = PeftModel.from_pretrained(bare(), tmp_path / "checkpoint")
    expected = dict(model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in after.named_parameters())


def test_what_is_trained_in_full_is_in_the_checkpoint_though_it_is_frozen(tmp_path):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model = get_peft_model(bare(), config)
    optimizer = trained(model, 1)
    model.requires_grad_(False)
    save_checkpoint(model, optimizer, tmp_path / "checkpoint")
    after = PeftModel.from_pretrained(bare(), tmp_path / "checkpoint")
    expected = dict(model.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in after.named_parameters())
    assert not torch.equal(after.lm_head.weight, bare().lm_head.weight)


def two_adapters() -> PeftModel:
    """The adapter of `adapted` under another name, active, and one that is not."""
    model = adapted()
    config = model.peft_config["default"]
    given = {
        name.replace(".default", ".math"): parameter.detach().clone()
        for name, parameter in model.named_parameters()
    }
    model = get_peft_model(bare(), config, adapter_name="math")
    model.load_state_dict(given)
    model.add_adapter("default", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model.train()


def test_an_adapter_of_another_name_reads_back(tmp_path):
    reference = adapted()
    trained(reference, 5)
    before = two_adapters()
    # The optimizer knows the other adapter as well, which is trained at other times.
    optimizer = torch.optim.AdamW([p for n, p in before.named_parameters() if "lora_" in n], lr=1e-2)
    before.set_adapter("default")
    trained(before, 1, optimizer)
    before.set_adapter("math")
    before.zero_grad()
    trained(before, 3, optimizer)
    save_checkpoint(before, optimizer, tmp_path / "checkpoint")
    for name in ("default", "text"):
        after = PeftModel.from_pretrained(
            bare(), tmp_path / "checkpoint", adapter_name=name, is_trainable=True
        ).train()
        optimizer = trained(after, 0)
        load_optimizer(after, optimizer, tmp_path / "checkpoint")
        trained(after, 2, optimizer)
        got = {n.replace(f".{name}", ".default"): p for n, p in after.named_parameters()}
        for n, parameter in reference.named_parameters():
            torch.testing.assert_close(got[n], parameter, rtol=1e-4, atol=1e-5, msg=n)


def test_a_checkpoint_is_of_one_adapter(tmp_path):
    model = two_adapters()
    optimizer = trained(model, 1)
    model.base_model.set_adapter(["math", "default"])
    with pytest.raises(UserError, match="active are math, default: choose one"):
        save_checkpoint(model, optimizer, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    model = adapted()
    save_checkpoint(model, trained(model, 1), tmp_path / "checkpoint")
    with pytest.raises(UserError, match="not empty"):
        save_checkpoint(model, trained(model, 1), tmp_path / "checkpoint")
    with pytest.raises(UserError, match="cannot read"):
        load_optimizer(model, trained(model, 0), tmp_path)
    wider = adapted(rank=5)
    with pytest.raises(UserError, match=r"is \[3, \d+\], the adapter \[5, \d+\]"):
        load_optimizer(wider, trained(wider, 0), tmp_path / "checkpoint")
    fewer = get_peft_model(bare(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="is not trained here"):
        load_optimizer(fewer, trained(fewer, 0), tmp_path / "checkpoint")
    optimizer = trained(model, 1)
    next(iter(optimizer.state.values()))["calls"] = 1
    with pytest.raises(UserError, match="keeps calls, which is no tensor"):
        save_checkpoint(model, optimizer, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_tensor_is_cut_as_another_is(alone):
    layer = fully_shard(nn.Linear(4, 3, bias=False))
    value = torch.arange(12.0).view(3, 4)
    cut = laid_out_like(value, layer.weight)
    assert is_sharded(cut)
    assert cut.placements == layer.weight.placements
    torch.testing.assert_close(whole(cut), value)
    assert laid_out_like(value, value) is value


def test_one_process_has_its_own_scores_and_plan(alone):
    scores = probe(bare(), [{"input_ids": IDS, "labels": IDS}])
    assert scores_of_all(scores) == scores
    plan = uniform_plan(bare(), rank=2)
    assert plan_of_first(plan) == plan
    assert isinstance(plan_of_first(plan), Plan)


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_fine_tune_refuses_a_launch_that_shards(variable, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "true")
    model = bare()
    example = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    with pytest.raises(UserError, match=r"whole model in every process.*with_fsdp"):
        fine_tune(model, None, [example], None, uniform_plan(model, rank=2), TrainConfig(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
