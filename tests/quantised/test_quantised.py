"""LoRA on quantised weights: what PEFT computes, the dequantised weight never kept, the probe and the caches right."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torchao.quantization as torchao
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TorchAoConfig,
)

import aletheia_kernels
from aletheia_tune import quantised
from aletheia_tune.cost import Batch, ModelShape, TimedPlan, timed_plans, uniform_of
from aletheia_tune.data import load_examples
from aletheia_tune.kernels import use_kernels
from aletheia_tune.layers import linear_modules
from aletheia_tune.loading import load_model
from aletheia_tune.patch import apply_kernels, restore
from aletheia_tune.plan import uniform_plan
from aletheia_tune.prefix import cut_prefix
from aletheia_tune.prefix_cache import cache_prefix
from aletheia_tune.probe import probe_all
from aletheia_tune.start import gradient_start
from aletheia_tune.train import fine_tune
from aletheia_tune.training_config import TrainConfig

VOCABULARY, HIDDEN = 64, 64
UPPER = r".*layers\.1\..*_proj"
SCHEMES = {
    "nf4": lambda: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4 twice": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": lambda: TorchAoConfig(torchao.Int8WeightOnlyConfig()),
    "torchao int4": lambda: TorchAoConfig(
        torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=torchao.PerGroup(32))
    ),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def load(directory):
    def build(scheme: str | None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        options = {} if scheme is None else {"quantization_config": SCHEMES[scheme]()}
        return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)

    return build


@pytest.fixture(params=SCHEMES)
def scheme(request) -> str:
    return request.param


def adapted(model: PreTrainedModel, **options) -> PeftModel:
    torch.manual_seed(1)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | options
    return get_peft_model(model, LoraConfig(**settings)).train()


def ids(seed: int = 1, rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def dequantised_twin(model: PreTrainedModel, plain: PreTrainedModel) -> PreTrainedModel:
    """A plain model with the quantised model's weights, dequantised."""
    for name, module in model.named_modules():
        scheme = quantised.scheme_of(module)
        if scheme is not None:
            with torch.no_grad():
                plain.get_submodule(name).weight.copy_(scheme.dequantised(module, torch.float32))
    return plain


def steps(model: PeftModel, count: int = 5) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of AdamW steps and the first step's gradients."""
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    losses, gradients = [], {}
    for step in range(count):
        optimizer.zero_grad()
        loss = model(input_ids=ids(step), labels=ids(step)).loss
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in adapters.items()}
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many projections each call of an operator computed."""
    seen: list[int] = []
    for name in ("lora_group", "lora_gated_mlp"):
        original = getattr(aletheia_kernels, name)

        def counting(x, weights, *args, _original=original, **kwargs):
            seen.append(len(weights))
            return _original(x, weights, *args, **kwargs)

        monkeypatch.setattr(aletheia_kernels, name, counting)
    return seen


@pytest.mark.parametrize("backend", ["", "reference"])
def test_the_losses_and_gradients_of_peft(load, scheme, backend, calls, monkeypatch):
    model = adapted(load(scheme))
    twin = copy.deepcopy(model)
    expected_losses, expected = steps(twin)
    report = apply_kernels(model, strict=True)
    assert len(report.fast) == 14
    calls.clear()
    if backend:
        monkeypatch.setenv("ALETHEIA_BACKEND", backend)
    losses, gradients = steps(model)
    assert calls == [3, 1, 3] * 2 * 5
    assert losses[0] != losses[-1]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def saved_bytes(model: PeftModel) -> int:
    """Bytes of the distinct storages that autograd saves in a forward pass, those of parameters left out."""
    own = {
        tensor.untyped_storage().data_ptr()
        for module in model.modules()
        for tensor in (*quantised.stored_parameters(module).values(), *module.buffers(recurse=False))
    }
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids(rows=1, length=3), labels=ids(rows=1, length=3)).loss
    loss.backward()
    return sum(saved.values())


def test_no_dequantised_weight_is_saved(load, scheme):
    """With three tokens a weight outweighs all activations of its layer, so that one kept would show."""
    model = adapted(load(scheme))
    apply_kernels(model, strict=True)
    plain = adapted(dequantised_twin(load(scheme), load(None)))
    apply_kernels(plain, strict=True)
    # On plain weights the operators save activations alone.
    assert saved_bytes(model) == saved_bytes(plain)


def test_only_one_module_s_siblings_are_dequantised_at_a_time(load, scheme, monkeypatch):
    model = adapted(load(scheme))
    apply_kernels(model, strict=True)
    alive: list[weakref.ref] = []
    most = 0
    kind = type(quantised.scheme_of(model.base_model.model.model.layers[0].mlp.up_proj.base_layer))
    original = kind.dequantised

    def counting(self, base, dtype):
        nonlocal most
        made = original(self, base, dtype)
        alive.append(weakref.ref(made))
        most = max(most, sum(reference() is not None for reference in alive))
        return made

    monkeypatch.setattr(kind, "dequantised", counting)
    loss = model(input_ids=ids(), labels=ids()).loss
    assert len(alive) == 14
    gc.collect()
    assert not any(reference() is not None for reference in alive)
    loss.backward()
    assert len(alive) == 28
    assert most == 3
    assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(load, reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = adapted(load("nf4"))
        apply_kernels(model, strict=True)
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(input_ids=ids(), labels=ids()).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_a_compiled_graph_holds_the_library_s_own_product(load, calls):
    """Ours would be traced with the dequantised weight, which the graph would keep."""
    model = adapted(load("nf4"))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = torch.randn(5, HIDDEN)
    expected = layer(x)
    apply_kernels(model, strict=True)
    calls.clear()
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x), expected)
    assert calls == []
    torch.testing.assert_close(layer(x), expected)
    assert calls == [2]


def test_another_compute_dtype_than_the_input_s(load, calls):
    """bitsandbytes multiplies in float32 unless told otherwise, and hands on what it was given."""
    model = adapted(load("nf4", torch.bfloat16))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, HIDDEN, dtype=torch.bfloat16)
    expected = layer(x)
    apply_kernels(model, strict=True)
    calls.clear()
    y = layer(x)
    assert calls == [3]
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-7)


def test_eight_bits_outside_training_are_the_library_s(load, calls):
    """There it rounds its input to 8 bits as well."""
    model = adapted(load("8 bits")).eval()
    expected = model(input_ids=ids()).logits
    apply_kernels(model, strict=True)
    calls.clear()
    assert torch.equal(model(input_ids=ids()).logits, expected)
    assert calls == []


def test_restored_bit_for_bit_and_saved_as_peft_saves(load, scheme, tmp_path):
    model = adapted(load(scheme)).eval()
    with quantised.kept_layout(model):  # or bitsandbytes would change what it saves
        before = model(input_ids=ids()).logits
        model.save_pretrained(tmp_path / "before")
        apply_kernels(model, strict=True)
        model(input_ids=ids())
        model.save_pretrained(tmp_path / "after")
        restore(model)
        assert torch.equal(model(input_ids=ids()).logits, before)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_an_evaluation_in_between_leaves_the_layout(load):
    """Where bitsandbytes lays weights out anew for its inference, training ends: the input has no gradient any more."""
    model = adapted(load("nf4"), target_modules=["q_proj"])
    linears = [module for module in model.modules() if quantised.scheme_of(module) is not None]
    for linear in linears:
        linear.support_avx512bf16_for_cpu = True
    with use_kernels(model), torch.no_grad():
        model.eval()(input_ids=ids())
    assert linears
    assert not any(getattr(linear.weight.quant_state, "packing_format_for_cpu", False) for linear in linears)
    assert all(linear.support_avx512bf16_for_cpu for linear in linears)


def test_what_multiplies_by_more_than_the_weight_stays_with_peft(load):
    rounding = load(None)
    torchao.quantize_(rounding.model.layers, torchao.Int8DynamicActivationInt8WeightConfig())
    report = apply_kernels(adapted(rounding))
    assert not report.fast
    assert {entry.reason for entry in report.entries} == {
        "its base layer multiplies by more than a dequantised weight (torchao Int8Tensor)"
    }
    report = apply_kernels(adapted(load("nf4"), use_dora=True))
    assert {entry.reason for entry in report.entries} == {"the adapter is a DoRA on a quantised weight"}


def test_the_probe_scores_the_dequantised_model(load, scheme):
    """Up to the dequantised weight the two models are one function, so their gradients are."""
    model = load(scheme)
    plain = dequantised_twin(load(scheme), load(None))
    batches = [{"input_ids": ids(seed), "labels": ids(seed)} for seed in range(2)]
    methods = ("aletheia", "saliency", "energy", "activation")
    made, expected = (probe_all(each, batches, methods, rank=4) for each in (model, plain))
    for method in methods:
        assert made[method].meta["dtype"] == "float32"
        torch.testing.assert_close(made[method].layers, expected[method].layers, rtol=1e-4, atol=0)
        assert made[method].modules.keys() == expected[method].modules.keys()
        for name, module in expected[method].modules.items():
            assert made[method].modules[name].score == pytest.approx(module.score, rel=1e-4), (method, name)


def test_plans_and_costs_know_the_logical_shapes(load, scheme):
    model, plain = load(scheme), load(None)
    assert linear_modules(model) == linear_modules(plain)
    shape, of_plain = ModelShape.of(model), ModelShape.of(plain)
    assert shape.modules == of_plain.modules
    linears = sum(each.in_features * each.out_features for each in linear_modules(plain))
    bits = 4 if scheme.startswith("nf4") else 8
    saved = of_plain.weight_bytes - shape.weight_bytes
    assert 0.7 * (32 - bits) / 8 * linears < saved < (32 - bits) / 8 * linears
    with timed_plans(model, [uniform_of(shape, 4)], Batch(1, 8)) as (timed,):
        assert isinstance(timed, TimedPlan)
        assert timed.step().seconds > 0
        assert 0 < timed.kept_bytes() < 4 * linears


def test_a_start_from_the_gradient(load, scheme):
    plain = dequantised_twin(load(scheme), load(None))
    batch = {"input_ids": ids(), "labels": ids()}
    starts = []
    for model in (load(scheme), plain):
        peft = get_peft_model(model, uniform_plan(model, rank=4).to_lora_config(model))
        gradient_start(peft, [batch])
        starts.append([p.detach().clone() for n, p in peft.named_parameters() if "lora_A" in n])
    if scheme != "8 bits":  # which rounds its input in evaluation mode
        for made, expected in zip(*starts, strict=True):
            torch.testing.assert_close(made.T @ made, expected.T @ expected, rtol=1e-3, atol=1e-4)
    assert all(bool(each.isfinite().all()) for each in starts[0])


def cached_losses(model: PeftModel, directory) -> tuple[list[float], int, str]:
    cut = cut_prefix(model)
    apply_kernels(model)
    losses = []
    with cache_prefix(model, cut, directory) as cache:
        for _ in range(2):
            with torch.no_grad():
                losses.append(model(input_ids=ids(), labels=ids()).loss.item())
        return losses, getattr(cache, "hits", 0), cache.reason


@pytest.mark.parametrize("scheme", ["nf4", "nf4 twice", "torchao int8", "torchao int4"])
def test_a_cached_prefix_is_that_of_its_quantised_bytes(load, scheme, tmp_path):
    model = adapted(load(scheme), target_modules=UPPER)
    losses, hits, reason = cached_losses(model, tmp_path)
    assert (reason, hits) == ("", 2)
    assert losses[0] == losses[1]
    # Other scales alone make another prefix: no entry is read.
    other = load(scheme)
    base = other.model.layers[0].mlp.up_proj
    parts = quantised.scheme_of(base).parts(base)
    with torch.no_grad():
        parts[
            "scale" if "scale" in parts else "nested_absmax" if "nested_absmax" in parts else "absmax"
        ].mul_(2)
    _, hits, _ = cached_losses(adapted(other, target_modules=UPPER), tmp_path)
    assert hits == 2
    assert len(list(tmp_path.glob("*/data"))) == 2


def test_no_cached_prefix_of_a_layer_that_mixes_examples(load, tmp_path):
    _, hits, reason = cached_losses(adapted(load("8 bits"), target_modules=UPPER), tmp_path)
    assert hits == 0
    assert reason == (
        "model.layers.0.self_attn.q_proj in the prefix is a Linear8bitLt, whose rounding mixes examples"
    )


def test_a_directory_that_was_saved_quantised_is_loaded_and_trained(
    tiny_model_dir, train_file, eval_file, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(
        tiny_model_dir, dtype=torch.float32, quantization_config=SCHEMES["nf4"]()
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model, tokenizer = load_model(tmp_path / "model", "float32")
    examples, held_out = load_examples(train_file, tokenizer), load_examples(eval_file, tokenizer)
    config = TrainConfig(steps=6, learning_rate=1e-2, warmup=0, dtype="float32", progress=False)
    plan = uniform_plan(model, rank=2)
    result = fine_tune(model, tokenizer, examples, held_out, plan, config, tmp_path / "out")
    assert result.eval_loss_after < result.eval_loss_before
