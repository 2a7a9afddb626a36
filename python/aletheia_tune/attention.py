"""The attention operator under a name of transformers' own registry, and a model switched to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from aletheia_kernels import backends, range_attention
from aletheia_tune.layers import bare_model
from aletheia_tune.shared_keys import SharedBeginning, shared_beginning
from aletheia_tune.torch_state import counts_writes, version_of

NAME = "aletheia"
# What other attention functions are given that changes the result and that the operator does not know.
_UNKNOWN = ("softcap", "position_bias", "cache", "s_aux")

Ranges = tuple[Tensor, Tensor]
# One mask serves every layer: its ranges are read once. Keyed by the tensor object, which holds no reference to it.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def ranges_of(mask: Tensor) -> Ranges | None:
    """first and last [batch, queries] int32 of a boolean mask [batch, 1, queries, keys]; None if it has holes."""
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1:
        return None
    seen = mask[:, 0]
    first = seen.int().argmax(-1)
    last = first + seen.sum(-1)
    position = torch.arange(seen.shape[-1], device=seen.device)
    if not torch.equal((position >= first[..., None]) & (position < last[..., None]), seen):
        return None
    return first.int(), last.int()


def _seen(
    mask: Tensor | None, batch: int, length: int, causal: bool, device: torch.device
) -> Ranges | SharedBeginning | None:
    """What the queries see, in one of the forms that the operator can be given; None if in neither."""
    if mask is None:
        position = torch.arange(1, length + 1, dtype=torch.int32, device=device)
        last = position if causal else torch.full_like(position, length)
        return torch.zeros_like(last).expand(batch, length), last.expand(batch, length)
    version, found = _known.get(mask, (None, None))
    if version != version_of(mask) or not counts_writes(mask):
        found = shared_beginning(mask) or ranges_of(mask)
        _known[mask] = (version_of(mask), found)
    if found is None or isinstance(found, SharedBeginning):
        return found
    first, last = found
    return first.expand(batch, -1), last.expand(batch, -1)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: the operator where it serves, else (as in decoding) transformers' SDPA.

    Args:
        module: the attention module. query: [batch, heads, queries, dim]. key, value: [batch, key heads, keys, dim].
        attention_mask: boolean [batch, 1, queries, keys], or None for causal (or full, if the module is not causal).
        scaling, dropout, is_causal: as in the registry's other functions.

    Returns:
        [batch, queries, heads, dim], and None for the weights.
    """
    serves = (
        dropout == 0.0
        and query.shape[2] == key.shape[2]
        and key.shape == value.shape  # latent attention's values are narrower than its keys
        and all(kwargs.get(name) is None for name in _UNKNOWN)
        and not torch.compiler.is_compiling()
        and backends.choose("range_attention", query.device, query.dtype).backend != "reference"
    )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    seen = _seen(attention_mask, query.shape[0], query.shape[2], causal, query.device) if serves else None
    if seen is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    if isinstance(seen, SharedBeginning):
        key, value = seen.repeated(key), seen.repeated(value)
        seen = seen.first.expand(len(query), -1), seen.last.expand(len(query), -1)
    return range_attention(query, key, value, *seen, scale=scaling).transpose(1, 2), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class KernelAttention:
    """Whether a model's attention runs on the operator, and why not."""

    active: bool
    reason: str = ""

    def __str__(self) -> str:
        return "operator" if self.active else f"the model's own: {self.reason}"


@contextmanager
def kernel_attention(model: nn.Module) -> Iterator[KernelAttention]:
    """Attention on the operator while inside the context, in training and in evaluation.

    A pass whose queries are the last of more keys (decoding with a cache) stays on transformers' SDPA.

    Args:
        model: a transformers model, bare or in PEFT, on its SDPA attention.

    Yields:
        KernelAttention: whether it is in place, and why not. On exit the model's own implementation is set again.
    """
    bare: Any = bare_model(model)
    before = getattr(getattr(bare, "config", None), "_attn_implementation", None)
    parameter = next(model.parameters())
    try:
        choice = backends.choose("range_attention", parameter.device, parameter.dtype)
        reason = choice.reason if choice.backend == "reference" else ""
    except backends.BackendError as error:
        reason = str(error)
    if before != "sdpa":
        reason = f"the model's attention is {before}, not sdpa"
    if reason:
        yield KernelAttention(False, reason)
        return
    bare.set_attn_implementation(NAME)
    try:
        yield KernelAttention(True)
    finally:
        bare.set_attn_implementation(before)
