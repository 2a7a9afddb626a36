"""The shapes that operators are timed and costed at: one layer and the head of models people fine-tune."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One model's layer: `tokens` in a forward pass, and the widths that its operators see.

    A mixture has `experts` MLPs of width `ffn` in place of one, and every token passes through `experts_per_token`.
    """

    name: str
    tokens: int
    hidden: int
    ffn: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int
    layers: int
    experts: int = 0
    experts_per_token: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def groups(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Linears that share an input: its width, and the width of each output."""
        wide, narrow = self.heads * self.head_dim, self.key_heads * self.head_dim
        groups = {"qkv": (self.hidden, (wide, narrow, narrow)), "o": (wide, (self.hidden,))}
        if not self.experts:
            groups |= {"gate_up": (self.hidden, (self.ffn, self.ffn)), "down": (self.ffn, (self.hidden,))}
        return groups


SHAPES = (
    Shape("SmolLM2-135M", 1024, 576, 1536, 9, 3, 64, 49152, layers=30),
    Shape("Llama-3.2-1B", 1024, 2048, 8192, 32, 8, 64, 128256, layers=16),
    Shape("Qwen2.5-7B", 256, 3584, 18944, 28, 4, 128, 152064, layers=28),
    Shape("Mistral-7B", 256, 4096, 14336, 32, 8, 128, 32768, layers=32),
)
# What a card is given: as many tokens as keep it busy.
CARD_SHAPES = (
    Shape("Llama-3.2-1B", 4096, 2048, 8192, 32, 8, 64, 128256, layers=16),
    Shape("Llama-3.1-8B", 4096, 4096, 14336, 32, 8, 128, 128256, layers=32),
    Shape("Qwen2.5-72B", 4096, 8192, 29568, 64, 8, 128, 152064, layers=80),
    Shape("Mixtral-8x7B", 4096, 4096, 14336, 32, 8, 128, 32000, layers=32, experts=8, experts_per_token=2),
)
PASSES = ("forward", "backward", "full")
