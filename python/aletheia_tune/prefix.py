"""The frozen layers under the lowest adapter: run them without an autograd graph.

A layer whose parameters are frozen and whose input needs no gradient builds no graph, so the backward pass
ends at the lowest adapted layer by itself. It does not once the embeddings' output is made to require a
gradient, which `enable_input_require_grads` does and which gradient checkpointing turns on: every layer then
keeps its activations and is walked through backwards, for a gradient that nobody reads. `cut_prefix` detaches
the hidden states on their way into the first layer, and what comes into the stack of layers from elsewhere (an
encoder's output, which every layer reads), and gives the reentrant checkpoint of the lowest adapted layer the one
thing it needs, an input that requires a gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aletheia_tune.layers import bare_model, find_layers


class PrefixCut:
    """A cut in force, made by `cut_prefix`.

    Attributes:
        lowest_layer: index of the lowest layer that holds a trainable parameter, so also the number of layers
            that run without a graph; None when no cut was made.
        reason: why no cut was made; empty when one was.
    """

    def __init__(
        self,
        layers: nn.ModuleList | None,
        lowest_layer: int | None,
        reason: str = "",
        stack: nn.Module | None = None,
    ) -> None:
        self.lowest_layer = lowest_layer
        self.reason = reason
        self._handles: list[RemovableHandle] = []
        self._checkpointing_off: list[nn.Module] = []
        if layers is None or lowest_layer is None or stack is None:
            return
        self._prefix = list(layers)[:lowest_layer]
        self._handles.append(stack.register_forward_pre_hook(_detach_all, with_kwargs=True))
        self._handles.append(layers[0].register_forward_pre_hook(self._enter_first, with_kwargs=True))
        # Registered after the detaching hook, which therefore runs first when the lowest layer is the first one.
        self._handles.append(layers[lowest_layer].register_forward_pre_hook(_enter_lowest, with_kwargs=True))

    def remove(self) -> None:
        """Undo the cut: hooks go, and checkpointing of the prefix layers is as it was."""
        for handle in self._handles:
            handle.remove()
        for layer in self._checkpointing_off:
            layer.gradient_checkpointing = True  # type: ignore[assignment]
        self._handles.clear()
        self._checkpointing_off.clear()

    def _enter_first(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for below in self._prefix:
            if any(parameter.requires_grad for parameter in below.parameters()):
                raise RuntimeError(
                    f"a parameter under layer {self.lowest_layer} was made trainable after cut_prefix: "
                    "remove() this cut and make a new one"
                )
            # A checkpoint saves what a backward needs, and there is none here: all it would do is stash RNG
            # state and, in its reentrant kind, warn that no input requires a gradient.
            if getattr(below, "gradient_checkpointing", False):
                below.gradient_checkpointing = False  # type: ignore[assignment]
                self._checkpointing_off.append(below)
        return replace_hidden_states(args, kwargs, Tensor.detach)


def cut_prefix(model: nn.Module) -> PrefixCut:
    """Let the layers under the lowest trainable parameter run without an autograd graph.

    The gradients of the trainable parameters are unchanged. It holds whether or not
    `enable_input_require_grads` or gradient checkpointing (reentrant or not) is on, and may be switched on
    before or after the cut.

    Args:
        model: a causal language model, bare or wrapped by PEFT.

    Returns:
        The cut, to be undone by its `remove()`. There is none, and `reason` says why, when nothing in the layers is
        trainable or when something trainable feeds them: input embeddings, a soft prompt, a vision tower.

    Raises:
        UserError: the model has no known list of layers.
    """
    found = find_layers(model)
    inside = {
        id(parameter): index for index, layer in enumerate(found.layers) for parameter in layer.parameters()
    }
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    lowest = min((inside[id(p)] for p in trainable.values() if id(p) in inside), default=None)
    if lowest is None:
        return PrefixCut(None, None, "no parameter of the layers is trainable")
    above = parameters_above(model, found.layers)
    for name, parameter in trainable.items():
        if id(parameter) not in inside and id(parameter) not in above:
            return PrefixCut(None, None, f"{name} is trainable and may feed the layers from below")
    stack = bare_model(model).get_submodule(found.path.rpartition(".")[0])
    return PrefixCut(found.layers, lowest, stack=stack)


def parameters_above(model: nn.Module, layers: nn.ModuleList) -> set[int]:
    """Ids of the parameters that can only act on what the layers put out.

    Models register their parts in the order of use, so what the bare model registers after the layers (final
    norm, head) comes after them. A head tied to the input embeddings is the same parameter, registered before them.
    """
    in_layers = {id(parameter) for parameter in layers.parameters()}
    above: set[int] = set()
    seen_layers = False
    for _, parameter in bare_model(model).named_parameters():
        if id(parameter) in in_layers:
            seen_layers = True
        elif seen_layers:
            above.add(id(parameter))
    return above


def _detach_all(
    stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the module around the layers, out of any graph: nothing under them is trainable."""

    def detached(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) and value.requires_grad else value

    return tuple(map(detached, args)), {name: detached(value) for name, value in kwargs.items()}


def _enter_lowest(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not (torch.is_grad_enabled() and layer.training and _reentrant_checkpoint(layer)):
        return None
    return replace_hidden_states(args, kwargs, lambda hidden: hidden.detach().requires_grad_())


def _reentrant_checkpoint(layer: nn.Module) -> bool:
    """Whether the layer runs in a reentrant checkpoint, whose output has a graph only if an input has.

    A checkpoint function that cannot be read counts as reentrant: an input that requires a gradient in vain
    costs one product a linear, a lost graph would cost the training.
    """
    if not getattr(layer, "gradient_checkpointing", False):
        return False
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return not (isinstance(function, partial) and function.keywords.get("use_reentrant") is False)


def replace_hidden_states(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a layer with its hidden states changed, which come first or by name."""
    if args and isinstance(args[0], Tensor):
        return (change(args[0]), *args[1:]), kwargs
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
    raise RuntimeError("cut_prefix: a layer was called without hidden states as first argument or by name")
