"""Whether a model keeps the examples of a packed row apart, and joins each to a shared beginning, found by trying.

A packed row has no padding. Where its examples have nothing in common it has no mask either: where one begins is told
by positions that start again at 0, from which transformers builds a mask or key ranges. A model that takes its
positions or its mask from elsewhere (ALiBi, recurrent layers, a key-value cache in use) would let examples read each
other without an error, or leave them without their beginning.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aletheia_tune.attention import NAME as OPERATOR
from aletheia_tune.data import IGNORED
from aletheia_tune.errors import UserError
from aletheia_tune.layers import bare_model
from aletheia_tune.lora_layers import undisturbed
from aletheia_tune.packing import PackingCollator

_LENGTH = 8
_COMMON = 4
_SEED = 0
_ROUNDING = 4
_SHARE = 0.25
_CHOICES_OF_KEYS = ("keep_window_size", "index_topk", "index_block_size", "index_topk_blocks")
# What models say to inputs that they do not know.
_REFUSALS = (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError)


def require_separation(model: nn.Module) -> None:
    """Runs a packed row of two examples of 8 tokens, in the way that training and evaluation run the model.

    In training mode the second example's logits must not depend on the first one's tokens, within 4 roundings of the
    model's dtype. In evaluation mode they must be those of the second example alone. There the two runs differ in
    shape, so rounding grows with the model's depth; a yardstick for it is what the first example does to the second
    when both are one text: a quarter of that is allowed. The model and the random numbers are left as they were.

    So few tokens do not show a model that chooses keys by their place in a long row (Doge's `keep_window_size`, the
    indexers of sparse attention): it is known by its configuration.

    Args:
        model: a causal language model, bare or in PEFT, as it will be trained.

    Raises:
        UserError: the model cannot run a packed row, or does not keep its examples apart.
    """
    name = type(bare_model(model)).__name__
    config = bare_model(model).config.get_text_config()
    for choice in _CHOICES_OF_KEYS:
        if getattr(config, choice, None) is not None:
            raise UserError(
                f"{name} chooses keys by their place in a row ({choice}), across the examples of a packed batch: train "
                "without packing"
            )
    row = _tokens(model, 2 * _LENGTH)
    other = torch.cat([_others(model, row[:_LENGTH]), row[_LENGTH:]])
    positions = torch.arange(_LENGTH, device=row.device)

    def second(ids: Tensor, training: bool, packed: bool = True) -> Tensor:
        position_ids = (
            positions.repeat(len(ids) // _LENGTH) if packed else torch.arange(len(ids), device=ids.device)
        )
        batch = {"input_ids": ids[None], "position_ids": position_ids[None]}
        return _logits(model, batch, training)[-_LENGTH:]

    try:
        with undisturbed(model):
            kept, changed = second(row, True), second(other, True)
            packed, alone = second(row, False), second(row[_LENGTH:], False)
            one_text = second(row, False, packed=False)
    except _REFUSALS as error:
        raise UserError(
            f"{name} cannot run a packed batch ({type(error).__name__}: {error}): train without packing"
        ) from error
    rounding = _rounding(model)
    bound = torch.maximum(rounding * alone.abs().max(), _SHARE * (one_text - alone).abs().max())
    for got, expected, allowed in (
        (kept, changed, rounding * changed.abs().max()),
        (packed, alone, bound),
    ):
        if not (got - expected).abs().max() <= allowed:
            raise UserError(
                f"{name} does not keep the examples of a packed batch apart: train without packing"
            )


def why_not_shared(model: nn.Module, longest: int) -> str:
    """Why a packed row cannot have what its examples begin with once; empty if it can.

    Runs two examples of 8 tokens of which the first 4 are the same, in training mode. The logits must be those of a row
    that has the 4 tokens twice, within a quarter of what other tokens in their place do to them, and the second
    example's must not depend on the first one's own tokens. The model and the random numbers are left as they were.

    Attention has to be SDPA or this package's operator: others read no mask of this form, or fail on it.

    Args:
        model: one that has passed `require_separation`.
        longest: tokens of the longest example.
    """
    config = bare_model(model).config.get_text_config()
    attention = config._attn_implementation
    if attention not in ("sdpa", OPERATOR):
        return f"the model's attention is {attention}, not sdpa"
    # One mask is given for all layers.
    for name in ("sliding_window", "attention_chunk_size"):
        width = getattr(config, name, None)
        if width is not None and 0 <= width < longest:
            return f"{name} is {width} and an example has {longest} tokens"
    if getattr(config, "output_router_logits", False):
        return "the routers' loss counts tokens"
    common, first, second, other = _tokens(model, 4 * _COMMON).split(_COMMON)

    def logits(share: bool, beginning: Tensor, *rests: Tensor) -> Tensor:
        rows = [torch.cat([beginning, rest]).tolist() for rest in rests]
        batch = PackingCollator(share)([{"input_ids": row, "labels": [IGNORED] * len(row)} for row in rows])
        batch.pop("labels")
        return _logits(model, {name: value.to(common.device) for name, value in batch.items()}, training=True)

    try:
        with undisturbed(model):
            torch.manual_seed(_SEED)
            state = _random_state(model)
            plain = logits(False, common, first, second)
            if any(not torch.equal(*pair) for pair in zip(state, _random_state(model), strict=True)):
                return "training draws random numbers, for dropout or the like"
            effect = logits(False, _others(model, common), first, second) - plain
            shared, changed = logits(True, common, first, second), logits(True, common, other, second)
    except _REFUSALS as error:
        return f"{type(error).__name__}: {error}"
    rounding = _rounding(model) * plain.abs().max()
    plain = torch.cat([plain[:_LENGTH], plain[-_COMMON:]])
    near = (shared - plain).abs().max() <= torch.maximum(rounding, _SHARE * effect[-_COMMON:].abs().max())
    apart = (shared - changed)[-_COMMON:].abs().max() <= rounding
    return "" if near and apart else "logits are others then"


def _tokens(model: nn.Module, count: int) -> Tensor:
    device = next(model.parameters()).device
    return torch.arange(count, device=device) % _vocabulary(model)


def _others(model: nn.Module, ids: Tensor) -> Tensor:
    return (ids + 1) % _vocabulary(model)


def _vocabulary(model: nn.Module) -> int:
    bare: Any = bare_model(model)
    return len(bare.get_input_embeddings().weight)


def _rounding(model: nn.Module) -> float:
    return _ROUNDING * torch.finfo(next(model.parameters()).dtype).eps


def _logits(model: nn.Module, batch: dict[str, Tensor], training: bool) -> Tensor:
    """Logits of a row [length, vocabulary] in float32, the random numbers from their beginning."""
    model.train(training)
    torch.manual_seed(_SEED)  # the same dropout in the runs that are compared
    logits: Tensor = model(**batch).logits
    return logits[0].float()


def _random_state(model: nn.Module) -> list[Tensor]:
    cards = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cards)]
