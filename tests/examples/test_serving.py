"""What servers make of an adapter of unequal ranks, by the rules that docs/serving.md tells, and of one of one rank."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from aletheia_tune.plan import ModulePlan, Plan, uniform_plan

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "one_rank.py"
ALPHAS = {
    "the plan's own": lambda rank: 2.0 * rank,
    "one for all": lambda rank: 8.0,
    "rsLoRA's": lambda rank: 8.0 * math.sqrt(rank),
}


def adapted(model_dir: Path, alpha: str) -> PeftModel:
    """Ranks 1 to 3 in turn, most of them 3; every adapter does something."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    torch.manual_seed(0)
    uniform = uniform_plan(model, rank=3, layers=[1, 3])
    ranks = [1, 2, 3, 3]
    modules = {
        name: ModulePlan(rank := ranks[at % len(ranks)], ALPHAS[alpha](rank))
        for at, name in enumerate(uniform.modules)
    }
    model = get_peft_model(
        model, Plan(modules, uniform.num_layers, uniform.layer_path).to_lora_config(model)
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def added(model: PeftModel) -> dict[str, Tensor]:
    """What PEFT adds to each weight."""
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def served(adapter: Path, server: str) -> dict[str, Tensor]:
    """What a server adds that reads lora_alpha, r and the tensors, and no pattern."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    result = {}
    for key in [key for key in weights if ".lora_A." in key]:
        a, b = weights[key], weights[key.replace(".lora_A.", ".lora_B.")]
        rank = config["r"] if server == "vLLM" else b.shape[1]
        result[key.removesuffix(".lora_A.weight")] = config["lora_alpha"] / rank * b @ a
    return result


def agree(given: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    assert given.keys() == expected.keys()
    return all(torch.allclose(given[name], value, rtol=1e-4, atol=1e-6) for name, value in expected.items())


@pytest.mark.parametrize(
    ("alpha", "right"), [("the plan's own", {"vLLM"}), ("one for all", {"llama.cpp"}), ("rsLoRA's", set())]
)
def test_one_rank_is_served_as_peft_would(alpha, right, tiny_model_dir, tmp_path, monkeypatch):
    model = adapted(tiny_model_dir, alpha)
    expected = added(model)
    model.save_pretrained(tmp_path / "unequal")
    assert {s for s in ("vLLM", "llama.cpp") if agree(served(tmp_path / "unequal", s), expected)} == right

    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, str(tmp_path / "unequal"), str(tmp_path / "equal")])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert all(agree(served(tmp_path / "equal", server), expected) for server in ("vLLM", "llama.cpp"))
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), tmp_path / "equal"
    )
    assert agree(added(loaded), expected)
    config = loaded.peft_config["default"]
    assert (config.r, config.rank_pattern, config.alpha_pattern) == (3, {}, {})


def test_stacked_experts_are_refused(tmp_path, monkeypatch):
    LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]).save_pretrained(
        tmp_path
    )
    save_file({"a": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    monkeypatch.setattr(sys, "argv", [EXAMPLE.name, str(tmp_path), str(tmp_path / "equal")])
    with pytest.raises(SystemExit, match="stacked experts"):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert not (tmp_path / "equal").exists()
