"""Scores of parts of the batches, merged, are those of one probe over all of them."""

from __future__ import annotations

import dataclasses

import pytest

from aletheia_tune.errors import UserError
from aletheia_tune.probe import probe_all
from aletheia_tune.scores.merge import merge_scores
from tests.probe_case import build, llama, mixtral, some_batches

METHODS = ("aletheia", "fisher", "saliency", "activation")


@pytest.mark.parametrize("builder", [llama, mixtral])
def test_merged_parts_are_the_whole(builder):
    model = build(builder)
    # Of several lengths, so that a mean over tokens is not one over batches.
    batches = [
        {name: rows[:, : 12 - index] for name, rows in batch.items()}
        for index, batch in enumerate(some_batches(model, 5))
    ]
    whole = probe_all(model, batches, METHODS)
    parts = [probe_all(model, part, METHODS) for part in (batches[:1], batches[1:3], batches[3:])]
    for method in METHODS:
        merged = merge_scores([part[method] for part in parts])
        assert merged.layers == pytest.approx(whole[method].layers, rel=1e-6)
        assert merged.modules.keys() == whole[method].modules.keys()
        for name, module in whole[method].modules.items():
            assert merged.modules[name].score == pytest.approx(module.score, rel=1e-6), (method, name)
        for count in ("batches", "tokens", "labelled_tokens"):
            assert merged.meta[count] == whole[method].meta[count]
        assert merged.meta["loss"] == pytest.approx(whole[method].meta["loss"], rel=1e-6)
        for name, experts in whole[method].meta.get("experts", {}).items():
            assert merged.meta["experts"][name] == pytest.approx(experts, rel=1e-6)


def test_errors_of_estimates_add_up_as_those_of_batches_do():
    model = build(llama)
    parts = [
        probe_all(model, [batch], ("aletheia",), exact=False, seed=seed)["aletheia"]
        for seed, batch in enumerate(some_batches(model))
    ]
    merged = merge_scores(parts).meta["standard_error"]
    for error, first, second in zip(merged, *(part.meta["standard_error"] for part in parts), strict=True):
        assert error == pytest.approx((first**2 + second**2) ** 0.5)
        assert error > max(first, second) > 0


def test_what_cannot_be_merged_is_refused():
    model = build(llama)
    batches = some_batches(model, 3)
    made = probe_all(model, batches, ("aletheia", "energy", "cka"))
    for method in ("energy", "cka"):
        with pytest.raises(UserError, match=f"{method}.*in one process"):
            merge_scores([made[method], made[method]])
    fewer_layers = dataclasses.replace(made["aletheia"], layers=made["aletheia"].layers[:-1])
    with pytest.raises(UserError, match="different models or methods"):
        merge_scores([made["aletheia"], fewer_layers])
    with pytest.raises(UserError, match="there are none"):
        merge_scores([])
