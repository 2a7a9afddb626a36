"""The language-model head over the labelled rows only, without touching a model's source.

A causal language model usually makes logits [tokens, vocabulary] for every token, although only labelled tokens enter
the loss. Inside :func:`labelled_head` the model's output embedding hands its hidden states on as they are, and the
model's loss picks the rows that have a label and runs :func:`aletheia_kernels.linear_cross_entropy` on them, which
never holds more than a block of logits. Whatever else the model adds to its loss (a router's auxiliary loss) stays.
A model that multiplies its logits by a number (Granite, Cohere) multiplies the hidden states instead, to the same
effect. Gemma's cap on the final logits goes into the operator: the model then caps the hidden states, to no effect.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from aletheia_kernels import linear_cross_entropy
from aletheia_kernels.backends import BackendError
from aletheia_tune.errors import UserError
from aletheia_tune.layers import bare_model
from aletheia_tune.sharding import is_sharded, require_whole
from aletheia_tune.torch_state import is_hooked, version_of

_CALIBRATION_TOKENS = 8


@dataclass(frozen=True)
class LabelledHead:
    """Whether the labelled-rows head is in place, and if not, why the model runs as it is."""

    active: bool
    reason: str | None = None

    def __str__(self) -> str:
        return "labelled rows" if self.active else f"all rows: {self.reason}"


@dataclass(frozen=True)
class _Between:
    """What a model does to its logits between head and loss: a cap, a factor, or nothing."""

    softcap: float | None = None
    factor: float = 1.0

    def exact(self, logits: Tensor) -> Tensor:
        """It, in float64."""
        if self.softcap is not None:
            return self.softcap * torch.tanh(logits.double() / self.softcap)
        return self.factor * logits.double()

    def led_to(self, given: Tensor, logits: Tensor) -> bool:
        """Whether `given` is what it makes of `logits`, up to the rounding of three operations."""
        rtol = 4 * torch.finfo(logits.dtype).eps
        return torch.allclose(given.double(), self.exact(logits), rtol=rtol, atol=1e-6)


class _Head:
    """What passes between the head, which hands hidden states out, and the loss, which must get those very ones."""

    def __init__(
        self,
        head: nn.Linear,
        original_head: Callable[..., Tensor],
        original_loss: Callable[..., Tensor],
        between: _Between,
        label_smoothing: float,
    ):
        self.head = head
        self.between = between
        self.label_smoothing = label_smoothing
        self.original_head = original_head
        self.original_loss = original_loss
        self.labels_given = False
        self.handed_out: Tensor | None = None
        self.version = 0
        self.losses_computed = 0

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.labels_given:
            return self.original_head(hidden)
        self.handed_out, self.version = hidden, version_of(hidden)
        return hidden

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        *args: Any,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """transformers' causal loss (the next token's cross entropy, mean or sum / num_items) from hidden states."""
        if self.handed_out is None:
            return self.original_loss(
                logits,
                labels,
                *args,
                num_items_in_batch=num_items_in_batch,
                ignore_index=ignore_index,
                shift_labels=shift_labels,
                **kwargs,
            )
        hidden, self.handed_out = self.handed_out, None
        if version_of(hidden) != self.version or not self._came_through(logits, hidden):
            raise _TouchedLogits
        if is_sharded(self.head.weight):
            raise UserError(
                "the output embedding is sharded again by the time of the loss: leave it to the root's fully_shard, "
                "or give it reshard_after_forward=False"
            )
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(hidden.device)
        rows = (targets != ignore_index).nonzero().squeeze(1)
        # What the operator caps comes as the head handed it out; a factor is on what the model made of it.
        states = logits if self.between.softcap is None else hidden
        flat = states.reshape(-1, states.shape[-1])
        if targets.numel() != flat.shape[0]:
            raise ValueError(
                f"labels: expected one a row of hidden states ({flat.shape[0]}), got {targets.numel()}"
            )
        if rows.numel() < flat.shape[0]:
            flat, targets = flat[rows], targets[rows]
        total = linear_cross_entropy(
            flat,
            self.head.weight,
            targets,
            bias=self.head.bias,
            softcap=self.between.softcap,
            label_smoothing=self.label_smoothing,
        )
        self.losses_computed += 1
        count = rows.numel() if num_items_in_batch is None else num_items_in_batch
        if isinstance(count, Tensor):
            return total / count.to(total.device)
        return total / count if count else total * math.nan

    def _came_through(self, given: Tensor, hidden: Tensor) -> bool:
        """Whether what the loss is given is what the head handed out, and nothing done to it but what is known."""
        if self.between == _Between():
            return given is hidden
        if given.shape != hidden.shape:
            return False
        # One row tells: a cap or a factor is the same for every element.
        row, changed = (tensor.detach().reshape(-1, hidden.shape[-1])[:1] for tensor in (hidden, given))
        return self.between.led_to(changed, row)


class _TouchedLogits(Exception):
    """The model does something to the logits between head and loss."""


@contextmanager
def _instance_attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Sets an attribute on the instance and takes it off again, so that its class shows through where it did before."""
    missing = object()
    before = owner.__dict__.get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def _in_place(
    model: Any, head: nn.Linear, between: _Between, label_smoothing: float = 0.0
) -> Iterator[_Head]:
    state = _Head(head, head.forward, model.loss_function, between, label_smoothing)
    original_forward = model.forward
    signature = inspect.signature(original_forward)

    @functools.wraps(original_forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        labels = kwargs.get("labels")
        if args and labels is None:
            labels = signature.bind_partial(*args, **kwargs).arguments.get("labels")
        # In evaluation whoever gives labels may want the logits besides: metrics are made of them.
        state.labels_given, state.handed_out = labels is not None and model.training, None
        try:
            return original_forward(*args, **kwargs)
        finally:
            state.labels_given, state.handed_out = False, None

    with (
        _instance_attribute(model, "forward", forward),
        _instance_attribute(head, "forward", state.forward),
        # `loss_function` is a property of transformers' models that keeps what is set in `_loss_function`.
        _instance_attribute(model, "_loss_function", state.loss),
    ):
        yield state


def _calibration_batch(model: nn.Module, vocabulary: int) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    ids = torch.arange(_CALIBRATION_TOKENS, device=device)[None] % vocabulary
    labels = ids.clone()
    labels[0, ::3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def _between(model: Any, head: nn.Linear, batch: dict[str, Tensor]) -> _Between:
    """What the model does between head and loss, as far as it can be known; nothing where it cannot.

    Found with logits put in the place of the head's, far below and far above the cap if the configuration names one:
    a model's own, on a few tokens, may all be small.
    """
    config = getattr(model, "config", None)
    cap = None if config is None else getattr(config.get_text_config(), "final_logit_softcapping", None)
    far = 3 * cap if cap else 3.0
    given = torch.linspace(-far, far, head.out_features).to(head.weight)
    received: list[Tensor] = []

    def stand_in(hidden: Tensor) -> Tensor:
        return given.expand(*hidden.shape[:-1], -1).clone()

    def listen(logits: Tensor, *_: Any, **__: Any) -> Tensor:
        received.append(logits)
        return logits.sum()

    with _instance_attribute(head, "forward", stand_in), _instance_attribute(model, "_loss_function", listen):
        model(**batch)
    if len(received) != 1 or received[0].shape[-1] != head.out_features:
        return _Between()
    factor = float(received[0].reshape(-1, head.out_features)[0, -1] / given[-1])
    for form in (_Between(softcap=cap or None), _Between(factor=factor)):
        if form.led_to(received[0], given.expand_as(received[0])):
            return form
    return _Between()


def _examine(model: Any) -> tuple[str | None, _Between]:
    """Why this model's loss cannot be had from the labelled rows alone, None when it can; what it does to its logits.

    Found by trying: a few tokens through the model as it is and with the head in place, under equal random numbers.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        return "it has no linear output embedding", _Between()
    if not hasattr(type(model), "loss_function"):
        return "its loss function cannot be set", _Between()
    if is_hooked(head) or hasattr(head, "base_layer"):
        return "its head is hooked or adapted", _Between()
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "its head is being trained", _Between()
    batch = _calibration_batch(model, head.out_features)
    mode = model.training
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.training = (
            True  # of the model alone, not of its parts: what it does in training is what is asked
        )
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            between = _between(model, head, batch)
            state = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
            expected = float(model(**batch).loss)
            torch.set_rng_state(state[0])
            for device, cuda_state in zip(devices, state[1], strict=True):
                torch.cuda.set_rng_state(cuda_state, device)
            with _in_place(model, head, between) as tried:
                got = float(model(**batch).loss)
    except _TouchedLogits:
        return "it changes the logits between head and loss", _Between()
    except BackendError as error:
        # The backend that is forced has no such operator: the model's own head runs, and the reason says which.
        return str(error), _Between()
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        return f"it cannot run a few tokens that way ({type(error).__name__}: {error})", _Between()
    finally:
        model.training = mode
    if tried.losses_computed != 1:
        return "it does not use its settable loss function", _Between()
    # Head and loss are the same sums in another order: agreement to a few units of the logits' precision.
    precision = torch.finfo(head.weight.dtype).eps
    if not abs(got - expected) <= max(16 * precision, 1e-5) * max(1.0, abs(expected)):
        return f"its loss differs ({got:.6g} against {expected:.6g})", _Between()
    return None, between


@contextmanager
def labelled_head(model: nn.Module, *, label_smoothing: float = 0.0) -> Iterator[LabelledHead]:
    """Runs a causal language model's head and loss over the labelled rows only, while inside the context.

    Works on transformers' causal models and on such models inside PEFT, when the head is frozen, is an ``nn.Linear``
    and feeds the model's settable loss function untouched, times a number, or capped as the configuration's
    ``final_logit_softcapping`` says; a few tokens are tried at entry. Otherwise the model is left as it is and
    ``active`` is False with the reason. Inside, a call with labels in training mode returns the same loss, but hidden
    states in place of logits; a call without labels, or in evaluation mode, is as it was. So is
    ``transformers.Trainer`` with a ``label_smoothing_factor``: it keeps the labels from the model and smooths the
    logits itself. On exit the model is exactly as it was.

    Args:
        model: a causal language model from transformers, bare or in PEFT.
        label_smoothing: ε of :func:`aletheia_kernels.linear_cross_entropy`, for every loss inside.

    Yields:
        LabelledHead: whether the head is in place, and why not.

    Raises:
        UserError: the model is sharded already.
    """
    require_whole(model)
    bare = bare_model(model)
    reason, between = _examine(bare)
    if reason is not None:
        yield LabelledHead(False, reason)
        return
    with _in_place(bare, bare.get_output_embeddings(), between, label_smoothing):
        yield LabelledHead(True)
