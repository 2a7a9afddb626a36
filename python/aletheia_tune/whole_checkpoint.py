"""An adapter amid its training, whole on disk: written from one layout (a process, DDP, FSDP2), read into any other.

The directory is an adapter as PEFT saves it, with the optimizer's state beside it: for every trainable parameter the
optimizer's tensors under its name, whole, in safetensors. Random states and the place in the data belong to one layout
and to the caller's loop, and are not in it; `checkpoint`, which `fine_tune` goes on from, keeps them for one process.
"""

from __future__ import annotations

import os
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from aletheia_tune import files
from aletheia_tune.environment import is_first_process
from aletheia_tune.errors import UserError
from aletheia_tune.sharding import laid_out_like, whole

OPTIMIZER_FILE = "optimizer.safetensors"


def save_checkpoint(
    model: PeftModel, optimizer: Optimizer, directory: str | os.PathLike[str], *, overwrite: bool = False
) -> None:
    """Write the active adapter and the optimizer's state; all processes call it, and the first writes.

    `PeftModel.from_pretrained(base, directory, is_trainable=True)` reads the adapter back, before the model is sharded;
    `load_optimizer` the rest, after.

    Args:
        model: as it is trained, sharded or not.
        optimizer: over its trainable parameters, keeping tensors alone (AdamW does).
        directory: must not exist or be empty, unless `overwrite`; appears once all is in it.
        overwrite: replace a directory that is there.

    Raises:
        UserError: the directory is taken, or the optimizer keeps something that is no tensor.
    """
    adapter = {name: whole(parameter.detach()) for name, parameter in _trainable(model).items()}
    state = {
        f"{name}.{key}": whole(_tensor(value, key)).contiguous()
        for name, parameter in _trainable(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    if not is_first_process():
        return
    with files.output_directory(directory, overwrite) as aside:
        # The embeddings are frozen: without the flag PEFT may ask the hub whether they were resized.
        model.save_pretrained(
            str(aside),
            state_dict=adapter,
            selected_adapters=model.active_adapters,
            save_embedding_layers=False,
        )
        save_file(state, aside / OPTIMIZER_FILE)


def load_optimizer(model: nn.Module, optimizer: Optimizer, directory: str | os.PathLike[str]) -> None:
    """Give a fresh optimizer the state that `save_checkpoint` wrote, laid out as its parameters are now.

    Args:
        model: with the adapter of that checkpoint, sharded or not, in any number of processes.
        optimizer: over its trainable parameters. Its learning rate and other settings stay its own.
        directory: which every process can read.

    Raises:
        UserError: no such file, or one of another adapter.
    """
    path = Path(directory) / OPTIMIZER_FILE
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}; give a directory of save_checkpoint") from error
    parameters = _trainable(model)
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        name, _, part = key.rpartition(".")
        if name not in parameters:
            raise UserError(
                f"{path} has {name}, which is not trained here: give the checkpoint's own adapter"
            )
        if tensor.dim() > 0 and tensor.shape != parameters[name].shape:
            raise UserError(
                f"{path}: {key} is {list(tensor.shape)}, the adapter {list(parameters[name].shape)}: "
                "give the checkpoint's own adapter"
            )
        states.setdefault(name, {})[part] = (
            laid_out_like(tensor, parameters[name]) if tensor.dim() else tensor
        )
    names = {parameter: name for name, parameter in parameters.items()}
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    content = optimizer.state_dict()
    content["state"] = {
        index: states[names[parameter]]
        for index, parameter in enumerate(order)
        if names.get(parameter) in states
    }
    optimizer.load_state_dict(content)


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _tensor(value: object, key: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise UserError(
            f"the optimizer keeps {key}, which is no tensor: take one that keeps tensors, as AdamW does"
        )
    return value
