"""Axolotl's YAML and plugin, without Axolotl: what the keys make of a model through PEFT, and what the hooks do."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import aletheia_kernels

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SETTINGS = yaml.safe_load((EXAMPLES / "axolotl.yml").read_text(encoding="utf-8"))


def test_the_settings_adapt_the_upper_half_and_the_last_mlp_of_twice_the_rank():
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=30, num_attention_heads=2
        )
    )
    # As Axolotl hands them to PEFT.
    config = LoraConfig(
        r=SETTINGS["lora_r"],
        lora_alpha=SETTINGS["lora_alpha"],
        lora_dropout=SETTINGS["lora_dropout"],
        target_modules=SETTINGS["lora_target_modules"],
        layers_to_transform=SETTINGS["peft_layers_to_transform"],
        rank_pattern=SETTINGS["lora_rank_pattern"],
        alpha_pattern=SETTINGS["lora_alpha_pattern"],
    )
    found = {
        name: (module.r["default"], module.scaling["default"])
        for name, module in get_peft_model(model, config).named_modules()
        if hasattr(module, "lora_A")
    }
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in found} == set(range(15, 30))
    assert len(found) == 15 * 7
    assert {name for name, (rank, _) in found.items() if rank == 32} == {
        name for name in found if ".layers.29.mlp." in name
    }
    assert {scaling for _, scaling in found.values()} == {2.0}


@pytest.fixture
def base_plugin(monkeypatch: pytest.MonkeyPatch) -> type:
    """Stands for axolotl.integrations.base.BasePlugin, whose hooks do nothing."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    return base.BasePlugin


def test_the_plugin_puts_training_on_the_operators_and_takes_it_off(
    base_plugin, tiny_model_dir, monkeypatch, capsys
):
    calls = 0
    operator = aletheia_kernels.lora_group

    def counted(*arguments, **named):
        nonlocal calls
        calls += 1
        return operator(*arguments, **named)

    monkeypatch.setattr(aletheia_kernels, "lora_group", counted)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    (plugin_name,) = SETTINGS["plugins"]
    module_name, class_name = plugin_name.rsplit(".", 1)
    plugin = getattr(importlib.import_module(module_name), class_name)()
    monkeypatch.delitem(sys.modules, module_name)
    assert isinstance(plugin, base_plugin)

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(model, config).train()
    ids = torch.tensor([[4, 5, 6, 7, 8]])
    expected = model(input_ids=ids, labels=ids).loss

    plugin.post_trainer_create(None, SimpleNamespace(model=model))
    assert "modules run on the kernels" in capsys.readouterr().out
    loss = model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    during = calls
    assert during >= 4 * 2  # of four layers q, k, v in one call and o in another

    plugin.post_train(None, model)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, expected, rtol=0, atol=0)
    assert calls == during
