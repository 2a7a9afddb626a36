"""How an arm of a race comes by its plan: which score, how much of the model, of what rank, how deep a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from aletheia_tune import files
from aletheia_tune.cost import Calibration
from aletheia_tune.data import Example, batches, pad_token_id
from aletheia_tune.depth_odds import depth_odds
from aletheia_tune.errors import UserError
from aletheia_tune.layers import positions_of
from aletheia_tune.number_types import check_kinds, is_finite
from aletheia_tune.plan import Plan, Ranks, make_plan, unscored_plan
from aletheia_tune.probe import METHODS, probe
from aletheia_tune.scores.cka import Pooling
from aletheia_tune.scores.controls import CONTROLS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

UNIFORM = "uniform"


@dataclass(frozen=True)
class Recipe:
    """A plan that is made where and when it is needed, so that its cost can be charged.

    Attributes:
        score: a score of the probe; without a probe "uniform" for every layer, or a control for as many layers as a
            score would choose: "top" (nearest to the loss), "bottom", "spaced", or "random", drawn anew for each seed.
        layers: share of the layers to adapt, in percent; all of them with "uniform".
        full: share of their modules to train in full, in percent, as `make_plan` takes it: with score "hybrid" and 10,
            in the style of Hybrid-LoRA.
        rank: of every adapter, or the mean rank where ranks go by score.
        alpha: of every adapter; by default twice its rank.
        ranks, attention_rank, mlp_rank: as `make_plan` takes them.
        targets: as `make_plan` takes it; every linear by default.
        probe_batches: batches that the probe reads.
        probe_batch_size: examples in one of them.
        sampled_depth: expected time of a step in percent of one that trains every adapter; sets the odds with which
            backward passes end at each depth from the scores and the calibration's prices (see `depth_odds`).
        calibration: file with these prices, as `aletheia cost` writes it.
        pooling: of the score "cka", as `probe` takes it.

    Raises:
        UserError: a value of the wrong kind, a score of no such name, a share outside (0, 100], no probe batches, only
            one of sampled_depth and calibration, sampled_depth without a score of the probe, a share in full outside
            [0, 100), or that or unequal ranks without a probe to choose by, a share of the layers that nothing
            chooses, a rank by type without "by-type".
    """

    score: str = UNIFORM
    layers: float = 100
    full: float = 0
    rank: int = 16
    alpha: float | None = None
    ranks: Ranks = "uniform"
    attention_rank: int = 16
    mlp_rank: int = 64
    targets: tuple[str, ...] | None = None
    probe_batches: int = 5
    probe_batch_size: int = 4
    sampled_depth: float | None = None
    calibration: str | None = None
    pooling: Pooling = "last"

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in ("rank", "attention_rank", "mlp_rank", "probe_batches", "probe_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a whole number of 1 or more")
        if self.alpha is not None and not is_finite(self.alpha):
            raise UserError(f"alpha is {self.alpha}: give a finite number")
        if self.ranks not in get_args(Ranks):
            raise UserError(f"ranks {self.ranks!r} is unknown: choose one of {', '.join(get_args(Ranks))}")
        known = (UNIFORM, *CONTROLS, *METHODS)
        if self.score not in known:
            raise UserError(f"score {self.score!r} is unknown: choose one of {', '.join(known)}")
        if not 0 < self.layers <= 100:
            raise UserError(f"layers is {self.layers}: give a share in percent, above 0 and up to 100")
        if self.score == UNIFORM and self.layers != 100:
            raise UserError(
                f"layers is {self.layers}, but score 'uniform' takes every layer: choose another score or drop it"
            )
        if self.pooling not in get_args(Pooling):
            raise UserError(
                f"pooling {self.pooling!r} is unknown: choose one of {', '.join(get_args(Pooling))}"
            )
        if not 0 <= self.full < 100:
            raise UserError(f"full is {self.full}: give a share in percent, 0 or more and below 100")
        if self.full and self.score not in METHODS:
            raise UserError(
                f"full is {self.full}, but score {self.score!r} has no probe to choose modules by"
            )
        if self.ranks != "uniform" and self.score not in METHODS:
            raise UserError(
                f"ranks is {self.ranks!r}, but score {self.score!r} has no probe to rank modules by"
            )
        for name in ("attention_rank", "mlp_rank"):
            if self.ranks != "by-type" and getattr(self, name) != getattr(Recipe, name):
                raise UserError(f"{name} goes with ranks by-type, not {self.ranks}: drop one of the two")
        if (self.sampled_depth is None) != (self.calibration is None):
            raise UserError(
                "sampled_depth and calibration, a file from `aletheia cost`, go together: give both"
            )
        if self.sampled_depth is not None:
            if not 0 < self.sampled_depth <= 100:
                raise UserError(
                    f"sampled_depth is {self.sampled_depth}: give a share in percent, above 0 and up to 100"
                )
            if self.score not in METHODS:
                raise UserError(
                    f"sampled_depth needs a score of the probe, not {self.score!r}: choose one of "
                    f"{', '.join(METHODS)}"
                )

    def plan(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        seed: int,
    ) -> Plan:
        """The plan for this model and these training examples; the model is left as it was.

        Raises:
            UserError: as `probe` and `make_plan` raise it.
        """
        if self.score == UNIFORM or self.score in CONTROLS:
            control = None if self.score == UNIFORM else self.score
            return unscored_plan(
                model,
                control=control,
                layers=self.layers,
                seed=seed,
                rank=self.rank,
                alpha=self.alpha,
                targets=self.targets,
            )
        scores = probe(
            model,
            batches(
                examples,
                self.probe_batch_size,
                pad_token_id(tokenizer),
                seed=seed,
                count=self.probe_batches,
                positions=positions_of(model),
            ),
            method=self.score,
            pooling=self.pooling,
            seed=seed,
        )
        return make_plan(
            scores,
            layers=self.layers,
            full=self.full,
            ranks=self.ranks,
            rank=self.rank,
            attention_rank=self.attention_rank,
            mlp_rank=self.mlp_rank,
            alpha=self.alpha,
            targets=self.targets,
        )

    def odds(self, plan: Plan) -> tuple[dict[int, float] | None, float]:
        """The odds of sampled depth for a plan of this recipe, None without, and the seconds that calibration took.

        Raises:
            UserError: the calibration cannot be read, or as `depth_odds` raises it.
        """
        if self.calibration is None or self.sampled_depth is None:
            return None, 0.0
        prices = Calibration.from_json(files.read_text(self.calibration, "calibration"))
        found = depth_odds(plan, prices, self.sampled_depth / 100)
        seconds = prices.meta.get("seconds")
        if not isinstance(seconds, int | float):
            raise UserError(
                f"the calibration file {self.calibration} does not say how long it took: run `aletheia cost` again"
            )
        return found.odds, float(seconds)
