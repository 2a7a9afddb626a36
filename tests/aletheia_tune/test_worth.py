"""What a saving is worth: by hand, with and without a price and a meter, and where there is none to speak of."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aletheia_tune.errors import UserError
from aletheia_tune.referee import SeedVerdict, Verdict
from aletheia_tune.worth import Tariff, of_steps, of_verdict, table
from tests import race_case


def seed(ratio: float | None) -> SeedVerdict:
    return SeedVerdict(ratio, None, 100.0, 1.0, None, 1.0, None, None, None, 0.0, None)


def verdict(**arms: list[float | None]) -> Verdict:
    judged = {
        name: {str(index): seed(ratio) for index, ratio in enumerate(ratios)} for name, ratios in arms.items()
    }
    return Verdict("t", "", {}, {}, None, judged, "a", {}, {}, {})


def test_a_step_is_worth_what_a_thousand_save():
    # 4 s a step against 3.2 s and 2.5 s.
    kernels, planned = of_steps(race_case.result(), Tariff(3.6, 1000.0))
    assert kernels.hours == pytest.approx(3200 / 3600)
    assert kernels.saved == kernels.least == kernels.most == pytest.approx(800 / 3600)
    assert planned.worth == {"money": pytest.approx(1.5), "kwh": pytest.approx(1500 / 3600)}
    assert table([kernels, planned], "1,000 steps").rows == (
        ("uniform r=16, our kernels", "0.889", "0.222", "0.8", "0.222"),
        ("Aletheia <plan> & kernels", "0.694", "0.417", "1.5", "0.417"),
    )


def test_a_slower_arm_costs():
    result = race_case.result()
    slow = replace(result, arms=tuple(reversed(result.arms)))
    assert [one.saved for one in of_steps(slow, Tariff())] == pytest.approx([-700 / 3600, -1500 / 3600])


def test_nothing_is_read_off_a_race_with_an_objection():
    result = race_case.result()
    stopped = replace(result.arms[-1], training=replace(result.arms[-1].training, stopped="NaN"))
    assert of_steps(replace(result, arms=(*result.arms[:-1], stopped)), Tariff()) == []


def test_a_verdict_is_worth_its_median_seed_and_names_the_others():
    (one,) = of_verdict(verdict(a=[0.5, 0.25, 0.375]), Tariff(watts=200.0))
    assert (one.saved, one.least, one.most) == (62.5, 50.0, 75.0)
    assert one.worth == {"kwh": 12.5}
    made = table([one], "100 hours of the baselines")
    assert made.header == (
        "arm",
        "hours saved in 100 hours of the baselines",
        "kWh saved, at the power given",
    )
    assert made.rows == (("a", "62.5 (50 to 75)", "12.5"),)


def test_a_challenger_that_missed_the_target_with_a_seed_has_no_figure():
    assert [one.arm for one in of_verdict(verdict(a=[0.5, None], b=[0.5, 1.5], c=[]), Tariff())] == ["b"]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_price_or_a_power_that_cannot_be_meant_is_refused(value):
    with pytest.raises(UserError, match="price per hour"):
        Tariff(price_per_hour=value)
    with pytest.raises(UserError, match="watts"):
        Tariff(watts=value)
