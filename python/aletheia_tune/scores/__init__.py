"""What a probe found: a score for every layer and every module, as a value that can be stored and read back.

One file beside this one for each method that makes such scores.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from aletheia_tune.errors import UserError
from aletheia_tune.number_types import is_finite

FORMAT = "aletheia-scores"
VERSION = 1


@dataclass(frozen=True)
class ModuleScore:
    """The score of one linear (or of one stacked MoE expert parameter) and what it is.

    ``layer`` indexes the transformer layer, ``kind`` is "attention", "mlp" or "other".
    """

    layer: int
    score: float
    in_features: int
    out_features: int
    kind: str


@dataclass(frozen=True)
class Scores:
    """Scores by layer and by module.

    Attributes:
        method: what was measured, e.g. "aletheia".
        layers: one score a layer, larger matters more.
        modules: by full module name in the bare model; a stacked MoE expert parameter stands under its own name, as in
            "model.layers.0.mlp.experts.gate_up_proj".
        layer_path: dotted name of the layer list, e.g. "model.layers".
        meta: how the scores came about: model, dtype, batches, tokens, seconds, loss, stability and so on.
    """

    method: str
    layers: tuple[float, ...]
    modules: dict[str, ModuleScore]
    layer_path: str
    meta: dict[str, Any] = field(default_factory=dict)

    def origin(self) -> dict[str, Any]:
        """Of `meta` what a plan keeps: the command that probed, what it read and what it took."""
        kept = ("command", "batches", "tokens", "seconds")
        return {name: self.meta[name] for name in kept if name in self.meta}

    def to_json(self) -> str:
        """The scores as JSON text, with a format name and a version."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Scores:
        """Scores from the text that :meth:`to_json` wrote.

        Raises:
            UserError: not JSON, not a scores file, a version of the future, or a field missing or of the wrong kind.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"scores: not JSON ({error}); give a file that `aletheia probe` wrote") from None
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError("scores: not a scores file; give a file that `aletheia probe` wrote")
        if content.get("version") != VERSION:
            raise UserError(
                f"scores: version {content.get('version')!r} is not known here (known: {VERSION}); probe again"
            )
        try:
            scores = Scores(
                method=_text(content["method"]),
                layers=tuple(_number(value) for value in content["layers"]),
                modules={name: _module(fields) for name, fields in content["modules"].items()},
                layer_path=_text(content["layer_path"]),
                meta=dict(content["meta"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(f"scores: a field is missing or broken ({error!r}); probe again") from None
        strays = [
            name for name, module in scores.modules.items() if not 0 <= module.layer < len(scores.layers)
        ]
        if strays:
            raise UserError(f"scores: {strays[0]} stands in a layer that has no score; probe again")
        return scores


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {value!r}")
    return value


def _number(value: Any) -> float:
    if not is_finite(value):
        raise ValueError(f"expected a finite number, got {value!r}")
    return float(value)


def _module(fields: dict[str, Any]) -> ModuleScore:
    return ModuleScore(
        layer=int(fields["layer"]),
        score=_number(fields["score"]),
        in_features=int(fields["in_features"]),
        out_features=int(fields["out_features"]),
        kind=_text(fields["kind"]),
    )
