"""Where the transformer layers of a model are, which linears they hold, and for how many tokens it has positions.

Found by structure, not by class name: a transformer keeps its blocks in one ``nn.ModuleList``. Names are those of the
bare model, so that a score taken before PEFT wraps the model still fits after it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from aletheia_tune.errors import UserError

_ATTENTION = re.compile(r"att(e?)n|attention", re.IGNORECASE)
# "intermediate" and a layer's own "output" are the two halves of the feed-forward block in BERT and its descendants.
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|experts?\b|moe|dense_?relu_?dense|^fc\d*$|^intermediate$|^output$", re.IGNORECASE
)
_POSITIONS = re.compile(r"^wpe$|pos")
# Of OPT, BART and YOSO the table begins with two that no token gets.
_SPARE_ROWS = 2
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class LinearModule:
    """A linear inside a transformer layer.

    ``name`` is the dotted name in the bare (non-PEFT) model, ``layer`` the index of its layer, ``in_features`` and
    ``out_features`` the sizes of the map x [.., in] -> y [.., out], ``kind`` one of "attention", "mlp", "other".
    """

    name: str
    layer: int
    in_features: int
    out_features: int
    kind: str


@dataclass(frozen=True)
class LayerList:
    """The transformer layers of a model and the dotted name of their list in the bare model."""

    path: str
    layers: nn.ModuleList


def bare_model(model: nn.Module) -> Any:
    """The model that PEFT wraps, or the model itself when nothing wraps it."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        wrapper: Any = model
        return wrapper.get_base_model()
    return model


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear map with a weight of its own: ``nn.Linear`` or transformers' ``Conv1D``."""
    return isinstance(module, nn.Linear | Conv1D)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _behind_peft(module: nn.Module) -> nn.Module:
    """What acts in the place of a module that PEFT wrapped: its base layer, or the copy that is trained in full."""
    while True:
        if isinstance(module, ModulesToSaveWrapper):
            active = [name for name in module.active_adapters if name in module.modules_to_save]
            module = module.modules_to_save[active[0]] if active else module.original_module
        elif hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names"):
            module = module.get_submodule("base_layer")
        else:
            return module


def full_modules(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """What PEFT trains in full beside its adapters (``modules_to_save``), by name in ``model``."""
    return {name: each for name, each in model.named_modules() if isinstance(each, ModulesToSaveWrapper)}


def bare_modules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """``module.named_modules()`` as if PEFT had never been there: no adapters, wrapped layers under their old name.

    Of a module that PEFT trains in full it is the trained copy that is shown. Modules used under several names come
    once, under the first.
    """
    seen: set[nn.Module] = set()

    def walk(current: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        current = _behind_peft(current)
        if current in seen:
            return
        seen.add(current)
        yield name, current
        for child_name, child in current.named_children():
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    yield from walk(module, prefix)


def positions_of(model: nn.Module) -> int | None:
    """The most tokens that a model, bare or in PEFT, can read in a row; None where no table of positions ends.

    The configuration says how many positions a model was made for (``max_position_embeddings``), and a table of as many
    rows that it has no others: an embedding that was learned (GPT-2, OPT, BERT), or a buffer of sines (GPT-J, CTRL).
    Without a table positions are computed as they come: rotary, relative, ALiBi.
    """
    bare = bare_model(model)
    positions = getattr(_text_config(bare), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    # RoBERTa and its descendants count from the row behind that of padding.
    rows = [
        (name, each.num_embeddings, 0 if each.padding_idx is None else each.padding_idx + 1)
        for name, each in bare_modules(bare)
        if isinstance(each, nn.Embedding)
    ]
    rows += [(name, len(each), 0) for name, each in bare.named_buffers() if each.ndim == 2]
    limits = [
        min(positions, count - first)
        for name, count, first in rows
        if _POSITIONS.search(name.rpartition(".")[2]) and 0 <= count - positions <= _SPARE_ROWS
    ]
    return min(limits, default=None)


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config if config is None or not hasattr(config, "get_text_config") else config.get_text_config()


def _is_layer_list(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or len(module) == 0:
        return False
    blocks = list(module)
    return len({type(block) for block in blocks}) == 1 and all(
        any(is_linear(inner) for name, inner in bare_modules(block) if name) for block in blocks
    )


def find_layers(model: nn.Module) -> LayerList:
    """The transformer layers of a model.

    They are the outermost ``nn.ModuleList`` of blocks of one class that hold linears. Where a model has several
    (a vision tower beside a language model, an encoder under a decoder), the one inside what transformers calls its
    decoder; failing that, the one whose length the configuration names as the number of layers.

    Raises:
        UserError: no such list, or several that fit equally well.
    """
    root = bare_model(model)
    found: list[LayerList] = []
    for name, module in root.named_modules():
        nested = any(name.startswith(f"{outer.path}.") for outer in found)
        if not nested and _is_layer_list(module):
            assert isinstance(module, nn.ModuleList)
            found.append(LayerList(name, module))
    if not found:
        raise UserError(
            f"{type(root).__name__}: no list of transformer layers found (an nn.ModuleList of equal blocks that hold "
            "linears); give a transformer model"
        )
    if len(found) > 1:
        decoder = root.get_decoder() if hasattr(root, "get_decoder") else root
        within = {id(module) for module in decoder.modules()}
        inside = [each for each in found if id(each.layers) in within]
        found = inside if len(inside) == 1 else found
    if len(found) > 1:
        config = _text_config(root)
        counts = {getattr(config, key, None) for key in _LAYER_COUNTS} - {None}
        fitting = [each for each in found if len(each.layers) in counts]
        if len(fitting) != 1:
            names = ", ".join(f"{each.path} ({len(each.layers)})" for each in found)
            raise UserError(
                f"{type(root).__name__}: several lists could be its transformer layers: {names}; "
                "give the part of the model that is meant"
            )
        found = fitting
    return found[0]


def kind_of(name: str, layer_path: str) -> str:
    """ "attention", "mlp" or "other" for a module or parameter, from the names between its layer and itself."""
    parts = name.removeprefix(f"{layer_path}.").split(".")[1:]
    if any(_ATTENTION.search(part) for part in parts[:-1]):
        return "attention"
    if any(_MLP.search(part) for part in parts):
        return "mlp"
    return "attention" if _ATTENTION.search(parts[-1]) else "other"


def linears(model: nn.Module) -> Iterator[tuple[LinearModule, Any]]:
    """Every linear inside the layers, described and in person, in model order.

    A module used in several layers comes once, in the first. See :func:`linear_modules`.
    """
    layers = find_layers(model)
    prefix = f"{layers.path}." if layers.path else ""
    for name, module in bare_modules(layers.layers, layers.path):
        if is_linear(module):
            index = int(name.removeprefix(prefix).split(".")[0])
            in_features, out_features = linear_shape(module)
            yield LinearModule(name, index, in_features, out_features, kind_of(name, layers.path)), module


def linear_modules(model: nn.Module) -> list[LinearModule]:
    """Every ``nn.Linear`` and transformers ``Conv1D`` inside the layers, in model order.

    For a PEFT-wrapped model these are the base layers, under the names of the bare model. MoE routers that are not
    ``nn.Linear`` are left out.

    Raises:
        UserError: the model has no known list of layers.
    """
    return [linear for linear, _ in linears(model)]
