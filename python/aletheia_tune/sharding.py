"""Parameters that FSDP2 keeps in shards: which they are, and having them whole.

Inside the forward and backward pass of a module that `fully_shard` was given, its parameters are plain tensors;
outside they are DTensors, of which each process holds a part.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from aletheia_tune.errors import UserError


def is_sharded(tensor: object) -> bool:
    """Whether this process may hold only a part of it."""
    return isinstance(tensor, DTensor)


def require_whole(model: nn.Module) -> None:
    """Refuses a model that is sharded already.

    What this package finds out about a model it finds out by running parts of it alone. FSDP2 gathers no weights then,
    and takes the first part that runs for the root of the model.

    Raises:
        UserError: with the name of a sharded parameter.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise UserError(f"{name} is sharded: probe, and put the operators in place, before fully_shard")


def whole(tensor: Tensor) -> Tensor:
    """The tensor of which this process may hold a part; every process of the mesh has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def laid_out_like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor, the same in every process, as `other` is laid out: this process's part of it, or all."""
    if isinstance(other, DTensor):
        # Without a source rank nothing is sent: each process cuts its part out of what it has.
        return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)
    return tensor
