"""Eager calls past the dispatcher of torch.library, for operators whose work its Python path would outweigh.

A registered operator costs some tenths of a millisecond a call with its backward, a normalisation of a few thousand
rows half of one tenth. Such an operator is registered, for whatever traces, and served in eager mode by an autograd
function of the same parts: one forward, one context, one backward, so that there is nothing to keep in step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_derivative(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """A backward whose gradients cannot be differentiated again, and raise where somebody tries.

    `torch.autograd.function.once_differentiable` lets them pass as constants when no incoming gradient requires one,
    and a penalty on the gradient of a sum would go without its share from here, in silence.
    """

    @functools.wraps(backward)
    def guarded(ctx: Any, *gradients: Tensor | None) -> tuple:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():  # without create_graph
            return found
        refuse = torch._C._functions.DelayedError(b"aletheia_kernels: no second derivative", len(found))
        given: list[Any] = [None if one is None else one.detach().requires_grad_() for one in found]
        refused = refuse(*given)
        return refused if isinstance(refused, tuple) else (refused,)

    return guarded


def is_eager(*tensors: Tensor) -> bool:
    """Whether a call with these tensors is traced by nobody: not compiling, and no subclass that wants to see it."""
    return not torch.compiler.is_compiling() and all(type(t) in (Tensor, nn.Parameter) for t in tensors)


def eager_function(
    operator: Callable[..., Any],
    setup_context: Callable[[Any, tuple, Any], None],
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """A function of tensors with this backward.

    Args:
        operator: what the registered operator runs, of its arguments.
        setup_context: ``(ctx, inputs, output)``, as ``register_autograd`` takes it.
        backward: ``(ctx, *gradients)``, likewise; it may call what autograd cannot see through.
    """

    class Eager(torch.autograd.Function):
        # The older form, in which forward takes the context: autograd spends half the time on it.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = operator(*inputs)
            setup_context(ctx, inputs, output)
            return output

    Eager.backward = staticmethod(first_derivative(backward))  # type: ignore[method-assign]
    return Eager.apply
