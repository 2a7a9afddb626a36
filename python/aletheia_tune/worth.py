"""What a saving of time is worth: hours, and money and energy where a price or a meter is given."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aletheia_tune.errors import UserError
from aletheia_tune.race import RaceResult, RaceTable
from aletheia_tune.referee import Verdict

STEPS = 1000
HOURS = 100
HEADS = {"money": "money saved, at the price given", "kwh": "kWh saved, at the power given"}


@dataclass(frozen=True)
class Tariff:
    """What an hour of the machine costs.

    Attributes:
        price_per_hour: in the currency of whoever gives it; None if it is not known.
        watts: that the machine draws in training, from a meter; None likewise.

    Raises:
        UserError: a price or a power that is not a positive number.
    """

    price_per_hour: float | None = None
    watts: float | None = None

    def __post_init__(self) -> None:
        for what, value in (("price per hour", self.price_per_hour), ("watts", self.watts)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"{what} is {value}: it must be a positive number")

    def of(self, hours: float) -> dict[str, float]:
        """Money and kilowatt hours of so many hours, as far as they are known."""
        worth = {}
        if self.price_per_hour is not None:
            worth["money"] = self.price_per_hour * hours
        if self.watts is not None:
            worth["kwh"] = self.watts / 1000 * hours
        return worth


@dataclass(frozen=True)
class Saving:
    """What one arm saves against the first, or a challenger against the baselines.

    Attributes:
        arm: its name.
        hours: that it takes; None where that depends on the run.
        saved: hours less than the other takes, below zero where it takes more.
        least, most: the same with the seed that saves least and most; `saved` itself where there are no seeds.
        worth: `Tariff.of` what is saved.
    """

    arm: str
    hours: float | None
    saved: float
    least: float
    most: float
    worth: Mapping[str, float]


def of_steps(result: RaceResult, tariff: Tariff) -> list[Saving]:
    """What each arm but the first saves in 1,000 steps by its median step; none with an objection to the race."""
    if result.objection():
        return []
    hours = []
    for arm in result.arms:
        assert arm.training.step_seconds is not None  # a race without steps meets an objection
        hours.append(arm.training.step_seconds * STEPS / 3600)
    savings = []
    for arm, own in zip(result.arms[1:], hours[1:], strict=True):
        saved = hours[0] - own
        savings.append(Saving(arm.name, own, saved, saved, saved, tariff.of(saved)))
    return savings


def of_verdict(verdict: Verdict, tariff: Tariff) -> list[Saving]:
    """What each challenger saves of every 100 hours that the baselines take to their loss, by the median seed.

    A challenger that missed the target with a seed is left out: what it would have taken is not known.
    """
    savings = []
    for name, seeds in verdict.arms.items():
        ratios = [one.ratio_time_to_target for one in seeds.values() if one.ratio_time_to_target is not None]
        if seeds and len(ratios) == len(seeds):
            saved, least, most = (HOURS * (1 - of(ratios)) for of in (statistics.median, max, min))
            savings.append(Saving(name, None, saved, least, most, tariff.of(saved)))
    return savings


def table(savings: Sequence[Saving], per: str) -> RaceTable:
    """Savings in words and numbers; ``per`` names what they are of: "1,000 steps"."""
    header = ["arm", f"hours saved in {per}"]
    if any(one.hours is not None for one in savings):
        header.insert(1, f"hours for {per}")
    header += [HEADS[kind] for kind in HEADS if any(kind in one.worth for one in savings)]
    rows = []
    for one in savings:
        row = [one.arm, _short(one.saved)]
        if one.least < one.most:
            row[-1] += f" ({_short(one.least)} to {_short(one.most)})"
        if one.hours is not None:
            row.insert(1, _short(one.hours))
        rows.append((*row, *(_short(value) for value in one.worth.values())))
    return RaceTable(tuple(header), tuple(rows), ())


def _short(value: float) -> str:
    return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
