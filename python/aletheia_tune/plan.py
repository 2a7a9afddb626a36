"""From scores to what is trained: per module a rank and an alpha, or all of it; as JSON and as a PEFT `LoraConfig`."""

from __future__ import annotations

import copy
import json
import math
import re
import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from aletheia_tune.classification import head_modules
from aletheia_tune.errors import UserError
from aletheia_tune.layers import (
    bare_model,
    bare_modules,
    find_layers,
    full_modules,
    is_linear,
    linear_modules,
    linear_shape,
)
from aletheia_tune.number_types import is_finite, is_whole
from aletheia_tune.scores.controls import control_layers

if TYPE_CHECKING:
    from aletheia_tune.scores import ModuleScore, Scores

FORMAT = "aletheia-plan"
VERSION = 1

Ranks = Literal["uniform", "by-type", "by-score"]
_ADAPTER = "default"
_RSLORA_ALPHA = 8.0
_ROUNDING = 1e-9
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class ModulePlan:
    """The adapter of one module: B A x · alpha / rank is added to its output."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class Plan:
    """Which modules of a model get an adapter, and of what rank; and which are trained in full beside them.

    Attributes:
        modules: by full dotted name in the bare model: linears, and MoE expert parameters (3-D,
            "....gate_up_proj").
        num_layers: transformer layers of the model, adapted or not.
        layer_path: where they are; every module's name is ``{layer_path}.{index}.…``.
        dropout: of the adapters' input.
        meta: how the plan was made; ``layer_scores``, ``layer_prices_ms`` and ``layer_reasons`` are what `explain`
            shows, as it does ``full_scores``; ``probe`` is `Scores.origin`, ``command`` the arguments of the
            `aletheia plan` that made it.
        full: linears whose own weight and bias are trained, by name like ``modules``; none of them has an adapter.

    Raises:
        UserError: at construction, naming the module: no module, a rank that is not a whole number of 1 or
            more, an alpha that is not a positive number, a name outside the layers, a module that is to be trained in
            full twice or beside an adapter of its own, a dropout outside [0, 1).
    """

    modules: dict[str, ModulePlan]
    num_layers: int
    layer_path: str
    dropout: float = 0.0
    meta: dict[str, Any] = field(default_factory=dict)
    full: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.modules:
            raise UserError("the plan adapts no module: choose more layers or other targets")
        for name in self.full:
            if name in self.modules or self.full.count(name) > 1:
                raise UserError(f"plan module {name!r} is named twice: train it in full or adapt it, once")
        for name, module in self.modules.items():
            if not is_whole(module.rank) or module.rank < 1:
                raise UserError(
                    f"plan module {name!r}: rank {module.rank!r} is not a whole number of 1 or more"
                )
            if not is_finite(module.alpha) or not module.alpha > 0:
                raise UserError(f"plan module {name!r}: alpha {module.alpha!r} is not a positive number")
        for name in (*self.modules, *self.full):
            index = _layer_index(name, self.layer_path)
            if index is None or index >= self.num_layers:
                raise UserError(
                    f"plan module {name!r} is in none of the {self.num_layers} layers of {self.layer_path!r}"
                )
        if not is_finite(self.dropout) or not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout!r} is not in [0, 1)")

    @property
    def layers(self) -> tuple[int, ...]:
        """The indices of the layers of which something is trained, ascending."""
        return tuple(sorted({index for index, _ in self._by_layer()}))

    @property
    def layer_scores(self) -> tuple[float, ...] | None:
        """The scores it was made from; None unless `meta` has one finite number for each layer."""
        scores = self.meta.get("layer_scores")
        if not isinstance(scores, list) or len(scores) != self.num_layers:
            return None
        return tuple(map(float, scores)) if all(map(is_finite, scores)) else None

    @property
    def probe_seconds(self) -> float:
        """What the probe took whose scores it was made from; 0 where `meta` does not say."""
        probe = self.meta.get("probe")
        seconds: Any = probe.get("seconds") if isinstance(probe, dict) else None
        return float(seconds) if is_finite(seconds) and seconds > 0 else 0.0

    def places(self) -> dict[str, tuple[int, str]]:
        """By module its layer, and of its name as much as tells it apart within a layer: "q_proj", "mlp.c_proj"."""
        inside = {}
        for index, name in self._by_layer():
            prefix = f"{self.layer_path}.{index}." if self.layer_path else f"{index}."
            inside[name] = (index, name.removeprefix(prefix))
        # Of names that end alike, as GPT-2's attn.c_proj and mlp.c_proj, the last two parts.
        ends = Counter(_last(rest) for rest in {rest for _, rest in inside.values()})
        return {
            name: (
                index,
                _last(rest) if ends[_last(rest)] == 1 else ".".join(rest.split(".")[-2:]),
            )
            for name, (index, rest) in inside.items()
        }

    def to_json(self) -> str:
        return (
            json.dumps(
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "layer_path": self.layer_path,
                    "num_layers": self.num_layers,
                    "dropout": self.dropout,
                    "modules": {
                        name: {"rank": module.rank, "alpha": module.alpha}
                        for name, module in self.modules.items()
                    },
                    "full": list(self.full),
                    "meta": self.meta,
                },
                indent=2,
                allow_nan=False,
            )
            + "\n"
        )

    @staticmethod
    def from_json(text: str) -> Plan:
        """Reads what `to_json` wrote.

        Raises:
            UserError: broken JSON, another format or version, a missing field, or values that no plan has.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the plan is not JSON: {error}") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise UserError(f'not a plan: a file made by \'aletheia plan\' has "format": "{FORMAT}"')
        if data.get("version") != VERSION:
            raise UserError(
                f"plan version {data.get('version')!r} is unknown: this program reads version {VERSION}"
            )
        for key, is_right, what in (
            ("layer_path", lambda value: isinstance(value, str), "a string"),
            ("num_layers", lambda value: is_whole(value) and value > 0, "a whole number of 1 or more"),
            ("modules", lambda value: isinstance(value, dict), "an object"),
            ("meta", lambda value: isinstance(value, dict), "an object"),
        ):
            if not is_right(data.get(key)):
                raise UserError(f"broken plan: {key!r} is not {what}")
        modules = {}
        for name, module in data["modules"].items():
            if not isinstance(module, dict) or set(module) != {"rank", "alpha"}:
                raise UserError(f"broken plan: module {name!r} is not an object of rank and alpha")
            modules[name] = ModulePlan(module["rank"], module["alpha"])
        full = data.get("full", [])
        if not isinstance(full, list) or not all(isinstance(name, str) for name in full):
            raise UserError("broken plan: 'full' is not a list of module names")
        dropout = data.get("dropout", 0.0)
        return Plan(modules, data["num_layers"], data["layer_path"], dropout, data["meta"], tuple(full))

    def trainable_parameters(self, model: nn.Module | Mapping[str, Sequence[int]]) -> int:
        """Entries of every A [rank, in] and B [out, rank], times the experts for an expert parameter, and of ``full``;
        no head's.

        Args:
            model: the model, bare or adapted, or by module name (in_features, out_features), for an expert
                parameter (experts, in_features, out_features): what is trained in full then counts without its bias.

        Raises:
            UserError: a module of the plan is not there.
        """
        names = (*self.modules, *self.full)
        shapes = _shapes(model, names) if isinstance(model, nn.Module) else model
        for name in names:
            if name not in shapes:
                raise UserError(f"plan module {name!r} has no shape given")
        adapters = sum(module.rank * _rank_cost(shapes[name]) for name, module in self.modules.items())
        if not isinstance(model, nn.Module):
            return adapters + sum(math.prod(shapes[name]) for name in self.full)
        bare = _bare_modules(model)
        return adapters + sum(p.numel() for name in self.full for p in bare[name].parameters())

    def to_lora_config(self, model: nn.Module) -> LoraConfig:
        """The configuration with which stock PEFT gives exactly the planned adapters on ``model``.

        ``r`` and ``lora_alpha`` are the plan's commonest; modules that differ are named in ``rank_pattern``
        and ``alpha_pattern``, whose keys PEFT matches as ``re.match(rf"(.*\\.)?({key})$", name)``: escaped,
        and with a leading ``^`` that fails wherever the optional prefix took a character, a key can only
        match its own module. ``target_modules`` has no such anchor (PEFT takes a name that ends in ``.{key}``
        too), ``modules_to_save``, which names what is trained in full, has less (a name that ends in ``{key}``,
        without a dot, is taken), and PEFT rewrites targets of some MoE models. So the configuration is rehearsed by
        PEFT itself on an empty copy of the model's module tree, and any difference from the plan is an error.

        A classifier's head is trained whole beside the adapters, and saved with them.

        Args:
            model: bare or already adapted; it is not changed.

        Raises:
            UserError: a model of another number of layers, a module that is not in the model or is no linear or expert
                parameter, an expert parameter that is to be trained in full (PEFT trains whole modules), a rank above
                in_features + out_features, dropout on expert parameters (PEFT has none), or a key that PEFT would match
                to other modules than the plan's.
        """
        bare = _bare_modules(model)
        shapes = _shapes(model, (*self.modules, *self.full))
        self._check_depth(model)
        for name in self.full:
            if name not in bare:
                raise UserError(f"expert parameter {name!r} cannot be trained in full: give it an adapter")
        for name, module in self.modules.items():
            _check_rank(name, module.rank, shapes[name])
        parameters = [name for name in self.modules if name not in bare]
        linears = [name for name in self.modules if name in bare]
        if parameters and self.dropout:
            raise UserError(
                f"expert parameter {parameters[0]!r} cannot have dropout {self.dropout}: plan dropout 0"
            )

        head = head_modules(bare[""])
        # PEFT wrongly warns that patterns which match a parameter are ignored, so parameters set the common values.
        common = [self.modules[name] for name in parameters or linears]
        rank = Counter(module.rank for module in common).most_common(1)[0][0]
        alpha = Counter(module.alpha for module in common).most_common(1)[0][0]
        config = LoraConfig(
            r=rank,
            lora_alpha=_json_number(alpha),  # type: ignore[arg-type]
            lora_dropout=self.dropout,
            bias="none",
            target_modules=linears,
            target_parameters=parameters or None,
            modules_to_save=[*self.full, *head] or None,
            rank_pattern={_anchored(n): m.rank for n, m in self.modules.items() if m.rank != rank},
            alpha_pattern={
                _anchored(n): _json_number(m.alpha) for n, m in self.modules.items() if m.alpha != alpha
            },
            fan_in_fan_out=bool(linears)
            and not parameters
            and all(isinstance(bare[n], Conv1D) for n in linears),
            task_type="SEQ_CLS" if head else "CAUSAL_LM" if _is_causal_lm(bare[""]) else None,
        )
        self._rehearse(config, bare)
        return config

    def wrap(self, model: Any, *, float32: bool = True) -> PeftModel:
        """The model with the planned adapters, by `peft.get_peft_model`, which changes it in place.

        Args:
            model: a bare `transformers` model.
            float32: adapters are of that dtype; otherwise of the dtype of the weights they adapt.

        Raises:
            UserError: as `to_lora_config`.
        """
        with warnings.catch_warnings():
            # PEFT asks the model by a name that transformers 5 has deprecated; no user can mend it.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            wrapped = get_peft_model(model, self.to_lora_config(model), autocast_adapter_dtype=float32)
        assert isinstance(wrapped, PeftModel)
        return wrapped

    def check(self, peft_model: nn.Module, adapter_name: str = _ADAPTER) -> None:
        """Compares what a model trains with the plan: the adapters, their ranks and scalings, and the full modules.

        Raises:
            UserError: naming the first module that differs.
        """
        found = _adapters(peft_model, adapter_name)
        for name in sorted(found.keys() - self.modules.keys()):
            keys = [key for key in self.modules if name.endswith(f".{key}") or _last(key) == _last(name)]
            key = max(keys, key=lambda key: (name.endswith(f".{key}"), len(key)), default=None)
            because = f", through the plan's {key!r}" if key is not None else ""
            raise UserError(
                f"PEFT would adapt {name!r}{because}, which the plan leaves out: rename or drop the target"
            )
        for name, module in self.modules.items():
            if name not in found:
                raise UserError(f"PEFT would not adapt {name!r}, which the plan names: drop it from the plan")
            rank, scaling = found[name]
            if rank != module.rank or not math.isclose(scaling, module.alpha / module.rank, rel_tol=1e-6):
                raise UserError(
                    f"PEFT would give {name!r} rank {rank} and scaling {scaling:g}, "
                    f"where the plan has rank {module.rank} and alpha {module.alpha:g}"
                )
        in_full = {
            name
            for name, wrapper in full_modules(bare_model(peft_model)).items()
            # A classifier's head, trained whole whatever the plan, is a child of the model itself.
            if adapter_name in wrapper.modules_to_save and "." in name
        }
        for name in sorted(in_full ^ set(self.full)):
            meant = "" if name in self.full else " too, whose name ends like one that the plan trains in full"
            raise UserError(
                f"PEFT would {'' if name in in_full else 'not '}train {name!r} in full{meant}: rename or drop it"
            )

    def explain(self) -> str:
        """A table of the layers for people: index, score where known, whether it is in, ranks of its modules or "full".

        A plan made for a time budget also shows the price of every layer, in milliseconds a step (its backward pass
        and its adapters), and why it is in or out. What was chosen to be trained in full stands under the table with
        its score.
        """
        scores = self.meta.get("layer_scores") or []
        prices = self.meta.get("layer_prices_ms") or []
        reasons = self.meta.get("layer_reasons") or []
        adapted: dict[int, dict[float, list[str]]] = {}
        for index, name in self._by_layer():
            rank = self.modules[name].rank if name in self.modules else math.inf
            adapted.setdefault(index, {}).setdefault(rank, []).append(_last(name))
        lines = [f"layer       score  {'  price ms  ' if prices else ''}    ranks"]
        for index in range(self.num_layers):
            score = f"{scores[index]:.5g}" if index < len(scores) else ""
            price = (f"{prices[index]:10.4g}" if index < len(prices) else " " * 10) + "  " if prices else ""
            ranks = adapted.get(index, {})
            cells = "   ".join(
                f"{'full' if rank == math.inf else rank}: {' '.join(names)}"
                for rank, names in sorted(ranks.items())
            )
            why = f"({reasons[index]})" if index < len(reasons) else ""
            text = " ".join(part for part in ("in " if ranks else "out", cells, why) if part)
            lines.append(f"{index:5}  {score:>10}  {price}{text}".rstrip())
        in_full = f", {len(self.full)} trained in full" if self.full else ""
        lines.append(
            f"{len(adapted)} of {self.num_layers} layers, {len(self.modules)} modules adapted{in_full}"
        )
        for name, score in (self.meta.get("full_scores") or {}).items():
            lines.append(f"in full for its score of {score:.5g}: {name}")
        if "time_budget" in self.meta:
            lines.append(
                f"predicted step {self.meta['predicted_time']:.1%} of uniform's "
                f"(budget {self.meta['time_budget']:.1%}), score kept {self.meta['score_kept']:.1%}"
            )
        return "\n".join(lines)

    def _by_layer(self) -> Iterator[tuple[int, str]]:
        for name in (*self.modules, *self.full):
            index = _layer_index(name, self.layer_path)
            assert index is not None  # checked at construction
            yield index, name

    def _check_depth(self, model: nn.Module) -> None:
        try:
            found = find_layers(model)
        except UserError:  # nothing to compare with; the names of the modules do fit
            return
        if found.path == self.layer_path and len(found.layers) != self.num_layers:
            raise UserError(
                f"the plan is for {self.num_layers} layers and the model has {len(found.layers)}: "
                "make it with this model"
            )

    def _rehearse(self, config: LoraConfig, bare: Mapping[str, nn.Module]) -> None:
        skeleton = _skeleton(bare, self.modules)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                # A copy: PEFT condenses the list of targets in place.
                LoraModel(skeleton, copy.deepcopy(config), _ADAPTER, low_cpu_mem_usage=True)
            except ValueError as error:
                raise UserError(f"PEFT refuses the plan: {error}") from error
        self.check(skeleton)


def make_plan(
    scores: Scores,
    *,
    layers: float = 50,
    full: float = 0,
    control: str | None = None,
    seed: int = 0,
    ranks: Ranks = "uniform",
    rank: int = 16,
    attention_rank: int = 16,
    mlp_rank: int = 64,
    budget: int | None = None,
    alpha: float | None = None,
    rslora: bool = False,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
) -> Plan:
    """Adapters on the layers with the highest scores.

    The share and the tie rule are those of Aletheia (arXiv 2604.15351): k = max(floor(L · share / 100), 1)
    layers, ties to the lower index. So are the by-type ranks of 16 and 64.

    Args:
        scores: of every layer, and of the modules that can be adapted; ``meta["experts"]`` has a list as long
            as the experts for each expert parameter.
        layers: the share of the layers to adapt, in percent, in (0, 100].
        full: the share of the modules in those layers to train in full, in percent, in [0, 100): those with the highest
            scores, one at least, ties to the first; the others get adapters, expert parameters always do. With
            `scores.hybrid`, all layers and a tenth of the modules this is in the style of Hybrid-LoRA (arXiv
            2605.18822).
        control: choose as many layers without looking at the scores, as one of `scores.controls.CONTROLS` does: what
            a choice by scores has to beat.
        seed: of the control "random".
        ranks: "uniform" (``rank``); "by-type" (``attention_rank``, ``mlp_rank``, and ``rank`` for what is
            neither); "by-score" (in proportion to each module's score; see `ranks_by_score`).
        budget: with "by-score", the most parameters of the adapters, beside what is trained in full; by default what
            ``rank`` on each module would cost.
        alpha: of every module; by default 2 · its rank, so that alpha / rank is 2 (the published 32 / 16)
            throughout.
        rslora: scale adapters by alpha / √rank (arXiv 2312.03732), by default 8 / √rank, which is 2 at rank 16.
            The plan keeps alpha · √rank, so its scaling is alpha / rank as ever, for stock PEFT too.
        targets: the modules to adapt, by full name or by its end ("q_proj", "mlp.up_proj"); by default all scored.

    Raises:
        UserError: a share outside (0, 100], a rank or alpha of 0 or less, a rank above a module's in_features
            + out_features, a score that is not finite, a target that matches nothing, a budget that is too
            small or given without "by-score", no such control, a share to train in full outside [0, 100), with a
            control, or that leaves no module for adapters.
    """
    _check_share(layers)
    if not is_finite(full) or not 0 <= full < 100:
        raise UserError(f"share of modules to train in full {full} is outside [0, 100) percent")
    if full and control is not None:
        raise UserError(
            f"what is trained in full is chosen by scores, not by control '{control}': drop one of the two"
        )
    for what, value in (("rank", rank), ("attention rank", attention_rank), ("mlp rank", mlp_rank)):
        _check_whole(what, value)
    if budget is not None and ranks != "by-score":
        raise UserError(f"a parameter budget goes with ranks by-score, not {ranks}: drop one of the two")
    chosen = set(highest_layers(scores.layers, layers))
    if control is not None:
        chosen = set(control_layers(control, len(scores.layers), len(chosen), seed))
    names = _select(scores.modules, targets)
    modules = {name: scores.modules[name] for name in names if scores.modules[name].layer in chosen}
    if not modules:
        raise UserError(f"the targets match no module in the chosen layers {sorted(chosen)}")

    experts = scores.meta.get("experts", {})
    in_full = _highest_modules({n: m for n, m in modules.items() if n not in experts}, full) if full else {}
    modules = {name: module for name, module in modules.items() if name not in in_full}
    if not modules:
        raise UserError(
            f"a share of {full:g}% in full leaves no module for adapters: adapt more layers or targets"
        )
    shapes: dict[str, tuple[int, ...]] = {
        name: (*([len(experts[name])] if name in experts else []), module.in_features, module.out_features)
        for name, module in modules.items()
    }
    if ranks == "uniform":
        rank_of = dict.fromkeys(modules, rank)
    elif ranks == "by-type":
        by_kind = {"attention": attention_rank, "mlp": mlp_rank}
        rank_of = {name: by_kind.get(module.kind, rank) for name, module in modules.items()}
    elif ranks == "by-score":
        uniform_cost = sum(rank * _rank_cost(shape) for shape in shapes.values())
        score_of = {name: module.score for name, module in modules.items()}
        rank_of = ranks_by_score(score_of, shapes, uniform_cost if budget is None else budget)
    else:
        raise UserError(f"ranks {ranks!r} is unknown: choose uniform, by-type or by-score")
    for name, shape in shapes.items():
        _check_rank(name, rank_of[name], shape)

    return Plan(
        {
            name: ModulePlan(module_rank, _alpha(module_rank, alpha, rslora))
            for name, module_rank in rank_of.items()
        },
        num_layers=len(scores.layers),
        layer_path=scores.layer_path,
        dropout=dropout,
        meta={
            "method": scores.method,
            "control": control,
            "model": scores.meta.get("model"),
            "share": layers,
            "ranks": ranks,
            "budget": budget,
            "rslora": rslora,
            "targets": list(targets) if targets is not None else None,
            "layer_scores": list(scores.layers),
            "probe": scores.origin(),
            **({"full_share": full, "full_scores": in_full} if in_full else {}),
        },
        full=tuple(in_full),
    )


def _alpha(rank: int, alpha: float | None, rslora: bool) -> float:
    """The alpha whose alpha / rank is the scaling asked for."""
    if rslora:
        return (_RSLORA_ALPHA if alpha is None else alpha) * math.sqrt(rank)
    return 2.0 * rank if alpha is None else alpha


def uniform_plan(
    model: nn.Module,
    *,
    rank: int = 16,
    alpha: float = 32,
    layers: Collection[int] | None = None,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
) -> Plan:
    """One rank and alpha on every layer: what is usually done, and what a plan is compared with.

    Args:
        model: bare or adapted.
        layers: indices of the layers to adapt; by default all.
        targets: as in `make_plan`; by default every linear and expert parameter of the layers.

    Raises:
        UserError: a model without a known list of layers, a rank or alpha of 0 or less, a rank above a
            module's in_features + out_features, a target that matches nothing, no module in the layers.
    """
    found = find_layers(model)
    chosen = range(len(found.layers)) if layers is None else layers
    experts = [
        f"{name}.{parameter_name}"
        for name, module in _bare_modules(model).items()
        if _layer_index(f"{name}.", found.path) is not None
        for parameter_name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]
    names = _select([*(module.name for module in linear_modules(model)), *experts], targets)
    names = [name for name in names if _layer_index(name, found.path) in chosen]
    plan = Plan(
        {name: ModulePlan(rank, alpha) for name in names},
        num_layers=len(found.layers),
        layer_path=found.path,
        dropout=dropout,
        meta={"ranks": "uniform", "share": 100 * len(chosen) / len(found.layers)},
    )
    for name, shape in _shapes(model, names).items():
        _check_rank(name, rank, shape)
    return plan


def unscored_plan(
    model: nn.Module,
    *,
    control: str | None = None,
    layers: float = 100,
    seed: int = 0,
    rank: int = 16,
    alpha: float | None = None,
    rslora: bool = False,
    targets: Sequence[str] | None = None,
    dropout: float = 0.0,
) -> Plan:
    """One rank on every layer, or on as many as a control chooses: what needs no probe.

    Args:
        model: bare or adapted, on any device, the meta device too: only names and shapes are read.
        control: as in `make_plan`; without one every layer.
        layers: the share of the layers that the control chooses, in percent, in (0, 100].
        seed: of the control "random".
        rank: of every module.
        alpha: of every module; by default 2 · its rank.
        rslora: as in `make_plan`.
        targets: as in `make_plan`; by default every linear and expert parameter of the layers.
        dropout: of every adapter's input.

    Raises:
        UserError: a share without a control to choose by, a rank that is no whole number; as `uniform_plan` raises it.
    """
    _check_share(layers)
    chosen = None
    if control is not None:
        total = len(find_layers(model).layers)
        chosen = control_layers(control, total, share_of_layers(total, layers), seed)
    elif layers != 100:
        raise UserError(
            f"{layers:g}% of the layers, and nothing to choose them by: name a control, or plan from scores"
        )
    _check_whole("rank", rank)
    scaled = _alpha(rank, alpha, rslora)
    plan = uniform_plan(model, rank=rank, alpha=scaled, layers=chosen, targets=targets, dropout=dropout)
    if control is not None:
        plan.meta.update(control=control, share=layers)
    return plan


def ranks_by_score(
    scores: Mapping[str, float], shapes: Mapping[str, Sequence[int]], budget: int
) -> dict[str, int]:
    """Whole ranks in proportion to the scores that cost no more than ``budget`` trainable parameters.

    The ideal rank is t_i = min(max(λ s_i, 1), min(in_i, out_i)), with λ such that Σ t_i c_i is the budget,
    where c_i is what one rank costs. Each module gets floor(t_i); what that leaves goes, one rank a module,
    to the largest remainders that still fit. So every rank is within 1 of the ideal and, unless every module
    with a score is at its bound, less than the largest c_i is left over.

    Args:
        scores: by module name, none negative; below 1e-12 of the largest they count as 0.
        shapes: by the same names (in_features, out_features), for an expert parameter (experts, in, out).
        budget: the most trainable parameters.

    Raises:
        UserError: a budget too small for rank 1 everywhere, saying the least; a score that is negative or not
            finite; no positive score.
    """
    for name, score in scores.items():
        if not math.isfinite(score) or score < 0:
            raise UserError(f"score {score} of {name!r} cannot be shared out: it must be finite and >= 0")
    cost = {name: _rank_cost(shapes[name]) for name in scores}
    least = sum(cost.values())
    if budget < least:
        raise UserError(f"budget {budget} is too small for rank 1 on {len(scores)} modules: at least {least}")
    largest = max(scores.values())
    if largest == 0:
        raise UserError("every score is 0: there is nothing for the ranks to be in proportion to")
    # Divided by the largest, and 0 where little is left, so that λ and its products stay in range.
    share = {
        name: score / largest if score / largest > _NEGLIGIBLE else 0.0 for name, score in scores.items()
    }
    bound = {name: min(shapes[name][-2:]) for name in scores}

    def ideal(scale: float) -> dict[str, float]:
        return {name: min(max(scale * share[name], 1.0), float(bound[name])) for name in scores}

    def price(ranks: Mapping[str, float]) -> float:
        return sum(ranks[name] * cost[name] for name in scores)

    # The price is linear in λ between the points where a module leaves its lower bound or meets its upper
    # one, and never falls: find the last such point within the budget and go on from there along the line.
    corners = sorted(
        {0.0, *(corner / share[name] for name in scores if share[name] > 0 for corner in (1, bound[name]))}
    )
    last = bisect_right(corners, float(budget), key=lambda scale: price(ideal(scale))) - 1
    scale = corners[last]
    if last + 1 < len(corners):
        rise = price(ideal(corners[last + 1])) - price(ideal(scale))
        scale += (corners[last + 1] - scale) * (budget - price(ideal(scale))) / rise
    target = ideal(scale)
    # A t_i that is whole must not lose a rank to the rounding of λ, nor gain one.
    ranks = {name: math.floor(rank + _ROUNDING) for name, rank in target.items()}
    left = budget - sum(ranks[name] * cost[name] for name in scores)
    for name in sorted(scores, key=lambda name: ranks[name] - target[name]):
        if target[name] - ranks[name] > _ROUNDING and cost[name] <= left:
            ranks[name] += 1
            left -= cost[name]
    return ranks


def highest_layers(scores: Sequence[float], share: float) -> list[int]:
    """The share of the layers, in percent, with the highest scores, highest first, ties to the lower index.

    Raises:
        UserError: a score that is not finite.
    """
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise UserError(
                f"the score of layer {index} is {score}: probe again, in float32 or on other batches"
            )
    count = share_of_layers(len(scores), share)
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]


def _highest_modules(modules: Mapping[str, ModuleScore], share: float) -> dict[str, float]:
    """The scores of so many percent of the modules, those with the highest, in the modules' own order."""
    if not modules:
        raise UserError("there is no linear to train in full: expert parameters always get adapters")
    for name, module in modules.items():
        if not math.isfinite(module.score):
            raise UserError(
                f"the score of {name!r} is {module.score}: probe again, in float32 or on other batches"
            )
    ordered = sorted(modules, key=lambda name: -modules[name].score)
    highest = set(ordered[: share_of_layers(len(modules), share)])
    return {name: module.score for name, module in modules.items() if name in highest}


def share_of_layers(num_layers: int, share: float) -> int:
    """How many layers a share in percent is: the floor, but 1 at least (arXiv 2604.15351)."""
    # 1e-9: a share that was computed, such as 0.29 · 100, may fall a rounding error short of a whole layer.
    return max(math.floor(num_layers * share / 100 + 1e-9), 1)


def _check_share(share: float) -> None:
    if not is_finite(share) or not 0 < share <= 100:
        raise UserError(f"share of layers {share} is outside (0, 100] percent")


def _check_whole(what: str, value: int) -> None:
    if not is_whole(value) or value < 1:
        raise UserError(f"{what} {value} is not a whole number of 1 or more")


def _check_rank(name: str, rank: int, shape: Sequence[int]) -> None:
    # B A has rank min(in, out) at most. Up to in + out a higher one is wasteful but harmless (a rank that
    # suits the MLP meets a narrow k_proj); beyond, the adapter outweighs any module it could stand for.
    if rank > sum(shape[-2:]):
        raise UserError(
            f"rank {rank} of {name!r} is above its in + out features, {sum(shape[-2:])}: choose a lower one"
        )


def _select(names: Iterable[str], targets: Sequence[str] | None) -> list[str]:
    """The names that a target equals or ends, in their own order."""
    names = list(names)
    if targets is None:
        return names
    if isinstance(targets, str):
        raise UserError(f"targets {targets!r} is one string: give a list of names")

    def ends(name: str, target: str) -> bool:
        return name == target or name.endswith(f".{target}")

    for target in targets:
        if not any(ends(name, target) for name in names):
            there = ", ".join(dict.fromkeys(_last(name) for name in names))
            raise UserError(f"target {target!r} matches no module: there are {there}")
    return [name for name in names if any(ends(name, target) for target in targets)]


def _bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its name before any adapter was put in, in model order; "" is the model itself."""
    return dict(bare_modules(bare_model(model)))


def _shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """(in, out) of a linear, (experts, in, out) of a 3-D parameter, by name."""
    bare = _bare_modules(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        module = bare.get(name)
        owner, _, leaf = name.rpartition(".")
        parameter = dict(bare[owner].named_parameters(recurse=False)).get(leaf) if owner in bare else None
        if module is not None and is_linear(module):
            shapes[name] = linear_shape(module)
        elif parameter is not None and parameter.dim() == 3:
            experts, *sides = parameter.shape
            # Stored [experts, out, in], or [experts, in, out] where transformers says that it is transposed.
            shapes[name] = (
                experts,
                *(sides if getattr(bare[owner], "is_transposed", False) else reversed(sides)),
            )
        elif module is not None or parameter is not None:
            raise UserError(
                f"plan module {name!r} is no linear layer or expert parameter: drop it from the plan"
            )
        else:
            raise UserError(f"plan module {name!r} is not in this model: the plan was made for another")
    return shapes


def _rank_cost(shape: Sequence[int]) -> int:
    """Trainable parameters that one rank costs: a row of A and a column of B, once an expert."""
    return (shape[0] if len(shape) == 3 else 1) * (shape[-2] + shape[-1])


def _skeleton(bare: Mapping[str, nn.Module], planned: Iterable[str]) -> nn.Module:
    """The module tree with linears of the same sizes and the planned 3-D parameters, on the meta device."""
    planned = set(planned)
    copies: dict[str, nn.Module] = {}
    for name, module in bare.items():
        if is_linear(module):
            twin: nn.Module = nn.utils.skip_init(nn.Linear, *linear_shape(module), bias=False, device="meta")
        else:
            twin = nn.Module()
            for parameter_name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3:
                    meta = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                    twin.register_parameter(parameter_name, nn.Parameter(meta, requires_grad=False))
        if hasattr(module, "is_transposed"):
            twin.is_transposed = module.is_transposed
        copies[name] = twin
        if name:
            owner, _, leaf = name.rpartition(".")
            copies[owner].add_module(leaf, twin)
    root = copies[""]
    if hasattr(bare[""], "config"):
        root.config = bare[""].config  # PEFT decides by the model type whether to rewrite targets
    return root


def _adapters(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, float]]:
    """(rank, scaling) of every LoRA layer, by the name of the module or parameter in the bare model."""
    found = {}
    for name, module in bare_model(model).named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.r:
            # Wrappers of several parameters of one module are nested, each the base_layer of the one before.
            parts = [part for part in name.split(".") if part != "base_layer"]
            parameter = getattr(module, "parameter_name", None)
            found[".".join([*parts, parameter] if parameter else parts)] = (
                module.r[adapter_name],
                module.scaling[adapter_name],
            )
    return found


def _anchored(name: str) -> str:
    return "^" + re.escape(name)


def _is_causal_lm(model: nn.Module) -> bool:
    return type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _layer_index(name: str, layer_path: str) -> int | None:
    prefix = f"{layer_path}." if layer_path else ""
    match = re.match(rf"{re.escape(prefix)}(\d+)\.", name)
    return int(match[1]) if match else None


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _json_number(value: float) -> int | float:
    """PEFT types lora_alpha as int and writes it as it is: 32.0 becomes 32, 24.5 stays."""
    return int(value) if float(value).is_integer() else value
