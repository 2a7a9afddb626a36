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
_SHARE = 0.25


def require_separation(model: nn.Module) -> None:
    """Runs a packed row of two examples of 8 tokens, in the way that training and evaluation run the model.

    In training mode the second example's logits must not depend on the first one's tokens, within 4 roundings of the
    model's dtype. In evaluation mode they must be those of the second example alone. There the two runs differ in
    shape, so rounding grows with the model's depth; a yardstick for it is what the first example does to the second
    when both are one text: a quarter of that is allowed. The model and the random numbers are left as they were.

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

    def second(ids: Tensor, training: bool, packed: bool = True) -> Tensor:
        model.train(training)
        torch.manual_seed(0)  # the same dropout in the runs that are compared
        position_ids = (
            positions.repeat(len(ids) // _LENGTH) if packed else torch.arange(len(ids), device=ids.device)
        )
        return model(input_ids=ids[None], position_ids=position_ids[None]).logits[0, -_LENGTH:].float()

    was_training = model.training
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            kept, changed = second(row, True), second(other, True)
            packed, alone = second(row, False), second(row[_LENGTH:], False)
            one_text = second(row, False, packed=False)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(
            f"{type(bare).__name__} cannot run a packed batch ({type(error).__name__}: {error}): train without packing"
        ) from error
    finally:
        model.train(was_training)
    rounding = _ROUNDING * torch.finfo(parameter.dtype).eps
    bound = torch.maximum(rounding * alone.abs().max(), _SHARE * (one_text - alone).abs().max())
    for got, expected, allowed in (
        (kept, changed, rounding * changed.abs().max()),
        (packed, alone, bound),
    ):
        if not (got - expected).abs().max() <= allowed:
            raise UserError(
                f"{type(bare).__name__} does not keep the examples of a packed batch apart: train without packing"
            )
