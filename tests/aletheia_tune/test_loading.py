"""The shape of a model from its configuration alone is that of the model."""

from __future__ import annotations

import pytest
import torch

from aletheia_tune.errors import UserError
from aletheia_tune.layers import find_layers, linear_modules
from aletheia_tune.loading import load_shape
from benchmarks.family_table import FAMILIES

# With a tower for pictures they are loaded by another class than language models are.
PICTURES = ("LLaVA", "Qwen2.5-VL")
# Built there to translate, which neither of the two classes does.
TRANSLATES = "T5"


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in (*PICTURES, TRANSLATES)])
def test_the_shape_is_that_of_the_model(family, tmp_path):
    model = FAMILIES[family].build()
    model.config.save_pretrained(tmp_path)
    shape = load_shape(tmp_path)
    assert linear_modules(shape) == linear_modules(model)
    assert find_layers(shape).path == find_layers(model).path
    experts = {name: p.shape for name, p in model.named_parameters() if p.dim() == 3}
    assert {name: p.shape for name, p in shape.named_parameters() if p.dim() == 3} == experts
    assert {p.device for p in shape.parameters()} == {torch.device("meta")}


@pytest.mark.parametrize("family", PICTURES)
def test_a_model_of_pictures_is_refused(family, tmp_path):
    FAMILIES[family].build().config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot load a model"):
        load_shape(tmp_path)
