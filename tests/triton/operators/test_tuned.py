"""Choices are kept a card and version of Triton, added to, and never read from a file that holds something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton

from aletheia_kernels.triton import tuned


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALETHEIA_CACHE", str(tmp_path))


def test_what_was_saved_is_chosen_on_that_card_alone():
    assert tuned.choice("this", "call") is None
    tuned.save("this", {"call": {"BLOCK_M": 64}})
    assert tuned.choice("this", "call") == {"BLOCK_M": 64}
    assert tuned.choice("this", "another") is None
    assert tuned.choice("that", "call") is None


def test_another_compiler_measures_anew(monkeypatch):
    tuned.save("this", {"call": {"BLOCK_M": 64}})
    monkeypatch.setattr(triton, "__version__", "0.0.0")
    assert tuned.choice("this", "call") is None


def test_a_later_measurement_replaces_its_own_key_and_no_other():
    tuned.save("this", {"a": {"n": 1}, "b": {"n": 2}})
    tuned.save("this", {"b": {"n": 3}})
    assert [tuned.choice("this", key) for key in "ab"] == [{"n": 1}, {"n": 3}]


def test_nothing_but_the_file_is_left():
    tuned.save("this", {"a": {}})
    assert [path.name for path in tuned.path("this").parent.iterdir()] == ["this.json"]
    with pytest.raises(TypeError):
        tuned.save("this", {"a": {"n": object()}})
    assert [path.name for path in tuned.path("this").parent.iterdir()] == ["this.json"]
    assert tuned.choice("this", "a") == {}


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 3}'])
def test_a_damaged_file_is_named_and_not_used(text):
    file = tuned.path("this")
    file.parent.mkdir(parents=True)
    file.write_text(text)
    tuned._read.cache_clear()
    with pytest.warns(UserWarning, match="this.json holds no choices"):
        assert tuned.choice("this", "a") is None


@pytest.mark.parametrize("harm", [lambda file: file.write_bytes(b"\xff"), Path.mkdir])
def test_a_file_that_cannot_be_read_is_named_and_not_used(harm):
    file = tuned.path("this")
    file.parent.mkdir(parents=True)
    harm(file)
    tuned._read.cache_clear()
    with pytest.warns(UserWarning, match="this.json cannot be read"):
        assert tuned.choice("this", "a") is None


def test_without_a_card_the_device_is_named():
    assert tuned.card_name(torch.device("cpu")) == "cpu"
    assert tuned.card_name(torch.device("meta")) == "meta"
