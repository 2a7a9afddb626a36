"""The probe on the Triton backend scores a model as it does on the CPU operators."""

from __future__ import annotations

import pytest
import torch

from aletheia_kernels import triton
from aletheia_kernels.triton import grad_norm
from aletheia_tune.probe import probe


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(1, 50, (2, tokens), generator=generator) for tokens in (20, 35)]
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": i} for i in ids]


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "sketch"])
def test_scores_are_those_of_the_cpu_operators(model, batches, monkeypatch, exact):
    launched = []
    original = grad_norm.launch
    monkeypatch.setattr(
        grad_norm, "launch", lambda kernel, *rest: (launched.append(kernel), original(kernel, *rest))
    )
    ours = probe(model, batches, exact=exact)
    assert launched, "no kernel was launched"
    # There is no head in Triton: the model's own ran, and the scores say why.
    assert "linear_cross_entropy" in ours.meta["head"]

    monkeypatch.setenv("ALETHEIA_BACKEND", "cpu")
    expected = probe(model.cpu(), batches, exact=exact)
    assert expected.meta["head"] is None
    assert ours.meta["loss"] == pytest.approx(expected.meta["loss"], rel=1e-4)
    assert ours.layers == pytest.approx(expected.layers, rel=1e-4)
    assert ours.modules.keys() == expected.modules.keys()
    for name, module in expected.modules.items():
        assert ours.modules[name].score == pytest.approx(module.score, rel=1e-4), name


def test_without_the_interpreter_a_cpu_model_is_refused_in_words(model, batches, monkeypatch):
    monkeypatch.setattr(triton, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="only under TRITON_INTERPRET=1"):
        probe(model.cpu(), batches)
