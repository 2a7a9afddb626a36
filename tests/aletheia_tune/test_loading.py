"""The shape of a model from its configuration alone is that of the model."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from transformers import AutoTokenizer

from aletheia_tune.classification import in_order_of
from aletheia_tune.errors import UserError
from aletheia_tune.layers import linear_modules
from aletheia_tune.loading import load_model, load_shape
from aletheia_tune.plan import unscored_plan
from benchmarks.family_table import FAMILIES

# With a tower for pictures, or built to translate: neither a language model nor a classifier.
OF_ANOTHER_KIND = ("LLaVA", "Qwen2.5-VL", "T5")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in OF_ANOTHER_KIND])
def test_the_shape_is_that_of_the_model(family, tmp_path):
    model = FAMILIES[family].build()
    model.config.save_pretrained(tmp_path)
    shape = load_shape(tmp_path)
    assert linear_modules(shape) == linear_modules(model)
    experts = {name: p.shape for name, p in model.named_parameters() if p.dim() == 3}
    assert {name: p.shape for name, p in shape.named_parameters() if p.dim() == 3} == experts
    assert {p.device for p in shape.parameters()} == {torch.device("meta")}


@pytest.mark.parametrize("family", OF_ANOTHER_KIND)
def test_a_model_of_another_kind_is_refused(family, tmp_path):
    FAMILIES[family].build().config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no causal language model and no text classifier"):
        load_shape(tmp_path)


def test_a_plan_of_the_shape_is_one_of_the_model_that_is_loaded(tiny_model_dir: Path, tmp_path, capfd):
    loaded, _ = load_model(tiny_model_dir, "float32")
    assert unscored_plan(load_shape(tiny_model_dir)) == unscored_plan(loaded)
    encoder = tmp_path / "encoder"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tf.BertModel(tf.BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    classifier, _ = load_model(encoder, "float32", classes=("no", "yes"))
    capfd.readouterr()
    assert unscored_plan(load_shape(encoder)) == unscored_plan(classifier)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("load", [load_model, load_shape, lambda name: in_order_of(name, ("no", "yes"))])
def test_a_name_is_asked_of_the_hub_and_a_directory_is_not(load, tiny_model_dir, monkeypatch):
    asked: list[str] = []

    def record(name: str, *_: object, **__: object) -> None:
        asked.append(name)
        raise OSError("not here")

    monkeypatch.setattr(tf.utils.hub, "hf_hub_download", record)
    monkeypatch.setattr(tf.utils.hub, "snapshot_download", record)
    load(tiny_model_dir)
    assert asked == []
    with contextlib.suppress(UserError):
        load("owner/model")
    assert set(asked) == {"owner/model"}


@pytest.mark.parametrize("damage", [{"pad_token_id": 999}, {"dtype": ["x"]}])
def test_a_configuration_that_makes_no_model_is_one_line(damage, tiny_model_dir, tmp_path):
    copy = shutil.copytree(tiny_model_dir, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | damage))
    with pytest.raises(UserError, match="cannot load a model from") as caught:
        load_model(copy, "float32")
    assert "\n" not in str(caught.value)
