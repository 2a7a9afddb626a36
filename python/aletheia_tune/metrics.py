"""What a training measured: every step, every evaluation, and their form in JSON."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel

from aletheia_tune.errors import UserError

NO_PREFIX_CACHE = "none: no directory was given"
NO_PACKING = "none: batches are padded"


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: counted from 1.
        seconds: training time from the start to the end of this step, a start from the gradient with it and
            evaluation left out.
        step_seconds: time of this step alone.
        loss: mean over the step's labelled tokens, before its update.
        learning_rate: at which the update of A was made.
        grad_norm: L2 norm of all gradients before clipping.
        tokens: tokens in the step's batches, padding left out.
        forward_seconds: of `step_seconds`, the forward passes and the loss; None on an accelerator, which computes
            while the clock of this process runs on.
        backward_seconds: of `step_seconds`, the backward passes; the rest is clipping and the update.
    """

    step: int
    seconds: float
    step_seconds: float
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    forward_seconds: float | None = None
    backward_seconds: float | None = None


@dataclass(frozen=True)
class EvalRecord:
    """Held-out loss per label (a token; of a classifier a text) after `step` updates and `seconds` of training.

    `accuracy` is a classifier's: the share of held-out texts whose own class has the largest logit.
    """

    step: int
    seconds: float
    loss: float
    accuracy: float | None = None


@dataclass(frozen=True)
class TrainResult:
    """What `fine_tune` did and measured.

    Attributes:
        history: every optimizer step.
        evals: every evaluation, the first before training (step 0).
        trainable_parameters: number of weights trained, in adapters and in full, a classifier's head with them.
        peak_memory_mb: largest resident memory of the process, in MiB; on an accelerator, its allocated memory.
        patch_report: "summary" and, under "modules", each LoRA module's path and reason; None without kernels.
        head: over which rows the output embedding and the loss ran, "labelled rows" or "all rows" and why.
        attention: what computed attention in training, "operator" or "the model's own" and why.
        norms: how many norms and whether the rotary embedding ran on the operators, and why not the rest.
        prefix_layers: layers that ran without an autograd graph; where training shrank, from then on.
        setup_seconds: from the plan to the first evaluation, but for a start from the gradient: adapters attached,
            forwards patched.
        prefix_cache: how many examples' prefix was read, computed and kept, and computed anew; or why there was none.
        packing: whether what all examples of a packed batch begin with was computed once, and why not.
        stopped: why training ended early; None when it ran to its end.
        config: the `TrainConfig` as a dictionary.
        versions: of Python and the packages.
        classes: of a classifier, by number; None of another model.
        model: the trained PEFT model, its forwards PEFT's own again; None when read from JSON.
    """

    history: tuple[StepRecord, ...]
    evals: tuple[EvalRecord, ...]
    trainable_parameters: int
    peak_memory_mb: float
    patch_report: dict[str, Any] | None
    head: str
    attention: str
    norms: str
    prefix_layers: int
    stopped: str | None
    config: dict[str, Any]
    versions: dict[str, str]
    setup_seconds: float = 0.0
    prefix_cache: str = NO_PREFIX_CACHE
    packing: str = NO_PACKING
    classes: tuple[str, ...] | None = None
    model: PeftModel | None = field(default=None, repr=False, compare=False)

    @property
    def eval_loss_before(self) -> float | None:
        """Held-out loss per label of the model before the first update."""
        return self.evals[0].loss if self.evals else None

    @property
    def eval_loss_after(self) -> float | None:
        """Held-out loss per label after the last step; None if training stopped early."""
        return None if self._last_eval is None else self._last_eval.loss

    @property
    def eval_accuracy_before(self) -> float | None:
        """A classifier's held-out accuracy before the first update."""
        return self.evals[0].accuracy if self.evals else None

    @property
    def eval_accuracy_after(self) -> float | None:
        """A classifier's held-out accuracy after the last step; None if training stopped early."""
        return None if self._last_eval is None else self._last_eval.accuracy

    @property
    def _last_eval(self) -> EvalRecord | None:
        if self.stopped or not self.evals or not self.history or self.evals[-1].step != self.history[-1].step:
            return None
        return self.evals[-1]

    @property
    def step_seconds(self) -> float | None:
        """Median time of a step in seconds, evaluation left out."""
        return statistics.median(record.step_seconds for record in self.history) if self.history else None

    @property
    def seconds_by_part(self) -> dict[str, float] | None:
        """Median seconds of a step's "forward", "backward" and "update"; None where they were not measured."""
        steps = [
            (record.forward_seconds, record.backward_seconds, record.step_seconds)
            for record in self.history
            if record.forward_seconds is not None and record.backward_seconds is not None
        ]
        if not steps:
            return None
        return {
            "forward": statistics.median(forward for forward, _, _ in steps),
            "backward": statistics.median(backward for _, backward, _ in steps),
            "update": statistics.median(whole - forward - backward for forward, backward, whole in steps),
        }

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens trained on, padding left out, by second of training time."""
        if not self.history:
            return None
        return sum(record.tokens for record in self.history) / self.history[-1].seconds

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, in JSON's types; derived figures are in it for readers of the file."""
        return {
            "format": "aletheia-metrics",
            "version": 1,
            "stopped": self.stopped,
            "eval_loss_before": self.eval_loss_before,
            "eval_loss_after": self.eval_loss_after,
            "eval_accuracy_before": self.eval_accuracy_before,
            "eval_accuracy_after": self.eval_accuracy_after,
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.tokens_per_second,
            "trainable_parameters": self.trainable_parameters,
            "prefix_layers": self.prefix_layers,
            "setup_seconds": self.setup_seconds,
            "prefix_cache": self.prefix_cache,
            "packing": self.packing,
            "head": self.head,
            "attention": self.attention,
            "norms": self.norms,
            "peak_memory_mb": self.peak_memory_mb,
            "config": self.config,
            "versions": self.versions,
            "classes": None if self.classes is None else list(self.classes),
            "patch_report": self.patch_report,
            "evals": [dataclasses.asdict(record) for record in self.evals],
            "history": [dataclasses.asdict(record) for record in self.history],
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TrainResult:
        """The result that `to_dict` described, without its model.

        Raises:
            UserError: not such a dictionary.
        """
        try:
            if (values["format"], values["version"]) != ("aletheia-metrics", 1):
                raise UserError("these are not aletheia metrics of version 1")
            return TrainResult(
                history=tuple(StepRecord(**record) for record in values["history"]),
                evals=tuple(EvalRecord(**record) for record in values["evals"]),
                trainable_parameters=values["trainable_parameters"],
                peak_memory_mb=values["peak_memory_mb"],
                patch_report=values["patch_report"],
                head=values["head"],
                attention=values["attention"],
                norms=values["norms"],
                prefix_layers=values["prefix_layers"],
                prefix_cache=values.get("prefix_cache", NO_PREFIX_CACHE),
                packing=values.get("packing", NO_PACKING),
                stopped=values["stopped"],
                config=values["config"],
                versions=values["versions"],
                setup_seconds=values.get("setup_seconds", 0.0),
                classes=None if values.get("classes") is None else tuple(values["classes"]),
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"these are not aletheia metrics of version 1: {error}") from error
