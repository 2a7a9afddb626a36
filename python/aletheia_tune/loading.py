"""A pretrained model and its tokenizer, from a directory or the hub, without running code of theirs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from aletheia_tune.classification import errors_alone, load_classifier
from aletheia_tune.environment import known_dtype
from aletheia_tune.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What transformers raises where a file is missing, damaged, or of another model than the configuration.
_UNLOADABLE = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    SafetensorError,
    StrictDataclassError,
)


def load_model(
    model_dir: str | os.PathLike[str],
    dtype: str = "native",
    classes: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, from a directory or from the hub.

    Weights are read from safetensors only, and no code that comes with the model is run.

    Args:
        model_dir: the directory, or a name on the hub ("owner/model"), which is downloaded if it is not in the local
            cache; with HF_HUB_OFFLINE=1 it has to be there.
        dtype: of the weights, "bfloat16", "float32", "native" for `native_dtype`, or "auto" for the one
            in which they are stored.
        classes: a sequence classifier for these classes instead, as `classification.load_classifier` makes it.
        seed: of a classifier's new head.

    Raises:
        UserError: nothing there, not a causal language model (a model with a classifier), no tokenizer, an unknown
            dtype, a damaged file, or a checkpoint that lacks weights; as `load_classifier` raises it.
    """
    weights = dtype if dtype == "auto" else getattr(torch, known_dtype(dtype))
    source, local = _source(model_dir)
    try:
        with no_progress_bars():
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                source, local_files_only=local, trust_remote_code=False
            )
            options: dict[str, Any] = {
                "dtype": weights,
                "local_files_only": local,
                "use_safetensors": True,
                "trust_remote_code": False,
            }
            model: Any
            if classes is None:
                loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                    source, output_loading_info=True, **options
                )
                model, info = loaded
                _require_all_weights(model_dir, info["missing_keys"])
            else:
                model = load_classifier(source, tokenizer, classes, seed, **options)
    except UserError:
        raise
    except Exception as error:
        # The tokenizers' own errors have no class of their own.
        if type(error) is not Exception and not isinstance(error, _UNLOADABLE):
            raise
        raise _unloadable(model_dir, error) from error
    return model, tokenizer


def load_shape(model_dir: str | os.PathLike[str]) -> PreTrainedModel:
    """The model on the meta device: its modules, their names and shapes, made from the configuration alone.

    By the class that `load_model` takes for a language model; by that of a classifier where transformers has no
    language model of this kind. In most kinds, encoders among them, the layers have the same names in both.

    Args:
        model_dir: as in `load_model`; of its files only the configuration is read.

    Raises:
        UserError: nothing there, a configuration that makes no model, or one of neither kind of model.
    """
    source, local = _source(model_dir)
    try:
        # An encoder is told that its language model lacks a setting, which its layers' shapes do not depend on.
        with errors_alone():
            config = transformers.AutoConfig.from_pretrained(
                source, local_files_only=local, trust_remote_code=False
            )
            auto_class: Any = transformers.AutoModelForCausalLM
            if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
                auto_class = transformers.AutoModelForSequenceClassification
                known = type(config) in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
                if not known or config.is_encoder_decoder:
                    raise UserError(
                        f"the model in {model_dir} ({config.model_type}) is no causal language model and no text "
                        "classifier: plan it from Python, with uniform_plan(model)"
                    )
            with torch.device("meta"):
                return auto_class.from_config(config, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # whatever values of the file lead to: nothing else is read
        raise _unloadable(model_dir, error) from error


def _source(model_dir: str | os.PathLike[str]) -> tuple[str, bool]:
    """What to load from, and whether it is a directory, not a name on the hub."""
    path = Path(model_dir)
    local = path.exists()
    if local and not path.is_dir():
        raise UserError(f"model {model_dir} is a file: give the directory that holds config.json")
    if local and not (path / "config.json").is_file():
        raise UserError(
            f"model directory {model_dir} has no config.json: give one written by save_pretrained"
        )
    if not local and (
        path.is_absolute() or str(model_dir).startswith((".", "~")) or str(model_dir).count("/") != 1
    ):
        raise UserError(f"model directory {model_dir} does not exist")
    return (str(path) if local else str(model_dir)), local


def _unloadable(model_dir: str | os.PathLike[str], error: Exception) -> UserError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        lines = [type(error).__name__]
    # A heading alone says nothing.
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return UserError(f"cannot load a model from {model_dir}: {said}")


def _require_all_weights(model_dir: str | os.PathLike[str], missing: Collection[str]) -> None:
    if missing:
        raise UserError(
            f"the checkpoint in {model_dir} lacks {min(missing)} (of {len(missing)} weights), which would be drawn "
            "anew at every load: give one that has them"
        )


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers' bars for shards of weights, which a model of any size that fits here passes in no time, are off."""
    were_on = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            transformers.utils.logging.enable_progress_bar()
