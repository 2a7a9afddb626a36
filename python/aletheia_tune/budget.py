"""Plans that keep the most score within a time budget: which modules get which rank, and how deep the lowest sits.

What a plan adds to a step is one price a module and rank, and, for the depth of its lowest adapter, the backward pass
through every layer above. For each depth that is a knapsack with one choice of rank a module; as the modules that a
depth allows are those of the depth above and one layer more, one table filled from the top layer down solves it for
all depths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aletheia_tune.cost import Batch, Calibration, check_cached, predict, uniform_of
from aletheia_tune.errors import UserError
from aletheia_tune.number_types import is_whole
from aletheia_tune.plan import ModulePlan, Plan
from aletheia_tune.scores import Scores

# Prices are rounded up to this share of what can be spent on adapters: the plan never exceeds its budget, and 200
# modules lose half a percent of it.
_STEPS = 20_000
# Budgets, predictions and their sums carry rounding errors.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class FrontierPoint:
    """A plan with its predicted step time and its score kept, both as shares of the uniform plan's."""

    cost: float
    score: float
    plan: Plan


def score_kept(plan: Plan, scores: Scores, rank: int) -> float:
    """Share of all modules' score that a plan keeps, 1 for ``rank`` on every module.

    A module of rank ρ counts log2(1 + ρ / rank) of its score: all of it at ``rank``, 0.58 at half, 1.58 at twice of
    it. That a further rank is worth less than the one before is an assumption, not a measurement.
    """
    total = sum(module.score for module in scores.modules.values())
    kept = sum(scores.modules[name].score * _worth(own.rank, rank) for name, own in plan.modules.items())
    return kept / total


def budget_plan(
    scores: Scores,
    calibration: Calibration,
    budget: float = 0.6,
    *,
    rank: int = 16,
    choices: Sequence[int] | None = None,
    batch: Batch | None = None,
    cached: float = 0.0,
    dropout: float = 0.0,
) -> Plan:
    """The plan of highest `score_kept` whose predicted step takes at most ``budget`` of the uniform plan's.

    Args:
        scores: none negative, of modules that the calibration knows.
        calibration: of this machine, for the scored model.
        budget: share of the predicted step time of ``rank`` on every module, without a cache.
        rank: of the uniform plan.
        choices: the ranks a module may get beside none; by default half, once and twice ``rank``. Alpha is 2 · rank.
        batch: by default the calibrated one.
        cached: share of the steps whose layers under the lowest adapter come from a cache, as in `cost.predict`.
        dropout: of the adapters' input.

    Raises:
        UserError: a budget outside (0, 1], or too small for any adapter (saying the least); a rank below 1; a score
            that is negative or not finite; no positive score; a module that the calibration does not know.
    """
    table = _Table(scores, calibration, rank, choices, batch, cached)
    return table.plan(budget, dropout)


def frontier(
    scores: Scores,
    calibration: Calibration,
    points: int = 12,
    *,
    rank: int = 16,
    choices: Sequence[int] | None = None,
    batch: Batch | None = None,
    cached: float = 0.0,
) -> list[FrontierPoint]:
    """The best plan at each of ``points`` budgets, even from the cheapest possible to the uniform plan's time.

    Args:
        points: 2 or more; the others are those of `budget_plan`.

    Raises:
        UserError: as `budget_plan`, and fewer than 2 points.
    """
    if points < 2:
        raise UserError(f"a frontier of {points} points is none: give 2 or more")
    table = _Table(scores, calibration, rank, choices, batch, cached)
    found = []
    for index in range(points):
        budget = table.least + (1 - table.least) * index / (points - 1)
        plan = table.plan(min(budget * (1 + _ROUNDING), 1.0), 0.0)
        found.append(FrontierPoint(table.share(plan), score_kept(plan, scores, rank), plan))
    return found


class _Table:
    """What the plans of every budget have in common: prices, options, and the way to choose among them."""

    def __init__(
        self,
        scores: Scores,
        calibration: Calibration,
        rank: int,
        choices: Sequence[int] | None,
        batch: Batch | None,
        cached: float,
    ) -> None:
        ranks = sorted(set(choices if choices is not None else (max(rank // 2, 1), rank, 2 * rank)))
        for value in (rank, *ranks):
            if not is_whole(value) or value < 1:
                raise UserError(f"rank {value} is not a whole number of 1 or more")
        check_cached(cached)
        _check_scores(scores, calibration)
        self.scores, self.calibration = scores, calibration
        self.rank, self.batch, self.cached = rank, batch, cached
        layers = calibration.shape.num_layers
        self.uniform = predict(uniform_of(calibration.shape, rank), calibration, batch).seconds
        self.backward = calibration.backward_seconds(batch)
        forward = calibration.forward_seconds(batch)
        # What a plan of each depth takes before its first adapter.
        self.base = [
            calibration.fixed_seconds(batch)
            + (1 - cached) * sum(forward[:depth])
            + sum(forward[depth:])
            + sum(self.backward[depth:])
            for depth in range(layers)
        ]
        self.modules = [
            (name, module)
            for depth in reversed(range(layers))
            for name, module in scores.modules.items()
            if module.layer == depth
        ]
        self.options = {
            name: [
                value
                for value in ranks
                if value <= module.in_features + module.out_features and module.score > 0
            ]
            for name, module in self.modules
        }
        alone = {
            name: self.base[module.layer] + calibration.adapter_seconds(name, min(self.options[name]), batch)
            for name, module in self.modules
            if self.options[name]
        }
        if not alone:
            raise UserError(f"no scored module can have a rank of {ranks}: give lower ones")
        self.cheapest = min(alone, key=alone.__getitem__)
        self.least = alone[self.cheapest] / self.uniform

    def share(self, plan: Plan) -> float:
        return predict(plan, self.calibration, self.batch, cached=self.cached).seconds / self.uniform

    def plan(self, budget: float, dropout: float) -> Plan:
        if isinstance(budget, bool) or not 0 < budget <= 1:
            raise UserError(
                f"time budget {budget} is outside (0, 1]: give a share of the uniform plan's step"
            )
        if budget < self.least:
            raise UserError(
                f"time budget {budget:.1%} is too small for any adapter: "
                f"give at least {math.ceil(self.least * 1000) / 10:g}%"
            )
        room = [budget * self.uniform - base for base in self.base]
        # Prices are rounded up in the table, so a plan that fits to the last microsecond may escape it.
        candidates = [
            self._fill(room),
            {self.cheapest: min(self.options[self.cheapest])},
            *self._suffixes(room),
        ]
        ranks = max(candidates, key=self._value)
        plan = Plan(
            {
                name: ModulePlan(ranks[name], 2.0 * ranks[name])
                for name in self.scores.modules
                if name in ranks
            },
            self.calibration.shape.num_layers,
            self.calibration.shape.layer_path,
            dropout=dropout,
        )
        share = self.share(plan)
        plan.meta.update(
            {
                "method": self.scores.method,
                "model": self.scores.meta.get("model"),
                "ranks": "by budget",
                "time_budget": budget,
                "predicted_time": share,
                "score_kept": score_kept(plan, self.scores, self.rank),
                "layer_scores": list(self.scores.layers),
                "probe": self.scores.origin(),
                "layer_prices_ms": self._prices(plan),
                "layer_reasons": self._reasons(plan),
            }
        )
        return plan

    def _value(self, ranks: Mapping[str, int]) -> float:
        return sum(self.scores.modules[name].score * _worth(rank, self.rank) for name, rank in ranks.items())

    def _suffixes(self, room: Sequence[float]) -> Iterator[dict[str, int]]:
        """``rank`` on every module from a layer up, for each layer where that is affordable."""
        ranks: dict[str, int] = {}
        seconds = 0.0
        for depth, group in itertools.groupby(self.modules, key=lambda each: each[1].layer):
            for name, _ in group:
                if self.rank in self.options[name]:
                    ranks[name] = self.rank
                    seconds += self.calibration.adapter_seconds(name, self.rank, self.batch)
            if seconds <= room[depth] + _ROUNDING * self.uniform:
                yield dict(ranks)

    def _fill(self, room: Sequence[float]) -> dict[str, int]:
        """The best ranks over all depths, by what is left in ``room`` for the adapters of each depth."""
        # More than every adapter at its highest rank costs cannot be spent.
        most = sum(
            self.calibration.adapter_seconds(name, max(ranks), self.batch)
            for name, ranks in self.options.items()
            if ranks
        )
        unit = max(min(max(room), most), _ROUNDING * self.uniform) / _STEPS
        best = np.zeros(_STEPS + 1)
        taken: list[np.ndarray] = []
        winner = (-1.0, 0, 0)  # score, modules looked at, steps
        seen = 0
        for depth, group in itertools.groupby(self.modules, key=lambda each: each[1].layer):
            for name, module in group:
                rows, choice = best.copy(), np.zeros(_STEPS + 1, dtype=np.int8)
                for index, rank in enumerate(self.options[name], start=1):
                    seconds = self.calibration.adapter_seconds(name, rank, self.batch)
                    price = math.ceil(seconds / unit - _ROUNDING)
                    if price > _STEPS:
                        continue
                    value = best[: _STEPS + 1 - price] + module.score * _worth(rank, self.rank)
                    better = value > rows[price:]
                    rows[price:][better] = value[better]
                    choice[price:][better] = index
                best = rows
                taken.append(choice)
                seen += 1
            steps = min(math.floor(room[depth] / unit + _ROUNDING), _STEPS)
            # Deeper has to keep more: at the same score the shallower plan is the faster one.
            if steps >= 0 and best[steps] > winner[0]:
                winner = (float(best[steps]), seen, steps)
        _, seen, steps = winner
        ranks = {}
        for (name, _), choice in reversed([*zip(self.modules[:seen], taken[:seen], strict=True)]):
            if choice[steps]:
                ranks[name] = self.options[name][choice[steps] - 1]
                seconds = self.calibration.adapter_seconds(name, ranks[name], self.batch)
                steps -= math.ceil(seconds / unit - _ROUNDING)
        return ranks

    def _prices(self, plan: Plan) -> list[float]:
        """Milliseconds of a layer: its backward pass and its planned adapters, or ``rank`` on every module."""
        prices = list(self.backward)
        for name, module in self.scores.modules.items():
            planned = plan.modules.get(name)
            rank = planned.rank if planned else 0 if module.layer in plan.layers else self.rank
            prices[module.layer] += self.calibration.adapter_seconds(name, rank, self.batch)
        return [1000 * price for price in prices]

    def _reasons(self, plan: Plan) -> list[str]:
        lowest = plan.layers[0]
        adapted, reasons = set(plan.layers), []
        for layer in range(self.calibration.shape.num_layers):
            names = [name for name, module in self.scores.modules.items() if module.layer == layer]
            count = sum(name in plan.modules for name in names)
            if layer < lowest:
                depth = 1000 * sum(self.backward[layer:lowest])
                reasons.append(
                    f"under the cut: the backward pass down to it takes {depth:.3g} ms, better spent above"
                )
            elif layer not in adapted:
                reasons.append("on the way down, but its modules keep less score a second than those taken")
            elif layer == lowest:
                reasons.append(f"lowest: worth the way down; {count} of {len(names)} modules fit")
            else:
                reasons.append(f"{count} of {len(names)} modules, by score a second")
        return reasons


def _worth(rank: int, full: int) -> float:
    return math.log2(1 + rank / full)


def _check_scores(scores: Scores, calibration: Calibration) -> None:
    for name, module in scores.modules.items():
        if name not in calibration.shape.modules:
            raise UserError(
                f"the calibration knows no module {name!r}: calibrate with the model that was scored"
            )
        if not math.isfinite(module.score) or module.score < 0:
            raise UserError(f"score {module.score} of {name!r} cannot be kept: it must be finite and >= 0")
        shape = calibration.shape.modules[name]
        if (module.in_features, module.out_features) != (shape.in_features, shape.out_features):
            raise UserError(
                f"{name!r} is {module.in_features} x {module.out_features} in the scores and {shape.in_features} x "
                f"{shape.out_features} in the calibration: use files of one model"
            )
    if len(scores.layers) != calibration.shape.num_layers:
        raise UserError(
            f"the scores are of {len(scores.layers)} layers and the calibration of {calibration.shape.num_layers}: use "
            "files of one model"
        )
    if scores.layer_path != calibration.shape.layer_path:
        raise UserError(
            f"the scores are of {scores.layer_path!r} and the calibration of {calibration.shape.layer_path!r}: "
            "use files of one model"
        )
    if not any(module.score > 0 for module in scores.modules.values()):
        raise UserError("every score is 0: there is nothing to keep")
