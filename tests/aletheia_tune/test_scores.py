"""Scores as a value: stored, read back, and refused when the file is not one."""

from __future__ import annotations

import json

import pytest

from aletheia_tune.errors import UserError
from aletheia_tune.scores import ModuleScore, Scores
from aletheia_tune.scores.gradient import GradientScore

SCORES = Scores(
    method="aletheia",
    layers=(1.5, 0.25),
    modules={"model.layers.1.mlp.up_proj": ModuleScore(1, 0.25, 8, 16, "mlp")},
    layer_path="model.layers",
    meta={"batches": 2, "stability": None},
)


def changed(**fields) -> str:
    return json.dumps({**json.loads(SCORES.to_json()), **fields})


def test_round_trip():
    assert Scores.from_json(SCORES.to_json()) == SCORES


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "not a scores file"),
        ('{"format": "aletheia-plan", "version": 1}', "not a scores file"),
        (changed(version=2), "version 2 is not known"),
        (changed(layers=None), "missing or broken"),
        (changed(layers=[1.0, "two"]), "missing or broken"),
        (changed(layers=[1.0, float("nan")]), "missing or broken"),
        (changed(layers=[True, 1.0]), "missing or broken"),
        (changed(method=3), "missing or broken"),
        (changed(modules={"a": {"layer": 0}}), "missing or broken"),
        (changed(layers=[1.0]), "stands in a layer that has no score"),
    ],
)
def test_a_foreign_or_broken_file_is_an_error_of_one_line(text, reason):
    with pytest.raises(UserError, match=reason) as caught:
        Scores.from_json(text)
    assert "\n" not in str(caught.value)


def test_gradient_score_sums_norms_over_parameters_and_batches():
    score = GradientScore({"a": 0, "b": 0, "c": 1}, 2)
    score.add_batch({"a": 4.0, "b": 9.0, "c": 1.0}, {"a": 0.4, "b": 1.2})
    score.add_batch({"a": 16.0}, {"a": 1.6})
    assert score.by_layer == (2.0 + 3.0 + 4.0, 1.0)
    assert score.by_parameter == {"a": 6.0, "b": 3.0, "c": 1.0}
    # d‖g‖ = d(‖g‖²) / 2‖g‖: 0.1 + 0.2 added within the first batch, then 0.2 of the second in quadrature.
    assert score.standard_error == (pytest.approx((0.3**2 + 0.2**2) ** 0.5), 0.0)
    assert score.stability == pytest.approx(1.0)
