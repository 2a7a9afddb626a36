"""A merged model computes what PEFT computes, needs no PEFT, and is not written where it would be wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from aletheia_tune.errors import UserError
from aletheia_tune.merge import WEIGHTS, merge_adapter
from aletheia_tune.plan import Plan, uniform_plan

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**changes) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **changes))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def mixtral() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


FULL = {
    llama: ("model.layers.1.mlp.down_proj",),
    gpt2: ("transformer.h.1.attn.c_attn",),
    mixtral: ("model.layers.0.self_attn.q_proj",),
}


@pytest.fixture
def store(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., tuple[Path, Path]]:
    """Directories of a model and of an adapter on all its linears and experts that does something."""

    def make(build: Callable[..., nn.Module] = llama, dtype=torch.float32, config=None, **changes):
        torch.manual_seed(0)
        model = build(**changes).to(dtype)
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "model")
        if config is None:
            plan = uniform_plan(model, rank=3, alpha=6)
            modules = {name: module for name, module in plan.modules.items() if name not in FULL[build]}
            config = Plan(modules, plan.num_layers, plan.layer_path, full=FULL[build]).to_lora_config(model)
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.05)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "model", tmp_path / "adapter"

    return make


@pytest.mark.parametrize(
    ("build", "dtype", "tolerance"),
    [
        (llama, torch.float32, 1e-5),
        (llama, torch.bfloat16, 0.05),
        (gpt2, torch.float32, 1e-5),
        (gpt2, torch.bfloat16, 0.05),
        (mixtral, torch.float32, 1e-5),
    ],
)
def test_the_merged_model_is_the_sum_rounded_once(store, tmp_path, build, dtype, tolerance):
    model_dir, adapter_dir = store(build, dtype)
    count = merge_adapter(model_dir, adapter_dir, tmp_path / "merged")
    assert {path.suffix for path in (tmp_path / "merged").iterdir()} == {".json", ".safetensors"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert {parameter.dtype for parameter in merged.parameters()} == {dtype}
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) > 0

    # PEFT's own merge of the same weights in float64 is the definition.
    exact = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    adapted = PeftModel.from_pretrained(exact, adapter_dir)
    expected = adapted.merge_and_unload().state_dict()
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).state_dict()
    given = merged.state_dict()
    assert given.keys() == expected.keys() == base.keys()
    for name, tensor in given.items():
        torch.testing.assert_close(
            tensor.double(), expected[name], rtol=torch.finfo(dtype).eps / 1.9, atol=1e-7, msg=name
        )
    changed = {
        name.rpartition(".")[0] for name, tensor in given.items() if not torch.equal(tensor, base[name])
    }
    owner = {
        f"{n}.{leaf}": n for n, m in merged.named_modules() for leaf, _ in m.named_parameters(recurse=False)
    }
    assert changed == {owner.get(name, name) for name in uniform_plan(merged).modules}
    assert count == len(changed)

    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype), adapter_dir
    )
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        theirs, ours = (model.eval()(input_ids=ids).logits.float() for model in (stock, merged))
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_an_adapted_head_is_merged(store, tmp_path):
    config = LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(0)
    directory, adapter = store(config=config)
    model = AutoModelForCausalLM.from_pretrained(directory)
    ids = torch.arange(12).view(2, 6)
    adapted = PeftModel.from_pretrained(model, adapter)
    adapted.save_pretrained(adapter)  # the base weight of the head besides, as PEFT does by default
    assert any("lm_head.base_layer" in name for name in weights_of(adapter))
    with torch.no_grad():
        expected = adapted(input_ids=ids).logits
        merge_adapter(directory, adapter, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def weights_of(adapter: Path) -> dict[str, torch.Tensor]:
    return load_file(adapter / WEIGHTS)


def without_a_weight(adapter: Path) -> None:
    weights = weights_of(adapter)
    del weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(weights, adapter / WEIGHTS)


def without_the_full_weight(adapter: Path) -> None:
    weights = weights_of(adapter)
    del weights["base_model.model.model.layers.1.mlp.down_proj.weight"]
    save_file(weights, adapter / WEIGHTS)


def with_another_weight(adapter: Path) -> None:
    save_file(
        {**weights_of(adapter), "base_model.model.lm_head.weight": torch.ones(32, 32)}, adapter / WEIGHTS
    )


def of_another_size(adapter: Path) -> None:
    save_file(
        {name: tensor[:, :-1].clone() for name, tensor in weights_of(adapter).items()}, adapter / WEIGHTS
    )


def not_finite(adapter: Path) -> None:
    weights = weights_of(adapter)
    weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(weights, adapter / WEIGHTS)


def not_finite_in_full(adapter: Path) -> None:
    weights = weights_of(adapter)
    weights["base_model.model.model.layers.1.mlp.down_proj.weight"][0, 0] = float("inf")
    save_file(weights, adapter / WEIGHTS)


def pickled(adapter: Path) -> None:
    torch.save(weights_of(adapter), adapter / "adapter_model.bin")
    (adapter / WEIGHTS).unlink()


def cut_short(adapter: Path) -> None:
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:100])


def without_a_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def with_a_broken_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")


def of_a_kind_of_its_own(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "WHO_KNOWS"}))


def missing(adapter: Path) -> None:
    shutil.rmtree(adapter)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (without_a_weight, "does not fit the model: it lacks"),
        (without_the_full_weight, "does not fit the model: it lacks"),
        (with_another_weight, "the model has no place for base_model.model.lm_head.weight"),
        (of_another_size, "does not fit the model"),
        (not_finite, "layers.0.self_attn.q_proj is not finite"),
        (not_finite_in_full, "layers.1.mlp.down_proj is not finite"),
        (pickled, f"has no {WEIGHTS}"),
        (cut_short, f"{WEIGHTS}"),
        (without_a_config, "has no adapter_config.json"),
        (with_a_broken_config, "cannot read the adapter_config.json"),
        (of_a_kind_of_its_own, "cannot read the adapter_config.json"),
        (missing, "has no adapter_config.json"),
    ],
)
def test_what_cannot_be_merged_is_one_line_and_leaves_nothing(store, tmp_path, spoil, says):
    model_dir, adapter_dir = store()
    spoil(adapter_dir)
    with pytest.raises(UserError) as caught:
        merge_adapter(model_dir, adapter_dir, tmp_path / "merged")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path not in (model_dir, adapter_dir)]


def test_an_adapter_of_another_method_is_refused(store, tmp_path):
    other = IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="only LoRA adapters"):
        merge_adapter(*store(config=other), tmp_path / "merged")


def test_a_weight_that_is_another_modules_too_is_refused(store, tmp_path):
    tied = store(config=LoraConfig(r=2, target_modules=["lm_head"]), tie_word_embeddings=True)
    with pytest.raises(UserError, match="lm_head is tied to another module's: merging would change both"):
        merge_adapter(*tied, tmp_path / "merged")


def test_a_directory_that_is_there_stays(store, tmp_path):
    model_dir, adapter_dir = store()
    out = tmp_path / "merged"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="--overwrite"):
        merge_adapter(model_dir, adapter_dir, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    merge_adapter(model_dir, adapter_dir, out, overwrite=True)
    assert (out / "model.safetensors").is_file()
    assert not (out / "mine.txt").exists()
