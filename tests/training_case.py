"""One training pass of a model, and where the attention operator serves one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from aletheia_kernels import backends

# Elsewhere a model stays on its own attention.
served = pytest.mark.skipif(
    backends.choose("range_attention", "cpu", torch.bfloat16).backend != "cpu",
    reason="the attention operator is compiled, and the C++ extension is not here",
)


def loss_and_gradient(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and the gradients of all parameters end to end, in float64."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach().double(), torch.cat([p.grad.double().flatten() for p in model.parameters()])
