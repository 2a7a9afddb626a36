"""Learning rates by kind of weight: an adapter's A, its B (LoRA+, arXiv 2402.12354), and weights trained in full.

Adapters are usually trained at about ten times the rate of full fine-tuning: one rate for both would suit neither.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from aletheia_tune.classification import full_beside_head
from aletheia_tune.layers import full_modules


def parameter_groups(
    model: nn.Module, learning_rate: float, *, lora_plus: float = 1.0, full_rate: float = 1.0
) -> list[dict[str, Any]]:
    """What trains of a PEFT model as an optimizer's parameter groups, without weight decay; A's group comes first.

    Args:
        model: a PEFT model.
        learning_rate: of A, and of a classifier's head.
        lora_plus: of B, and of any adapter's vector, over that of A.
        full_rate: of the weights and biases in the layers that are trained in full, over that of A.
    """
    in_layers = full_beside_head(model).values()
    in_full = {id(p) for wrapper in in_layers for p in wrapper.parameters()}
    in_head = {id(p) for wrapper in full_modules(model).values() for p in wrapper.parameters()} - in_full
    rates = {"A": 1.0, "B": lora_plus, "full": full_rate}
    groups: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_b = ("lora_B" in name or parameter.dim() == 1) and id(parameter) not in in_head
            groups["full" if id(parameter) in in_full else "B" if is_b else "A"].append(parameter)
    return [
        {"params": group, "lr": learning_rate * rates[kind], "weight_decay": 0.0}
        for kind, group in groups.items()
        if group
    ]
