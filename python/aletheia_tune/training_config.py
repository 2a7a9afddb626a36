"""How to train, whatever the plan: the settings of `fine_tune`, and which of them cannot be meant."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from aletheia_tune.environment import known_dtype
from aletheia_tune.errors import UserError
from aletheia_tune.number_types import check_kinds
from aletheia_tune.sampled_depth import check_odds

SCHEDULES = ("linear", "cosine", "constant")
INITS = ("default", "gradient")
# Settings that change no adapter, or its last bits at most: a training may go on with others.
FREE_SETTINGS = (
    "eval_every",
    "eval_batch_size",
    "checkpoint_every",
    "prefix_cache",
    "prefix_cache_gb",
    "threads",
    "progress",
)


@dataclass(frozen=True)
class TrainConfig:
    """How to train, whatever the plan.

    Attributes:
        steps: optimizer steps; excludes `epochs`.
        epochs: passes over the training examples; 1 when neither is given.
        batch_size: examples in one forward pass.
        gradient_accumulation: forward passes in one optimizer step.
        group_by_length: examples of like length share a batch, so that less of it is padding.
        packing: the examples of a batch lie one after another in one row, without padding, and do not attend to each
            other; the loss is that of the padded batch. What all of them begin with (a chat template's system
            message) is computed once where that changes nothing; with `prefix_cache` it is not.
        learning_rate: peak rate of AdamW (no weight decay, gradients clipped to norm 1).
        lora_plus: learning rate of the adapters' B over that of their A, which is `learning_rate` (LoRA+, arXiv
            2402.12354).
        full_rate: learning rate of what the plan trains in full over that of A.
        schedule: "linear" or "cosine" decay to zero, or "constant", each after the warm-up.
        warmup: steps of linear warm-up; below 1, the share of all steps.
        label_smoothing: share of every label that all tokens of the vocabulary, or all classes, divide among them, in
            training alone.
        init: of the adapters' A: "default" is PEFT's; "gradient" spans the leading directions of the weights'
            gradients over the first 4 batches of a shuffle of its own (`start.gradient_start`), at a cost that counts
            as training time. B begins as 0 in either.
        seed: of the adapters' initial weights, the dropout and the order of the examples.
        dtype: of the frozen weights, "bfloat16" or "float32"; "native" becomes whichever is fast here.
        adapter_dtype: "float32", or "frozen" for the dtype of the frozen weights: faster in PEFT's own forward, at the
            price of updates that round away. So it is for what is trained in full (`full.float32_weights`), which is
            saved in the frozen weights' dtype in either.
        max_length: longest example in tokens.
        kernels: run the LoRA linears and, where they serve, attention, RMS norms and rotary embeddings on this
            package's operators and the output embedding on labelled rows only; otherwise PEFT's and transformers'
            own forwards.
        gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
        prefix_cache: directory in which to keep what the layers under the lowest adapter put out; None for none.
        prefix_cache_gb: size that all its entries may have at most, in GiB.
        sampled_depth: by the index of a layer, the odds that a step's backward pass ends there; adapters of lower
            layers act in that step and are not trained by it. None trains all in every step.
        reweight_depth: divide each gradient by the probability that its layer is reached, so that before the norm is
            clipped it is unbiased.
        shrink_after: share of the steps, in percent, after which the lower layers' adapters stay as they are, acting
            in the forward pass; None trains all to the end.
        shrink_to: share of the layers, in percent, that go on learning then: those nearest to the loss.
        eval_every: optimizer steps between evaluations; None evaluates before and after only.
        eval_batch_size: examples in one forward pass of an evaluation.
        checkpoint_every: optimizer steps between checkpoints, from which `fine_tune` goes on with `resume`; None writes
            none.
        threads: CPU threads; None leaves torch's own choice.
        progress: show progress on stderr.

    Raises:
        UserError: a value that cannot be meant.
    """

    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 4
    gradient_accumulation: int = 1
    group_by_length: bool = False
    packing: bool = False
    learning_rate: float = 2e-4
    lora_plus: float = 1.0
    full_rate: float = 0.1
    schedule: str = "linear"
    warmup: float = 0.03
    label_smoothing: float = 0.0
    init: Literal["default", "gradient"] = "default"
    seed: int = 0
    dtype: Literal["native", "bfloat16", "float32"] = "native"
    adapter_dtype: Literal["float32", "frozen"] = "float32"
    max_length: int = 1024
    kernels: bool = True
    gradient_checkpointing: bool = False
    prefix_cache: str | None = None
    prefix_cache_gb: float = 8.0
    sampled_depth: Mapping[int, float] | None = None
    reweight_depth: bool = False
    shrink_after: float | None = None
    shrink_to: float = 50.0
    eval_every: int | None = None
    eval_batch_size: int = 4
    checkpoint_every: int | None = None
    threads: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        check_kinds(self)
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed is {self.seed}: give a whole number from 0 to {2**32 - 1}")
        if self.steps is not None and self.epochs is not None:
            raise UserError("steps and epochs exclude each other: give one of them")
        for name in ("steps", "epochs", "eval_every", "checkpoint_every", "threads"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} is {value}: it must be more than 0")
        for name in ("batch_size", "gradient_accumulation", "eval_batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.epochs == math.inf:
            raise UserError("epochs is inf: give a number of passes, or steps")
        if not 0 < self.prefix_cache_gb < math.inf:
            raise UserError(
                f"prefix cache of {self.prefix_cache_gb} GiB: give a size above 0 that the disk has"
            )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise UserError(f"learning rate is {self.learning_rate}: it must be a positive number")
        if not (self.lora_plus > 0 and math.isfinite(self.lora_plus)):
            raise UserError(f"lora_plus is {self.lora_plus}: it must be a positive number, 1 for equal rates")
        if not (self.full_rate > 0 and math.isfinite(self.full_rate)):
            raise UserError(f"full_rate is {self.full_rate}: it must be a positive number, 1 for equal rates")
        if not (self.warmup >= 0 and math.isfinite(self.warmup)):
            raise UserError(
                f"warmup is {self.warmup}: give a share of the steps below 1, or a number of steps"
            )
        if not 0 <= self.label_smoothing < 1:
            raise UserError(
                f"label smoothing is {self.label_smoothing}: it must be at least 0 and less than 1"
            )
        if self.schedule not in SCHEDULES:
            raise UserError(f"schedule {self.schedule!r} is unknown: choose one of {', '.join(SCHEDULES)}")
        if self.sampled_depth is not None:
            check_odds(self.sampled_depth)
        if self.shrink_after is not None:
            for name in ("shrink_after", "shrink_to"):
                if not 0 < getattr(self, name) < 100:
                    raise UserError(
                        f"{name} is {getattr(self, name)}: give a share in percent between 0 and 100"
                    )
            if self.sampled_depth is not None:
                raise UserError("sampled_depth and shrink_after exclude each other: give one of them")
        if self.init not in INITS:
            raise UserError(f"init {self.init!r} is unknown: choose one of {', '.join(INITS)}")
        object.__setattr__(self, "dtype", known_dtype(self.dtype))
        if self.adapter_dtype not in ("float32", "frozen"):
            raise UserError(f"adapter dtype {self.adapter_dtype!r} is unknown: choose float32 or frozen")
