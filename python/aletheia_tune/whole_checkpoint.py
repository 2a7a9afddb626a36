"""An adapter amid its training, whole on disk: written from one layout (a process, DDP, FSDP2), read into any other.

The directory is an adapter as PEFT saves it, with the optimizer's state beside it: for every parameter the optimizer's
tensors under the name that it has in an adapter called "default", whole, in safetensors. What is frozen at the moment,
below a drawn depth say, is in both. Random states and the place in the data belong to one layout and to the caller's
loop, and are not in it; `checkpoint`, which `fine_tune` goes on from, keeps them for one process.
"""

from __future__ import annotations

import os
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
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

    `PeftModel.from_pretrained(base, directory, is_trainable=True)` reads the adapter back, whatever its name, before
    the model is sharded; `load_optimizer` the rest, after.

    Args:
        model: as it is trained, sharded or not.
        optimizer: over its parameters, keeping tensors alone (AdamW does).
        directory: must not exist or be empty, unless `overwrite`; appears once all is in it.
        overwrite: replace a directory that is there.

    Raises:
        UserError: the directory is taken, several adapters or none are active, or the optimizer keeps something that is
            no tensor.
    """
    adapter = _active_adapter(model)
    # FSDP2 puts gathered parameters back in their shards for it: the parameters that the optimizer was given.
    content = model.state_dict()
    saved = get_peft_model_state_dict(
        model, state_dict=content, adapter_name=adapter, save_embedding_layers=False
    )
    adapters_own = {id(tensor) for tensor in saved.values()}
    content = {
        name: whole(tensor) if id(tensor) in adapters_own else tensor for name, tensor in content.items()
    }
    state = {
        f"{name}.{key}": whole(_tensor(value, key)).contiguous()
        for name, parameter in _parameters(model).items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    if not is_first_process():
        return
    with files.output_directory(directory, overwrite) as aside:
        # The embeddings are frozen: without the flag PEFT may ask the hub whether they were resized.
        model.save_pretrained(
            str(aside),
            state_dict=content,
            selected_adapters=[adapter],
            save_embedding_layers=False,
        )
        if adapter != "default":
            # PEFT gives it a directory of its own, in which `from_pretrained` would not look.
            for path in (aside / adapter).iterdir():
                path.rename(aside / path.name)
            (aside / adapter).rmdir()
        save_file(state, aside / OPTIMIZER_FILE)


def load_optimizer(model: PeftModel, optimizer: Optimizer, directory: str | os.PathLike[str]) -> None:
    """Give a fresh optimizer the state that `save_checkpoint` wrote, laid out as its parameters are now.

    Args:
        model: with the adapter of that checkpoint, sharded or not, in any number of processes.
        optimizer: over its trainable parameters. Its learning rate and other settings stay its own; of parameters that
            it was not given it gets nothing.
        directory: which every process can read.

    Raises:
        UserError: no such file, one of another adapter, or several adapters or none are active.
    """
    path = Path(directory) / OPTIMIZER_FILE
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}; give a directory of save_checkpoint") from error
    parameters = _parameters(model)
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


def _active_adapter(model: PeftModel) -> str:
    if len(model.active_adapters) != 1:
        raise UserError(
            f"a checkpoint is of one adapter, and active are {', '.join(model.active_adapters) or 'none'}: "
            "choose one with set_adapter"
        )
    return model.active_adapters[0]


def _parameters(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters, but for those of other adapters, by the names that they have if the active one is "default"."""
    adapter = _active_adapter(model)
    others = set(model.peft_config) - {adapter}
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if adapter in parts:
            parts[len(parts) - 1 - parts[::-1].index(adapter)] = "default"
        elif others & set(parts):
            continue
        found[".".join(parts)] = parameter
    return found


def _tensor(value: object, key: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise UserError(
            f"the optimizer keeps {key}, which is no tensor: take one that keeps tensors, as AdamW does"
        )
    return value
