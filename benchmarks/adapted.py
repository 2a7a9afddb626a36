"""The parts of a model on the meta device, frozen, with PEFT's adapters, and with ours."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from aletheia_kernels import lora_experts, lora_gated_mlp, lora_group
from benchmarks.shapes import Shape
from benchmarks.traffic import Cost, counting

DTYPE = torch.bfloat16
ALPHA = 32
# Of each group of linears, and of a mixture's experts, the rank of each member.
RANKS = {
    "r16": {"qkv": (16, 16, 16), "o": (16,), "gate_up": (16, 16), "down": (16,), "experts": (16, 16)},
    "r64": {"qkv": (64, 64, 64), "o": (64,), "gate_up": (64, 64), "down": (64,), "experts": (64, 64)},
    "mixed": {"qkv": (8, 64, 16), "o": (32,), "gate_up": (8, 64), "down": (16,), "experts": (8, 64)},
}


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def factors(width: int, outs: Sequence[int], ranks: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """float32 masters, as PEFT keeps them."""
    lora_As = [empty(rank, width, dtype=torch.float32).requires_grad_() for rank in ranks]
    lora_Bs = [
        empty(out, rank, dtype=torch.float32).requires_grad_() for out, rank in zip(outs, ranks, strict=True)
    ]
    return lora_As, lora_Bs


def trained(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def counted_pass(module: nn.Module, x: Tensor, *arguments: Any, **named: Any) -> list[Cost]:
    """Forward and backward of a module, to its input and to whatever is trained."""
    x.requires_grad_()
    with counting() as counted:
        y = module(x, *arguments, **named)
        outputs = y if isinstance(y, list) else [y]
        torch.autograd.grad(outputs, [x, *trained(module)], [torch.empty_like(output) for output in outputs])
    return counted.costs


class _NoAutocast(nullcontext):
    """In autocast's place: PEFT turns it off around products of experts, and the meta device has none to turn off."""

    def __init__(self, **_: Any) -> None:
        super().__init__()


def with_peft(module: nn.Module, config: LoraConfig, masters: torch.dtype = torch.float32) -> nn.Module:
    """The frozen module with PEFT's adapters, which PEFT keeps in float32 unless told not to."""
    module.requires_grad_(False)
    return get_peft_model(module, config, autocast_adapter_dtype=masters == torch.float32).base_model.model


class Siblings(nn.Module):
    """Linears of one input."""

    def __init__(self, width: int, outs: Sequence[int]) -> None:
        super().__init__()
        self.names = [f"linear_{i}" for i in range(len(outs))]
        for name, out in zip(self.names, outs, strict=True):
            self.add_module(name, nn.Linear(width, out, bias=False, device="meta", dtype=DTYPE))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.get_submodule(name)(x) for name in self.names]

    def with_peft(self, ranks: Sequence[int], masters: torch.dtype) -> nn.Module:
        pattern = dict(zip(self.names, ranks, strict=True))
        config = LoraConfig(target_modules=self.names, rank_pattern=pattern, lora_alpha=ALPHA)
        return with_peft(self, config, masters)


class OurGroup(nn.Module):
    """Linears of one input, each of its own rank, as one operator."""

    def __init__(self, width: int, outs: Sequence[int], ranks: Sequence[int]) -> None:
        super().__init__()
        self.weights = [empty(out, width) for out in outs]
        lora_As, lora_Bs = factors(width, outs, ranks)
        self.lora_As, self.lora_Bs = nn.ParameterList(lora_As), nn.ParameterList(lora_Bs)

    def forward(self, x: Tensor) -> list[Tensor]:
        count = len(self.weights)
        scalings = [ALPHA / lora_A.shape[0] for lora_A in self.lora_As]
        return lora_group(x, self.weights, [None] * count, list(self.lora_As), list(self.lora_Bs), scalings)


class Member(nn.Module):
    """One linear of a group. The first that is asked for an input computes all of them, and the others take theirs."""

    def __init__(self, group: OurGroup, index: int, kept: dict[str, Any]) -> None:
        super().__init__()
        self.group, self.index, self.kept = group, index, kept

    def forward(self, x: Tensor) -> Tensor:
        if self.kept.get("x") is not x:
            self.kept.update(x=x, outputs=self.group(x))
        return self.kept["outputs"][self.index]


def members(group: OurGroup) -> list[Member]:
    kept: dict[str, Any] = {}
    return [Member(group, index, kept) for index in range(len(group.weights))]


class OurGatedMlp(nn.Module):
    """A gated MLP as one operator."""

    def __init__(self, shape: Shape, ranks: Sequence[int]) -> None:
        super().__init__()
        hidden, ffn = shape.hidden, shape.ffn
        self.weights = [empty(ffn, hidden), empty(ffn, hidden), empty(hidden, ffn)]
        inner, outer = factors(hidden, (ffn, ffn), ranks[:2]), factors(ffn, (hidden,), ranks[2:])
        self.lora_As = nn.ParameterList([*inner[0], *outer[0]])
        self.lora_Bs = nn.ParameterList([*inner[1], *outer[1]])

    def forward(self, x: Tensor) -> Tensor:
        scalings = [ALPHA / lora_A.shape[0] for lora_A in self.lora_As]
        return lora_gated_mlp(x, self.weights, [None] * 3, list(self.lora_As), list(self.lora_Bs), scalings)


class OurExperts(nn.Module):
    """The two projections of every expert, the rows of each already together."""

    def __init__(self, width: int, out: int, experts: int, rank: int) -> None:
        super().__init__()
        self.weight = empty(experts, out, width)
        self.lora_A = nn.Parameter(empty(experts * rank, width, dtype=torch.float32))
        self.lora_B = nn.Parameter(empty(out, rank * experts, dtype=torch.float32))
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        lora_A = self.lora_A.view(self.experts, -1, x.shape[1])
        lora_B = self.lora_B.view(self.weight.shape[1], -1, self.experts).permute(2, 0, 1)
        scalings, offs = empty(self.experts, dtype=torch.float32), empty(self.experts, dtype=torch.int32)
        return lora_experts(x, self.weight, lora_A, lora_B, scalings, offs)


@dataclass(frozen=True)
class Counts:
    """What a part of a model costs, forward and backward, in three forms."""

    ours: list[Cost]
    peft: list[Cost]
    peft_bf16: list[Cost]


def llama_config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
    )


def on_meta(build: Any, *arguments: Any) -> Any:
    """A module of the meta device, in bfloat16, frozen."""
    with torch.device("meta"):
        return build(*arguments).to(DTYPE).requires_grad_(False)


def group_counts(tokens: int, width: int, outs: Sequence[int], ranks: Sequence[int]) -> Counts:
    def peft(masters: torch.dtype) -> list[Cost]:
        return counted_pass(Siblings(width, outs).with_peft(ranks, masters), empty(tokens, width))

    return Counts(
        counted_pass(OurGroup(width, outs, ranks), empty(tokens, width)), peft(torch.float32), peft(DTYPE)
    )


LINEARS_OF_MLP = ("gate_proj", "up_proj", "down_proj")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", *LINEARS_OF_MLP)


def mlp_counts(shape: Shape, ranks: Sequence[int]) -> Counts:
    def peft(masters: torch.dtype) -> list[Cost]:
        config = LoraConfig(
            target_modules=list(LINEARS_OF_MLP),
            rank_pattern=dict(zip(LINEARS_OF_MLP, ranks, strict=True)),
            lora_alpha=ALPHA,
        )
        module = with_peft(on_meta(LlamaMLP, llama_config(shape)), config, masters)
        return counted_pass(module, empty(shape.tokens, shape.hidden))

    ours = counted_pass(OurGatedMlp(shape, ranks), empty(shape.tokens, shape.hidden))
    return Counts(ours, peft(torch.float32), peft(DTYPE))


def routed(shape: Shape) -> tuple[Tensor, Tensor]:
    """Which experts each token goes to, and their weights."""
    each = shape.experts_per_token
    return empty(shape.tokens, each, dtype=torch.int64), empty(shape.tokens, each)


def frozen_experts(shape: Shape) -> nn.Module:
    config = MixtralConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.experts_per_token,
        experts_implementation="grouped_mm",
    )
    return on_meta(MixtralExperts, config)


def experts_counts(shape: Shape, ranks: tuple[int, int]) -> tuple[list[Cost], Counts]:
    """The mixture without adapters; and its two projections as our operators, the whole with PEFT's adapters."""
    rows = shape.tokens * shape.experts_per_token

    def peft(masters: torch.dtype) -> list[Cost]:
        config = LoraConfig(
            r=ranks[0],
            rank_pattern={"down_proj": ranks[1]},
            target_modules=[],
            target_parameters=["0.gate_up_proj", "0.down_proj"],
            lora_alpha=ALPHA,
        )
        with warnings.catch_warnings():
            # PEFT says that it ignores the pattern, and heeds it.
            warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
            module = with_peft(nn.Sequential(frozen_experts(shape)), config, masters)[0]
        with mock.patch("torch.autocast", _NoAutocast):
            return counted_pass(module, empty(shape.tokens, shape.hidden), *routed(shape))

    frozen = counted_pass(frozen_experts(shape), empty(shape.tokens, shape.hidden), *routed(shape))
    gate_up = OurExperts(shape.hidden, 2 * shape.ffn, shape.experts, ranks[0])
    down = OurExperts(shape.ffn, shape.hidden, shape.experts, ranks[1])
    first = counted_pass(gate_up, empty(rows, shape.hidden))
    second = counted_pass(down, empty(rows, shape.ffn))
    return frozen, Counts(first + second, peft(torch.float32), peft(DTYPE))
