"""What a training step of any plan takes on this machine: seconds and bytes, from a few timed steps.

A step is linear in what it computes. With T tokens in the batch, F_l the FLOPs of layer l's forward pass (its
linears and its attention) and, for every adapted module m, w_m = T (in_m + out_m) the numbers that its adapter reads
and writes and r_m w_m half the FLOPs of one pass through it,

    forward   = a Σ_l F_l + b Σ_m w_m + c Σ_m r_m w_m
    backward  = d labelled + e Σ_{l ≥ lowest} F_l + f Σ_m w_m + g Σ_m r_m w_m
    head      = h labelled
    update    = i + j Σ_m r_m (in_m + out_m)

A module trained in full has, in the place of an adapter, its weight's gradient: a product of as many FLOPs as its
forward pass, at the price e of the backward pass's other product, and in_m out_m numbers to update. What rounding its
weight takes, and the rounded copy, are not counted.

The parts are timed apart on a handful of plans and each is fitted by least squares with no coefficient below zero,
so that no plan gets cheaper by more work. The bytes of the tensors that autograd keeps are counted, not timed, and
fitted likewise. The backward pass counts the lowest layer that trains whole.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aletheia_tune.environment import versions
from aletheia_tune.errors import UserError
from aletheia_tune.full import float32_weights
from aletheia_tune.kernels import use_kernels
from aletheia_tune.layers import bare_model, find_layers, kind_of, linears
from aletheia_tune.number_types import is_finite, is_whole
from aletheia_tune.plan import ModulePlan, Plan
from aletheia_tune.prefix import cut_prefix
from aletheia_tune.quantised import stored_bytes, stored_parameters

FORMAT = "aletheia-cost"
VERSION = 1

# What is trained, its gradients and AdamW's two moments, all fp32.
_ADAPTER_BYTES = 4
_GRADIENT_AND_MOMENT_BYTES = 12


@dataclass(frozen=True)
class Batch:
    """The shape of a batch: sequences, tokens in each, and the share of all tokens that is trained on.

    Raises:
        UserError: fewer than one sequence or two tokens, or a share outside (0, 1].
    """

    size: int = 4
    length: int = 512
    labelled: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 1 or self.length < 2:
            raise UserError(
                f"batch {self.size} x {self.length} is too small: give 1 sequence of 2 tokens or more"
            )
        if not 0 < self.labelled <= 1:
            raise UserError(f"labelled share {self.labelled} is outside (0, 1]")

    @property
    def tokens(self) -> int:
        return self.size * self.length


@dataclass(frozen=True)
class ModuleShape:
    """A linear or a stacked expert parameter: weights [copies, out, in], of which each token passes ``uses``."""

    layer: int
    in_features: int
    out_features: int
    kind: str
    copies: int = 1
    uses: int = 1


@dataclass(frozen=True)
class ModelShape:
    """What the prediction needs to know of a model.

    Attributes:
        modules: everything that can be adapted, by its name in the bare model, in model order.
        num_layers: transformer layers.
        layer_path: dotted name of their list.
        attention_width: heads times their size.
        weight_bytes: of all frozen parameters, each once.
    """

    modules: dict[str, ModuleShape]
    num_layers: int
    layer_path: str
    attention_width: int
    weight_bytes: int

    @staticmethod
    def of(model: nn.Module) -> ModelShape:
        """The shape of a model that has no adapters yet.

        Raises:
            UserError: no known list of layers.
        """
        layers = find_layers(model)
        config: Any = getattr(bare_model(model), "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        modules = {
            linear.name: ModuleShape(linear.layer, linear.in_features, linear.out_features, linear.kind)
            for linear, _ in linears(model)
        }
        for index, layer in enumerate(layers.layers):
            for inner, module in layer.named_modules():
                for leaf, parameter in module.named_parameters(recurse=False):
                    if parameter.dim() == 3:
                        name = ".".join(part for part in (layers.path, str(index), inner, leaf) if part)
                        experts, rows, columns = parameter.shape
                        turned = getattr(module, "is_transposed", False)
                        modules[name] = ModuleShape(
                            index,
                            rows if turned else columns,
                            columns if turned else rows,
                            kind_of(name, layers.path),
                            experts,
                            getattr(config, "num_experts_per_tok", None) or experts,
                        )
        hidden = getattr(config, "hidden_size", 0)
        heads = getattr(config, "num_attention_heads", 0)
        return ModelShape(
            modules,
            len(layers.layers),
            layers.path,
            heads * (getattr(config, "head_dim", None) or (hidden // heads if heads else 0)),
            stored_bytes(model),
        )

    def forward_flops(self, batch: Batch) -> list[float]:
        """FLOPs of the forward pass of each layer: 2 for a weight and token, attention over the keys before a token."""
        flops = [2.0 * batch.tokens * batch.length * self.attention_width] * self.num_layers
        for name, module in self.modules.items():
            flops[module.layer] += self.product_flops(name, batch)
        return flops

    def product_flops(self, name: str, batch: Batch) -> float:
        """FLOPs of a module's forward pass, and of each of the two products of its backward pass."""
        module = self.modules[name]
        return 2.0 * batch.tokens * module.uses * module.in_features * module.out_features

    def traffic(self, name: str, batch: Batch) -> float:
        """w_m: the numbers that enter and leave a module."""
        module = self.modules[name]
        return float(batch.tokens * module.uses * (module.in_features + module.out_features))

    def rank_parameters(self, name: str) -> int:
        """Trainable numbers that one rank of a module's adapter has."""
        module = self.modules[name]
        return module.copies * (module.in_features + module.out_features)

    def weights(self, name: str) -> int:
        """Numbers in a module's weight."""
        module = self.modules[name]
        return module.copies * module.in_features * module.out_features


@dataclass(frozen=True)
class Coefficients:
    """Seconds by unit of work (see the module's formulas), and bytes by unit of what autograd keeps.

    ``forward`` and ``backward`` by FLOP of the layers' forward pass, ``*_traffic`` by number that enters or leaves an
    adapted module, ``*_rank`` by that times the rank, ``head*`` by labelled token, ``update`` a step and
    ``update_parameter`` by trainable parameter. ``kept`` by number that enters or leaves a module above the cut,
    ``kept_rank`` by rank and token, ``kept_head`` by labelled token.
    """

    forward: float
    forward_traffic: float
    forward_rank: float
    head: float
    head_backward: float
    backward: float
    backward_traffic: float
    backward_rank: float
    update: float
    update_parameter: float
    kept_head: float
    kept: float
    kept_rank: float


@dataclass(frozen=True)
class Phases:
    """Seconds of the parts of one measured step: ``head`` is all of the forward call outside the layers."""

    forward: float
    head: float
    backward: float
    update: float

    @property
    def seconds(self) -> float:
        return self.forward + self.head + self.backward + self.update


@dataclass(frozen=True)
class StepCost:
    """What a step of a plan is predicted to take.

    Attributes:
        seconds: of the whole step.
        bytes: held at the end of the forward pass.
        seconds_by_part: "prefix forward" (under the lowest layer that trains), "forward", "head", "backward" (weight
            gradients of what is trained in full among it), "adapters" (forward and backward), "update"; they add up
            to ``seconds``.
        bytes_by_part: "weights", "adapters" (with the float32 weights of what is trained in full), "gradients and
            moments", "activations"; they add up to ``bytes``.
    """

    seconds: float
    bytes: float
    seconds_by_part: dict[str, float]
    bytes_by_part: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """A machine's prices for a model, as `calibrate` measured them.

    Attributes:
        shape: of the model.
        batch: that was timed.
        coefficients: prices.
        meta: machine, versions, dtype, and the measured plans with their residuals.
    """

    shape: ModelShape
    batch: Batch
    coefficients: Coefficients
    meta: dict[str, Any]

    def to_json(self) -> str:
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Calibration:
        """Reads what `to_json` wrote.

        Raises:
            UserError: broken JSON, another format or version, a field missing or of the wrong kind.
        """
        again = "run `aletheia cost` again"
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"calibration: not JSON ({error}); give a file that `aletheia cost` wrote"
            ) from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError("calibration: not a calibration; give a file that `aletheia cost` wrote")
        if content.get("version") != VERSION:
            raise UserError(
                f"calibration: version {content.get('version')!r} is not known here (known: {VERSION}); {again}"
            )
        try:
            shape = dict(content["shape"])
            modules = {name: _module_shape(values) for name, values in shape.pop("modules").items()}
            whole = {key: _whole(shape[key]) for key in ("num_layers", "attention_width", "weight_bytes")}
            path = shape["layer_path"]
            if not isinstance(path, str) or not modules:
                raise ValueError("no modules, or no path of the layers")
            if any(module.layer >= whole["num_layers"] for module in modules.values()):
                raise ValueError("a module stands in a layer that is not there")
            batch = content["batch"]
            return Calibration(
                ModelShape(modules, layer_path=path, **whole),
                Batch(_whole(batch["size"]), _whole(batch["length"]), _price(batch["labelled"])),
                Coefficients(**{key: _price(value) for key, value in content["coefficients"].items()}),
                dict(content["meta"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"calibration: a field is missing or broken ({error!r}); {again}") from None

    def adapter_seconds(self, name: str, rank: int, batch: Batch | None = None) -> float:
        """What the adapter of one module adds to a step, its share of the update included; 0 for rank 0."""
        if rank == 0:
            return 0.0
        price, traffic = self.coefficients, self.shape.traffic(name, batch or self.batch)
        return (
            (price.forward_traffic + price.backward_traffic) * traffic
            + (price.forward_rank + price.backward_rank) * rank * traffic
            + price.update_parameter * rank * self.shape.rank_parameters(name)
        )

    def backward_seconds(self, batch: Batch | None = None) -> list[float]:
        """What the activation gradient of each frozen layer takes, where it is computed."""
        return [self.coefficients.backward * flops for flops in self.shape.forward_flops(batch or self.batch)]

    def forward_seconds(self, batch: Batch | None = None) -> list[float]:
        """What the forward pass of each frozen layer takes."""
        return [self.coefficients.forward * flops for flops in self.shape.forward_flops(batch or self.batch)]

    def fixed_seconds(self, batch: Batch | None = None) -> float:
        """What every plan pays: head, loss, and the constant part of the update."""
        batch = batch or self.batch
        price = self.coefficients
        return (price.head + price.head_backward) * batch.tokens * batch.labelled + price.update


def predict(
    plan: Plan, calibration: Calibration, batch: Batch | None = None, *, cached: float = 0.0
) -> StepCost:
    """Seconds and bytes of one training step of a plan.

    Args:
        plan: for the calibrated model.
        calibration: of this machine.
        batch: by default the one that was timed. Others are extrapolated in FLOPs and tokens.
        cached: share of the steps that find the output of the layers under the lowest adapter in a cache and do not
            compute it, 0 to 1: with the cache on for E epochs, (E - 1) / E. Reading it back is not charged.

    Raises:
        UserError: a module that the calibration does not know, or a share outside [0, 1].
    """
    shape, price = calibration.shape, calibration.coefficients
    batch = batch or calibration.batch
    check_cached(cached)
    for name in (*plan.modules, *plan.full):
        if name not in shape.modules:
            raise UserError(f"the calibration knows no module {name!r}: calibrate with the plan's own model")
    lowest = _lowest(shape, plan)
    labelled = batch.tokens * batch.labelled
    forward = calibration.forward_seconds(batch)
    in_adapters = sum(module.rank * shape.rank_parameters(name) for name, module in plan.modules.items())
    parameters = in_adapters + sum(shape.weights(name) for name in plan.full)
    update = price.update + price.update_parameter * parameters
    seconds = {
        "prefix forward": (1 - cached) * sum(forward[:lowest]),
        "forward": sum(forward[lowest:]),
        "head": (price.head + price.head_backward) * labelled,
        "backward": sum(calibration.backward_seconds(batch)[lowest:])
        + price.backward * sum(shape.product_flops(name, batch) for name in plan.full),
        "adapters": sum(
            calibration.adapter_seconds(name, module.rank, batch) for name, module in plan.modules.items()
        )
        - price.update_parameter * in_adapters,
        "update": update,
    }
    kept = _kept_features(shape, plan, batch)
    held = {
        "weights": float(shape.weight_bytes),
        "adapters": float(_ADAPTER_BYTES * parameters),
        "gradients and moments": float(_GRADIENT_AND_MOMENT_BYTES * parameters),
        "activations": price.kept_head * kept[0] + price.kept * kept[1] + price.kept_rank * kept[2],
    }
    return StepCost(sum(seconds.values()), sum(held.values()), seconds, held)


def calibration_plans(shape: ModelShape) -> dict[str, Plan]:
    """The plans to time: they differ in depth, rank and kind of module, so that no two prices are confounded."""
    everything, layers = list(shape.modules), shape.num_layers
    attention = [name for name, module in shape.modules.items() if module.kind == "attention"]

    def of(names: Sequence[str], rank: int) -> Plan:
        ranks = {name: min(rank, _largest_rank(shape.modules[name])) for name in names}
        modules = {name: ModulePlan(own, 2.0 * own) for name, own in ranks.items()}
        return Plan(modules, layers, shape.layer_path)

    def above(lowest: int) -> list[str]:
        return [name for name in everything if shape.modules[name].layer >= lowest]

    plans = {
        "uniform, rank 16": of(everything, 16),
        "uniform, rank 64": of(everything, 64),
        "upper half, rank 16": of(above(layers // 2), 16),
        "top quarter, rank 16": of(above(layers - max(layers // 4, 1)), 16),
    }
    if 0 < len(attention) < len(everything):
        plans["attention only, rank 16"] = of(attention, 16)
    return plans


def calibrate(model: nn.Module, batch: Batch | None = None, *, rounds: int = 3) -> Calibration:
    """Times a few plans on copies of a model that share its weights, and fits the prices.

    Args:
        model: a causal language model without adapters, on the device and in the dtype to train in; not changed.
        batch: the shape to time; made of random tokens, the end of each sequence labelled.
        rounds: timed steps of each plan, after one that is not counted.

    Raises:
        UserError: a model with adapters or without known layers.
    """
    batch = batch or Batch()
    began = time.perf_counter()
    shape = ModelShape.of(model)
    plans = calibration_plans(shape)
    with timed_plans(model, list(plans.values()), batch) as timed:
        kept = [each.kept_bytes() for each in timed]
        records = interleaved(timed, rounds)
    calibration = fit(shape, batch, plans, records, kept)
    parameter = next(model.parameters())
    calibration.meta.update(
        {
            "machine": platform.processor() or platform.machine(),
            "processors": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else "cpu",
            "dtype": str(parameter.dtype).removeprefix("torch."),
            "versions": versions(),
            "seconds": time.perf_counter() - began,
        }
    )
    return calibration


def fit(
    shape: ModelShape,
    batch: Batch,
    plans: Mapping[str, Plan],
    records: Sequence[Sequence[Phases]],
    kept: Sequence[int],
) -> Calibration:
    """The prices that explain measured plans best, from the medians of their steps.

    Args:
        shape: of the model.
        batch: that was timed.
        plans: by name, which the result's ``meta["plans"]`` shows with measured and fitted seconds.
        records: the steps of each plan.
        kept: bytes that autograd kept in each plan's step.
    """
    parts = {field.name: [_median(r, field.name) for r in records] for field in fields(Phases)}
    flops = shape.forward_flops(batch)
    labelled = batch.tokens * batch.labelled
    rows = []
    for plan in plans.values():
        traffic = {name: shape.traffic(name, batch) for name in plan.modules}
        rows.append(
            {
                "flops above": sum(flops[_lowest(shape, plan) :]),
                "traffic": sum(traffic.values()),
                "rank": sum(module.rank * traffic[name] for name, module in plan.modules.items()),
                "parameters": sum(m.rank * shape.rank_parameters(name) for name, m in plan.modules.items()),
            }
        )
    forward = _fit([[sum(flops), row["traffic"], row["rank"]] for row in rows], parts["forward"])
    backward = _fit(
        [[labelled, row["flops above"], row["traffic"], row["rank"]] for row in rows], parts["backward"]
    )
    update = _fit([[1.0, row["parameters"]] for row in rows], parts["update"])
    held = _fit([_kept_features(shape, plan, batch) for plan in plans.values()], kept)
    # In the order of the fields.
    prices = [*forward, statistics.median(parts["head"]) / labelled, *backward, *update, *held]
    coefficients = Coefficients(
        **{field.name: price for field, price in zip(fields(Coefficients), prices, strict=True)}
    )
    calibration = Calibration(shape, batch, coefficients, {})
    calibration.meta["plans"] = {
        name: {
            "measured_s": statistics.median(phases.seconds for phases in record),
            "fitted_s": predict(plan, calibration).seconds,
        }
        for (name, plan), record in zip(plans.items(), records, strict=True)
    }
    return calibration


class TimedPlan:
    """A plan's adapters on a copy of a model that shares its weights, on this package's kernels, ready to step."""

    def __init__(self, model: nn.Module, plan: Plan, batch: dict[str, Tensor], undo: ExitStack) -> None:
        frozen = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        twin: Any = copy.deepcopy(model, dict(frozen))
        self._model: Any = plan.wrap(twin)
        self._model.train()
        example = {name: tensor[:1, :16] for name, tensor in batch.items() if name != "labels"}
        undo.callback(cut_prefix(self._model).remove)
        undo.enter_context(float32_weights(self._model))
        undo.enter_context(use_kernels(self._model, example_inputs=example))
        self._batch = batch
        self._adapters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._frozen = {
            tensor.untyped_storage().data_ptr()
            for module in self._model.modules()
            for tensor in stored_parameters(module).values()
        }
        self._optimizer = torch.optim.AdamW(self._adapters, lr=1e-4, weight_decay=0.0, fused=True)
        layers = find_layers(self._model).layers
        self._marks = [0.0, 0.0]
        layers[0].register_forward_pre_hook(lambda *_: self._mark(0))
        layers[-1].register_forward_hook(lambda *_: self._mark(1))

    def step(self) -> Phases:
        """One step: forward, backward, clipping, AdamW."""
        start = self._now()
        loss = self._model(**self._batch, use_cache=False).loss
        forward_done = self._now()
        loss.backward()
        backward_done = self._now()
        torch.nn.utils.clip_grad_norm_(self._adapters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        done = self._now()
        layers = self._marks[1] - self._marks[0]
        return Phases(
            layers, forward_done - start - layers, backward_done - forward_done, done - backward_done
        )

    def kept_bytes(self) -> int:
        """Bytes of the distinct tensors that autograd keeps for the backward pass, parameters left out."""
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._frozen:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            # The loss holds what was packed: as long as it lives, no storage is handed out a second time.
            loss = self._model(**self._batch, use_cache=False).loss
        kept = sum(storages.values())
        del loss
        return kept

    def _mark(self, index: int) -> None:
        self._marks[index] = self._now()

    def _now(self) -> float:
        if self._batch["input_ids"].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def timed_plans(model: nn.Module, plans: Sequence[Plan], batch: Batch) -> Iterator[list[TimedPlan]]:
    """Several plans side by side in this process, so that they can be timed in turn; gone when the context ends."""
    data = _random_batch(model, batch)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as undo:
        # PEFT freezes the weights that the copies share.
        undo.callback(lambda: [parameter.requires_grad_() for parameter in trainable])
        yield [TimedPlan(model, plan, data, undo) for plan in plans]


def interleaved(timed: Sequence[TimedPlan], rounds: int) -> list[list[Phases]]:
    """Steps of every plan in turn, so that what slows the machine slows them alike; a first round is not counted."""
    records: list[list[Phases]] = [[] for _ in timed]
    for index in range(rounds + 1):
        for record, each in zip(records, timed, strict=True):
            phases = each.step()
            if index:
                record.append(phases)
    return records


def uniform_of(shape: ModelShape, rank: int) -> Plan:
    """`plan.uniform_plan` from a model's shape alone: one rank on every module."""
    modules = {name: ModulePlan(rank, 2.0 * rank) for name in shape.modules}
    return Plan(modules, shape.num_layers, shape.layer_path, meta={"ranks": "uniform", "share": 100})


def _lowest(shape: ModelShape, plan: Plan) -> int:
    """The lowest layer of which something is trained: where the backward pass ends."""
    return min(shape.modules[name].layer for name in (*plan.modules, *plan.full))


def _kept_features(shape: ModelShape, plan: Plan, batch: Batch) -> list[float]:
    lowest = _lowest(shape, plan)
    above = sum(shape.traffic(n, batch) for n, module in shape.modules.items() if module.layer >= lowest)
    ranks = sum(batch.tokens * shape.modules[n].uses * module.rank for n, module in plan.modules.items())
    return [batch.tokens * batch.labelled, above, float(ranks)]


def _fit(features: Sequence[Sequence[float]], measured: Sequence[float]) -> list[float]:
    """Coefficients of 0 or more of least squared relative error.

    Exact: with at most four columns, every set of columns that may be above zero is tried.
    """
    matrix = np.asarray(features, dtype=float) / np.asarray(measured, dtype=float)[:, None]
    scale = np.abs(matrix).max(axis=0)
    scale[scale == 0] = 1.0
    matrix = matrix / scale
    ones = np.ones(len(measured))
    columns = matrix.shape[1]
    best, best_error = np.zeros(columns), math.inf
    for count in range(1, columns + 1):
        for chosen in itertools.combinations(range(columns), count):
            part = np.linalg.lstsq(matrix[:, chosen], ones, rcond=None)[0]
            error = float(np.square(matrix[:, chosen] @ part - ones).sum())
            # More columns only where they explain more than rounding does.
            if (part >= 0).all() and error < best_error - 1e-12:
                best, best_error = np.zeros(columns), error
                best[list(chosen)] = part
    return [float(value) for value in best / scale]


def _random_batch(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    embedding: Any = bare_model(model)
    rows = embedding.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(rows.shape[0], (batch.size, batch.length), generator=generator)
    labels = ids.clone()
    # A label is predicted from the token before, so the first of a sequence never counts.
    labels[:, : batch.length - max(round(batch.labelled * batch.length), 1)] = -100
    return {"input_ids": ids.to(rows.device), "labels": labels.to(rows.device)}


def _largest_rank(module: ModuleShape) -> int:
    return module.in_features + module.out_features


def _median(record: Sequence[Phases], part: str) -> float:
    return statistics.median(getattr(phases, part) for phases in record)


def check_cached(cached: float) -> None:
    """Refuses a share of steps outside [0, 1] with a `UserError`."""
    if not 0 <= cached <= 1:
        raise UserError(f"cached share {cached} of the steps is outside [0, 1]")


def _module_shape(values: Mapping[str, Any]) -> ModuleShape:
    numbers = {key: _whole(value) for key, value in values.items() if key != "kind"}
    if not isinstance(values["kind"], str) or numbers["in_features"] < 1 or numbers["out_features"] < 1:
        raise ValueError(f"no shape of a module: {dict(values)}")
    return ModuleShape(kind=values["kind"], **numbers)


def _whole(value: Any) -> int:
    if not is_whole(value) or value < 0:
        raise ValueError(f"expected a whole number of 0 or more, got {value!r}")
    return value


def _price(value: Any) -> float:
    if not is_finite(value) or value < 0:
        raise ValueError(f"expected a number of 0 or more, got {value!r}")
    return float(value)
