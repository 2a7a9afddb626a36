"""A PEFT model on all of this package's operators at once, put in place and taken off again in one order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from aletheia_tune.attention import KernelAttention, kernel_attention
from aletheia_tune.head import LabelledHead, labelled_head
from aletheia_tune.norms import KernelNorms, kernel_norms
from aletheia_tune.patch import PatchReport, apply_kernels, restore
from aletheia_tune.quantised import kept_layout


@dataclass(frozen=True)
class KernelsInUse:
    """What runs on the operators, and why the rest does not.

    Attributes:
        patch: the LoRA linears and gated MLPs.
        attention: all but decoding's.
        norms: the RMS norms and the rotary embedding.
        head: the output embedding and the loss.
    """

    patch: PatchReport
    attention: KernelAttention
    norms: KernelNorms
    head: LabelledHead

    def __str__(self) -> str:
        return f"{self.patch}\nattention: {self.attention}\nnorms: {self.norms}\nhead: {self.head}"


@contextmanager
def use_kernels(
    model: nn.Module,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    strict: bool = False,
    label_smoothing: float = 0.0,
) -> Iterator[KernelsInUse]:
    """`apply_kernels`, `kernel_attention`, `kernel_norms` and `labelled_head` while inside the context.

    Each leaves what it cannot serve as it is and says why. On exit the model has its own forwards again.

    Args:
        model: a PEFT model with LoRA adapters.
        example_inputs: as `apply_kernels` takes it.
        strict: raise when any adapted module stays on PEFT's path.
        label_smoothing: as `labelled_head` takes it.

    Yields:
        KernelsInUse: what is in place.

    Raises:
        UserError: as `apply_kernels` raises it.
    """
    with ExitStack() as undo:
        undo.enter_context(kept_layout(model))
        patch = apply_kernels(model, example_inputs=example_inputs, strict=strict)
        undo.callback(restore, model)
        attention = undo.enter_context(kernel_attention(model))
        norms = undo.enter_context(kernel_norms(model))
        head = undo.enter_context(labelled_head(model, label_smoothing=label_smoothing))
        yield KernelsInUse(patch, attention, norms, head)
