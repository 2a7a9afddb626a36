"""The shapes that operators are timed at: one layer and the head of models people fine-tune."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One model's layer: `tokens` in a forward pass, and the widths that its operators see."""

    name: str
    tokens: int
    hidden: int
    ffn: int
    heads: int
    key_heads: int
    head_dim: int
    vocabulary: int

    def __str__(self) -> str:
        return self.name

    @property
    def groups(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Linears that share an input: its width, and the width of each output."""
        wide, narrow = self.heads * self.head_dim, self.key_heads * self.head_dim
        return {
            "qkv": (self.hidden, (wide, narrow, narrow)),
            "o": (wide, (self.hidden,)),
            "gate_up": (self.hidden, (self.ffn, self.ffn)),
            "down": (self.ffn, (self.hidden,)),
        }


SHAPES = (
    Shape("SmolLM2-135M", 1024, 576, 1536, 9, 3, 64, 49152),
    Shape("Llama-3.2-1B", 1024, 2048, 8192, 32, 8, 64, 128256),
    Shape("Qwen2.5-7B", 256, 3584, 18944, 28, 4, 128, 152064),
    Shape("Mistral-7B", 256, 4096, 14336, 32, 8, 128, 32768),
)
PASSES = ("forward", "backward", "full")
