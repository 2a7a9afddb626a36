"""Calls that stand for all: their launches, recorded on meta tensors, are what is compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from aletheia_kernels.triton import experts, gated_mlp, grad_norm, lora, lora_fused
from aletheia_kernels.triton.cards import CARDS
from aletheia_kernels.triton.launch import Recording, card_for, recording

HIDDEN, KEYS, FFN = 4096, 1024, 14336  # Llama-3.1-8B
ALL = tuple(CARDS)
TWO = ("sm_90", "gfx942")
FOUR = ("sm_80", "sm_90", "sm_120", "gfx942")  # of every size of shared memory


@dataclass(frozen=True)
class Case:
    """A call of so many tokens, and the cards that it is recorded for: few are enough where only a dtype differs.

    Where ``only`` names kernels, the others' launches are left out: another case has them for these cards.
    """

    name: str
    cards: tuple[str, ...]
    call: Callable[[int], None]
    only: tuple[str, ...] = ()


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _lora(
    ranks: Sequence[int],
    outs: Sequence[int],
    width: int = HIDDEN,
    *,
    dtype: torch.dtype = torch.bfloat16,
    masters: torch.dtype = torch.float32,
    dropout_p: float = 0.0,
) -> Callable[[int], None]:
    def call(tokens: int) -> None:
        x, weights = _empty(tokens, width, dtype=dtype), [_empty(out, width, dtype=dtype) for out in outs]
        lora_As = [_empty(rank, width, dtype=masters) for rank in ranks]
        lora_Bs = [_empty(out, rank, dtype=masters) for out, rank in zip(outs, ranks, strict=True)]
        scalings = [2.0 / (1 + index) for index in range(len(ranks))]
        seed = _empty(1, dtype=torch.int64)
        dropout = (dropout_p, seed if dropout_p else None)
        ys, h = lora.lora_group_forward(x, weights, [None] * len(outs), lora_As, lora_Bs, scalings, *dropout)
        dys = [torch.empty_like(y) for y in ys]
        lora.lora_group_backward(dys, x, h, weights, lora_As, lora_Bs, scalings, *dropout, True)

    return call


def _fused(ranks: Sequence[int], outs: Sequence[int]) -> Callable[[int], None]:
    """With every choice of block sizes that a card is offered."""

    def call(tokens: int) -> None:
        x, h = _empty(tokens, HIDDEN), _empty(tokens, sum(ranks), dtype=torch.float32)
        weights, biases = [_empty(out, HIDDEN) for out in outs], [_empty(out) for out in outs]
        lora_Bs = [_empty(out, rank, dtype=torch.float32) for out, rank in zip(outs, ranks, strict=True)]
        for blocks in lora_fused.candidates(card_for(x), x.dtype):
            lora_fused.fused_forward(x, weights, biases, h, lora_Bs, [1.0] * len(ranks), blocks)

    return call


def _experts(
    rank: int, *, dtype: torch.dtype = torch.bfloat16, width: int = HIDDEN, unequal: bool = False
) -> Callable[[int], None]:
    def call(tokens: int) -> None:
        count = 8
        x, weight = _empty(tokens, width, dtype=dtype), _empty(count, FFN, width, dtype=dtype)
        lora_A = _empty(count, rank, width, dtype=torch.float32)
        lora_B = _empty(count, FFN, rank, dtype=torch.float32)
        scalings, offs = _empty(count, dtype=torch.float32), _empty(count, dtype=torch.int32)
        routing = (scalings, offs, _empty(count, dtype=torch.int32) if unequal else None)
        y, h = experts.lora_experts_forward(x, weight, lora_A, lora_B, *routing)
        experts.lora_experts_backward(torch.empty_like(y), x, h, weight, lora_A, lora_B, *routing, True)

    return call


def _gated_mlp(activation: str, ranks: tuple[int, int, int] = (16, 16, 16)) -> Callable[[int], None]:
    def call(tokens: int) -> None:
        shapes = ((FFN, HIDDEN), (FFN, HIDDEN), (HIDDEN, FFN))
        x, weights = _empty(tokens, HIDDEN), [_empty(*shape) for shape in shapes]
        lora_As = [
            _empty(rank, width, dtype=torch.float32) for rank, (_, width) in zip(ranks, shapes, strict=True)
        ]
        lora_Bs = [
            _empty(out, rank, dtype=torch.float32) for rank, (out, _) in zip(ranks, shapes, strict=True)
        ]
        rest = (lora_As, lora_Bs, [2.0, 1.0, 0.5], activation)
        y, gate, up, h = gated_mlp.lora_gated_mlp_forward(x, weights, [None] * 3, *rest)
        dy = torch.empty_like(y)
        gated_mlp.lora_gated_mlp_backward(dy, x, gate, up, h, weights, *rest, True)

    return call


def _weight_norms(
    method: str, width: int = HIDDEN, *, tokens_at_most: int = 4096, dtype: torch.dtype = torch.bfloat16
) -> Callable[[int], None]:
    def call(tokens: int) -> None:
        tokens = min(tokens, tokens_at_most)
        x, dy = _empty(tokens, width, dtype=dtype), _empty(tokens, FFN, dtype=dtype)
        grad_norm.weight_grad_norm_sq(x, dy, method)

    return call


def _other_norms(tokens: int) -> None:
    x, dy = _empty(tokens, HIDDEN), _empty(tokens, FFN)
    grad_norm.weight_grad_norm_sq_sketch(x, dy, _empty(HIDDEN, 16))
    grad_norm.bias_grad_norm_sq(dy)
    grad_norm.embedding_grad_norm_sq(_empty(tokens, dtype=torch.int64), x)


QKV = (HIDDEN, KEYS, KEYS)
GATED = ("gated_product", "gated_gradients")
HALF, SINGLE = torch.float16, torch.float32
CASES = (
    Case("q, k, v of mixed ranks, dropout", ALL, _lora((8, 64, 16), QKV, dropout_p=0.05)),
    Case("down of rank 1, adapters in bfloat16", TWO, _lora((1,), (HIDDEN,), FFN, masters=torch.bfloat16)),
    Case("o of rank 300", FOUR, _lora((300,), (HIDDEN,))),
    Case("o of rank 16 in float16", ("sm_90",), _lora((16,), (HIDDEN,), dtype=HALF)),
    Case("o of rank 16 in float32", TWO, _lora((16,), (HIDDEN,), dtype=SINGLE)),
    Case("odd widths", TWO, _lora((5, 3), (1021, 77), 4095, dropout_p=0.05)),
    Case("o of rank 192, dropout", FOUR, _lora((192,), (HIDDEN,), dropout_p=0.05)),
    Case("q, k, v in one kernel", ALL, _fused((16,) * 3, QKV)),
    Case("SwiGLU", TWO, _gated_mlp("silu")),
    Case("its activation on every card", ALL, _gated_mlp("silu"), only=GATED),
    Case("GeGLU", TWO, _gated_mlp("gelu_tanh"), only=GATED),
    Case("experts of rank 16", ALL, _experts(16)),
    Case("experts of unequal ranks to 64", TWO, _experts(64, unequal=True)),
    Case("experts of rank 300 in float16", ("sm_90",), _experts(300, dtype=HALF)),
    Case("experts in float32", ("sm_90",), _experts(16, dtype=SINGLE)),
    Case("experts of odd widths", ("sm_90",), _experts(5, width=4095)),
    Case("experts of one feature", ("sm_90",), _experts(5, width=1), only=("grouped_gradient",)),
    Case("gradient norm by tiles", ALL, _weight_norms("tiles")),
    Case("gradient norm by Gram matrices", ALL, _weight_norms("gram")),
    Case("gradient norm of few tokens", TWO, _weight_norms("auto", tokens_at_most=64)),
    Case("gradient norm in float32", TWO, _weight_norms("tiles", dtype=SINGLE)),
    Case("gradient norm by Gram matrices in float32", TWO, _weight_norms("gram", dtype=SINGLE)),
    Case("gradient norm of odd widths", TWO, _weight_norms("tiles", 4095, dtype=HALF)),
    Case("sketch, bias, embedding", ALL, _other_norms),
)


def record(tokens: int = 4096) -> Iterator[Recording]:
    """The launches of every case, as launched for each of its cards."""
    for case in CASES:
        for card in case.cards:
            with recording(CARDS[card]) as kept:
                case.call(tokens)
            if case.only:
                kept.launches = [one for one in kept.launches if one.name in case.only]
            yield kept
