import dataclasses

import pytest

from benchmarks import family_speed


@pytest.mark.parametrize("name", ["Phi-3.5-mini", "Mixtral-8x7B"])
def test_a_narrow_model_goes_through_every_arm(monkeypatch, name):
    monkeypatch.setattr(family_speed, "TOKENS", 16)
    size = family_speed.SIZES[name]
    narrow = dataclasses.replace(size, hidden=64, ffn=96, heads=4, key_heads=2, vocabulary=512, layers=2)
    row = family_speed.measure(narrow, steps=2)
    assert len(row["published_layers"]) == narrow.layers // 2
    assert set(row["arms"]) == {f"{who} {plan}" for who, plan in family_speed.ARMS}
    assert "PEFT's own path" not in row["report"]
    assert family_speed.row_of(name, row).startswith(f"| {name} | {narrow.layers} |")
