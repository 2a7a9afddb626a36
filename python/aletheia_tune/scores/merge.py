"""Scores of several probes of one model, each over batches of its own, as those of one probe over all the batches.

What is a sum over batches (the published score, Fisher's trace) is added up; what is a mean over batches (saliency)
or over tokens (activation norms) is averaged with those weights. Ratios of sums and what compares all examples with
each other (energy, hybrid, CKA) cannot be had from the parts' scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from aletheia_tune.errors import UserError
from aletheia_tune.scores import Scores

_SUMS = ("aletheia", "fisher")
_MEANS = {"saliency": "batches", "activation": "tokens"}
_COUNTS = ("batches", "tokens", "labelled_tokens")


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """One `Scores` of several of one model and method.

    In ``meta`` counts are added up, ``loss`` is the mean over all batches, ``seconds`` and the memory are those of the
    part with the most, and ``stability`` is the mean of the parts', as each knows its own batches alone.

    Raises:
        UserError: no parts, parts of different models or methods, or a method that cannot be merged.
    """
    if not parts:
        raise UserError("scores to merge: there are none")
    first = parts[0]
    for other in parts[1:]:
        if (other.method, other.layer_path, len(other.layers), other.modules.keys()) != (
            first.method,
            first.layer_path,
            len(first.layers),
            first.modules.keys(),
        ):
            raise UserError(
                "scores to merge are of different models or methods: probe the same model in each"
            )
    if first.method in _SUMS:
        weights = [1.0] * len(parts)
    elif first.method in _MEANS:
        counts = [float(part.meta[_MEANS[first.method]]) for part in parts]
        weights = [count / math.fsum(counts) for count in counts]
    else:
        raise UserError(
            f"scores of method {first.method!r} cannot be merged: probe all batches in one process, "
            f"or use one of {', '.join((*_SUMS, *_MEANS))}"
        )
    return replace(
        first,
        layers=tuple(_weighted(weights, values) for values in zip(*(p.layers for p in parts), strict=True)),
        modules={
            name: replace(module, score=_weighted(weights, [part.modules[name].score for part in parts]))
            for name, module in first.modules.items()
        },
        meta=_meta([part.meta for part in parts]),
    )


def _weighted(weights: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(weight * value for weight, value in zip(weights, values, strict=True))


def _meta(metas: Sequence[dict[str, Any]]) -> dict[str, Any]:
    merged = dict(metas[0])
    for count in _COUNTS:
        merged[count] = sum(meta[count] for meta in metas)
    merged["loss"] = math.fsum(meta["loss"] * meta["batches"] for meta in metas) / merged["batches"]
    for most in ("seconds", "peak_memory_bytes"):
        merged[most] = max(meta[most] for meta in metas)
    known = [meta["stability"] for meta in metas if meta["stability"] is not None]
    merged["stability"] = math.fsum(known) / len(known) if known else None
    if "loss_scale" in merged:
        merged["loss_scale"] = min(meta["loss_scale"] for meta in metas)
    if "standard_error" in merged:
        merged["standard_error"] = [
            math.hypot(*errors) for errors in zip(*(meta["standard_error"] for meta in metas), strict=True)
        ]
    if "experts" in merged:
        merged["experts"] = {
            name: [math.fsum(sums) for sums in zip(*(meta["experts"][name] for meta in metas), strict=True)]
            for name in merged["experts"]
        }
    return merged
