"""Whether a model keeps apart the examples that lie one after another in one row, found by trying.

A packed row has no padding and no mask: where an example begins is told by positions that start again at 0, from
which transformers builds a mask or key ranges. A model that takes its positions or its mask from elsewhere (ALiBi,
recurrent layers, a key-value cache in use) would let examples read each other without an error.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from aletheia_tune.errors import UserError
from aletheia_tune.layers import bare_model

_LENGTH = 8
_ROUNDING = 4


def require_separation(model: nn.Module) -> None:
    """Runs a packed row of two examples of 8 tokens, in the way that training and evaluation run the model.

    In training mode the second example's logits must not depend on the first one's tokens; in evaluation mode they
    must be those of the second example alone; each within 4 roundings of the model's dtype. The model and the random
    numbers are left as they were.

    Args:
        model: a causal language model, bare or in PEFT, as it will be trained.

    Raises:
        UserError: the model cannot run a packed row, or does not keep its examples apart.
    """
    parameter = next(model.parameters())
    bare: Any = bare_model(model)
    vocabulary = bare.get_input_embeddings().weight.shape[0]
    row = torch.arange(2 * _LENGTH, device=parameter.device) % vocabulary
    other = torch.cat([(row[:_LENGTH] + 1) % vocabulary, row[_LENGTH:]])
    positions = torch.arange(_LENGTH, device=parameter.device)
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})

    def second(ids: Tensor, training: bool) -> Tensor:
        model.train(training)
        torch.manual_seed(0)  # the same dropout in the runs that are compared
        position_ids = positions.repeat(len(ids) // _LENGTH)
        return model(input_ids=ids[None], position_ids=position_ids[None]).logits[0, -_LENGTH:].float()

    was_training = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            first_changed = second(row, True), second(other, True)
            first_missing = second(row, False), second(row[_LENGTH:], False)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"{type(bare).__name__} cannot run a packed batch ({type(error).__name__}: {error}): train without packing"
        ) from error
    finally:
        model.train(was_training)
    for packed, expected in (first_changed, first_missing):
        bound = _ROUNDING * torch.finfo(parameter.dtype).eps * expected.abs().max()
        if not (packed - expected).abs().max() <= bound:
            raise UserError(
                f"{type(bare).__name__} does not keep the examples of a packed batch apart: train without packing"
            )
