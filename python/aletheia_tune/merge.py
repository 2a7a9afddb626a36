"""An adapter and its model made one plain model: what a server or another tool reads without PEFT.

A merged weight W + s · B A is summed in float32 and rounded once, to the dtype that W has in the model. What was
trained in full takes the place of what it was trained from; everything else stays as it was, bit for bit.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn

from aletheia_tune import files
from aletheia_tune.errors import UserError
from aletheia_tune.layers import full_modules
from aletheia_tune.loading import load_model, no_progress_bars
from aletheia_tune.metrics import TrainResult

WEIGHTS = "adapter_model.safetensors"


def merge_adapter(
    model_dir: str | os.PathLike[str],
    adapter_dir: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> int:
    """Write a transformers model (safetensors, configuration, tokenizer) with a LoRA adapter merged into it.

    Args:
        model_dir: as `load_model` takes it: the model that the adapter was trained on.
        adapter_dir: a directory with a PEFT LoRA adapter in safetensors, such as `fine_tune` writes; of a classifier
            with its `metrics.json`, which names the classes.
        out_dir: must not exist or be empty, unless `overwrite`; appears once all is in it.
        overwrite: replace a directory that is there.

    Returns:
        How many modules of the model have other weights than before.

    Raises:
        UserError: the output is taken; no model or adapter there; an adapter that is no LoRA, or does not have exactly
            the weights that fit the model; a weight that is tied to another's and would change both; a merged weight
            that is not finite in its dtype.
    """
    with files.output_directory(out_dir, overwrite) as directory:
        config = _adapter_config(Path(adapter_dir))
        model, tokenizer = load_model(model_dir, "auto", _classes(config, Path(adapter_dir)))
        peft_model = _adapted(model, config, Path(adapter_dir))
        count = _merge_layers(peft_model)
        merged = peft_model.base_model.unload()
        with no_progress_bars():
            merged.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return count


def _adapter_config(adapter: Path) -> LoraConfig:
    for name in ("adapter_config.json", WEIGHTS):
        if not (adapter / name).is_file():
            raise UserError(
                f"adapter directory {adapter} has no {name}: give one that PEFT or `aletheia train` wrote"
            )
    try:
        config = PeftConfig.from_pretrained(str(adapter))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read the adapter_config.json of {adapter}: {error}") from error
    if not isinstance(config, LoraConfig):
        raise UserError(
            f"the adapter in {adapter} is {config.peft_type}: only LoRA adapters can be merged here"
        )
    return config


def _classes(config: LoraConfig, adapter: Path) -> tuple[str, ...] | None:
    """The classes of a classifier's adapter, from the metrics beside it; None of another adapter."""
    if config.task_type != "SEQ_CLS":
        return None
    try:
        classes = TrainResult.from_dict(
            json.loads((adapter / "metrics.json").read_text(encoding="utf-8"))
        ).classes
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(
            f"the adapter in {adapter} is a classifier's, and no metrics.json beside it names the classes: give the "
            "directory that `aletheia train` wrote"
        ) from error
    if classes is None:
        raise UserError(f"{adapter / 'metrics.json'} names no classes, and the adapter is a classifier's")
    return classes


def _adapted(model: Any, config: LoraConfig, adapter: Path) -> Any:
    """The model with the adapter in place, which has every weight that it should have and no other."""
    fits = f"the adapter in {adapter} does not fit the model"
    try:
        with safe_open(adapter / WEIGHTS, "pt") as stored:
            found = set(stored.keys())
        with warnings.catch_warnings():
            # What PEFT would warn of, that weights are missing, is an error below.
            warnings.simplefilter("ignore")
            peft_model = PeftModel.from_pretrained(model, str(adapter), config=config)
    except SafetensorError as error:
        raise UserError(f"cannot read {adapter / WEIGHTS}: {error}") from error
    except KeyError as error:
        raise UserError(f"{fits}: it lacks {error}") from error
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"{fits}: {error}") from error
    expected = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False))
    # PEFT saves the base weight of an adapted embedding or head besides, and has loaded it into the model.
    known = expected | {name for name in peft_model.state_dict() if ".base_layer." in name}
    for name in sorted((expected - found) | (found - known)):
        raise UserError(f"{fits}: {'it lacks' if name in expected else 'the model has no place for'} {name}")
    return peft_model


def _merge_layers(peft_model: nn.Module) -> int:
    """Merges each adapted layer by PEFT's own arithmetic, in float32; returns how many modules have new weights."""
    uses = Counter(id(parameter) for _, parameter in peft_model.named_parameters(remove_duplicate=False))
    layers: dict[str, Any] = {
        name: layer for name, layer in peft_model.named_modules() if isinstance(layer, BaseTunerLayer)
    }
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        dtypes = {parameter: parameter.dtype for parameter in base.parameters()}
        if any(uses[id(parameter)] > 1 for parameter in dtypes):
            raise UserError(f"the weight of {name} is tied to another module's: merging would change both")
        _cast({p: torch.promote_types(dtype, torch.float32) for p, dtype in dtypes.items()})
        layer.merge()
        _cast(dtypes)
    full = full_modules(peft_model)
    for name, module in {**layers, **full}.items():
        if not all(bool(parameter.isfinite().all()) for parameter in module.parameters()):
            raise UserError(
                f"the merged weight of {name} is not finite: the adapter, or its sum, is out of range"
            )
    return len({id(layer.get_base_layer()) for layer in layers.values()}) + len(full)


def _cast(dtypes: dict[nn.Parameter, torch.dtype]) -> None:
    for parameter, dtype in dtypes.items():
        parameter.data = parameter.data.to(dtype)
