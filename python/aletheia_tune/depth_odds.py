"""Odds of sampled depth from scores and seconds: the least noise in the gradient for a share of a step's time.

A backward pass that ends at layer i with probability p_i reaches layer l with probability q_l = Σ_{i ≤ l} p_i, which
does not fall on the way up. Divided by q_l where it is reached and 0 elsewhere, the layer's gradient g_l keeps its
expectation, and its second moment becomes E‖g_l‖² / q_l. With S_l for E‖g_l‖² and c_l for the seconds that layer l adds
to the pass (its activation gradient, its adapters' gradients and their update), the odds

    minimise Σ_l S_l / q_l   so that   fixed + Σ_l q_l c_l = share · (fixed + Σ_l c_l)   and   q_l ≤ q_{l+1} ≤ 1.

With the order among the layers left aside, the Lagrangian's derivative -S_l / q_l² + λ c_l = 0 gives

    q_l ∝ √(S_l / c_l),

the root of the score a second of each depth. With the order it is an isotonic regression, solved by pooling adjacent
violators: a layer with more score a second than those above it shares one q with them, the root of their summed score
over their summed seconds, because a pass that goes down to it pays for them on the way. Bounds on q clip that solution.
The factor is the one that spends the share.

The highest adapted layer is in every pass, for a step that trains nothing is a forward pass in vain, and no layer is in
fewer than one of twenty. S_l is the layer's score: Fisher's is E‖g_l‖² of the weights, to which the squared norm of an
adapter's gradient with a random other factor is proportional in expectation; another score stands for it as it is.

**Whether it pays.** In the time of one full pass there are 1 / share sampled ones, and the noise of their mean is
share · (Σ_l S_l / q_l) / (Σ_l S_l) of the full pass's. The forward pass is paid for in every step, so this is below 1
only where scores fall steeply towards the bottom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from aletheia_tune.cost import Calibration, predict
from aletheia_tune.errors import UserError
from aletheia_tune.plan import Plan

# Least probability of a layer to be reached: rarer gradients would be as rare as they are loud once reweighted.
LEAST = 0.05
_ROUNDING = 1e-9
# Of a bisection between two floats.
_HALVINGS = 100


@dataclass(frozen=True)
class DepthOdds:
    """How deep the backward passes of a plan's training go.

    Attributes:
        odds: by the index of a layer, the probability that a pass ends there, as `sampled_depth` takes it.
        time: expected seconds of a step, as a share of one whose pass reaches every adapter.
        noise: second moment of the reweighted gradient in a given time, over that of full passes; below 1 it pays.
    """

    odds: dict[int, float]
    time: float
    noise: float

    def __str__(self) -> str:
        ends = ", ".join(f"layer {layer} {odds:.0%}" for layer, odds in self.odds.items())
        return (
            f"backward passes end at {ends}; a step takes {self.time:.1%} of a full one, "
            f"the gradient's noise in a given time is {self.noise:.3g} of full passes'"
        )


def depth_odds(plan: Plan, calibration: Calibration, share: float) -> DepthOdds:
    """The odds that add the least noise to the gradient among those whose steps take ``share`` of a full one's time.

    Args:
        plan: made from scores, which its ``meta["layer_scores"]`` holds.
        calibration: of this machine, for the plan's model.
        share: expected seconds of a step over those of a step that trains every adapter, in (0, 1].

    Raises:
        UserError: a share outside (0, 1], or too small for the forward pass and the highest layer (saying the least);
            a plan without scores, or with one that is negative or not finite, or none above 0; a module that the
            calibration does not know.
    """
    if not 0 < share <= 1:
        raise UserError(f"sampled depth: a step time of {share:.1%} is outside (0, 100%]")
    scores = _scores(plan)
    full = predict(plan, calibration).seconds
    seconds = _seconds(plan, calibration)
    fixed = full - sum(seconds)
    least = fixed + seconds[-1] + LEAST * sum(seconds[:-1])
    if share * full < least * (1 - _ROUNDING):
        raise UserError(
            f"sampled depth: {share:.1%} of the step time is too little for the forward pass and the highest layer: "
            f"give at least {math.ceil(1000 * least / full) / 10:g}%"
        )
    # A price of 0, as a fit without negative prices may give, would have no ratio.
    prices = [max(price, _ROUNDING * full) for price in seconds[:-1]]
    reached = [*_spend(_roots(scores[:-1], prices), prices, share * full - fixed - seconds[-1]), 1.0]
    ends = [reached[0], *(above - below for below, above in pairwise(reached))]
    time = (fixed + sum(q * price for q, price in zip(reached, seconds, strict=True))) / full
    second_moment = sum(score / q for score, q in zip(scores, reached, strict=True))
    return DepthOdds(
        {layer: odds for layer, odds in zip(plan.layers, ends, strict=True) if odds > _ROUNDING},
        time,
        time * second_moment / sum(scores),
    )


def _scores(plan: Plan) -> list[float]:
    """The scores of the adapted layers, from the lowest up."""
    scores = plan.meta.get("layer_scores")
    if not isinstance(scores, list) or len(scores) != plan.num_layers:
        raise UserError(
            "sampled depth: the plan holds no scores of its layers: make it by `aletheia plan --scores`"
        )
    for layer in plan.layers:
        score = scores[layer]
        if not isinstance(score, int | float) or not (math.isfinite(score) and score >= 0):
            raise UserError(f"sampled depth: the score of layer {layer} is {score!r}: it must be 0 or more")
    if not any(scores[layer] for layer in plan.layers):
        raise UserError("sampled depth: every adapted layer has a score of 0: choose another score")
    return [float(scores[layer]) for layer in plan.layers]


def _seconds(plan: Plan, calibration: Calibration) -> list[float]:
    """What reaching each adapted layer adds to a step, from the lowest up; with it, the frozen layers above it."""
    price, shape, layers = calibration.coefficients, calibration.shape, plan.layers
    frozen = calibration.backward_seconds()
    adapters = dict.fromkeys(layers, 0.0)
    for name, module in plan.modules.items():
        traffic = shape.traffic(name, calibration.batch)
        adapters[shape.modules[name].layer] += (
            price.backward_traffic + price.backward_rank * module.rank
        ) * traffic + price.update_parameter * module.rank * shape.rank_parameters(name)
    for name in plan.full:
        adapters[shape.modules[name].layer] += price.backward * shape.product_flops(
            name, calibration.batch
        ) + price.update_parameter * shape.weights(name)
    ends = [*layers[1:], shape.num_layers]
    return [sum(frozen[layer:end]) + adapters[layer] for layer, end in zip(layers, ends, strict=True)]


def _roots(scores: Sequence[float], prices: Sequence[float]) -> list[float]:
    """√(score / price) of each depth, pooled so that it does not fall on the way up."""
    pools: list[tuple[float, float, int]] = []
    for score, price in zip(scores, prices, strict=True):
        pool = (score, price, 1)
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
            below = pools.pop()
            pool = (below[0] + pool[0], below[1] + pool[1], below[2] + pool[2])
        pools.append(pool)
    return [math.sqrt(score / price) for score, price, count in pools for _ in range(count)]


def _spend(roots: Sequence[float], prices: Sequence[float], seconds: float) -> list[float]:
    """The roots times the one factor at which they, between `LEAST` and 1, cost so many seconds, or as good as."""

    def scaled(logarithm: float) -> list[float]:
        return [min(max(math.exp(logarithm) * root, LEAST), 1.0) for root in roots]

    positive = [root for root in roots if root > 0]
    if not positive:
        return [LEAST] * len(roots)
    # Between these all are at LEAST, and all that can be are at 1.
    low, high = math.log(LEAST / max(positive)), -math.log(min(positive))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        cost = sum(q * price for q, price in zip(scaled(middle), prices, strict=True))
        low, high = (low, middle) if cost > seconds else (middle, high)
    return scaled(low)
