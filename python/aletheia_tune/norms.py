"""RMS norms and rotary embeddings of a transformers model on the operators, without touching a model's source.

Nothing is known of a family: a module that calls itself a norm, or a function that calls itself a rotary embedding, is
served when it computes what the operator computes, which is tried on a few random rows at entry.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from aletheia_kernels import backends, cpu, rms_norm, rotary
from aletheia_kernels.autocast import outside_autocast
from aletheia_tune.torch_state import is_hooked

_NORM_NAMES = ("RMSNorm", "LayerNorm")
_EPS_NAMES = ("variance_epsilon", "eps")
_ROTARY_NAME = "apply_rotary_pos_emb"
# What calling a module or function that is not what it is taken for may raise.
_MISFITS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


@dataclass(frozen=True)
class KernelNorms:
    """How many of a model's RMS norms and whether its rotary embedding run on the operators, and why others do not."""

    norms: int
    rotary: bool
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        served = f"{self.norms} norms" + (" and the rotary embedding" if self.rotary else "")
        return "; ".join([served, *self.reasons])


@dataclass(frozen=True)
class _Form:
    """The operator's parameters with which it computes what a norm module computes."""

    eps: float
    offset: float
    rounds_first: bool

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm(x, weight, self.eps, offset=self.offset, rounds_first=self.rounds_first)


def _compiled(operator: str, tensor: Tensor) -> bool:
    return backends.choose(operator, tensor.device, tensor.dtype).backend != "reference"


def _untouched_by_others(*tensors: Tensor) -> bool:
    """Whether neither autocast nor a compiler is at work, and all have one dtype."""
    first = tensors[0]
    return (
        all(t.dtype == first.dtype for t in tensors)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(first.device.type)
    )


def _agree(given: Any, expected: Tensor) -> bool:
    """Whether two results are equal within the rounding of their dtype, here and there a unit apart in two places."""
    if not isinstance(given, Tensor) or given.shape != expected.shape or given.dtype != expected.dtype:
        return False
    tolerance = 4 * torch.finfo(expected.dtype).eps
    return bool((given - expected).abs().max() <= tolerance * expected.abs().max())


def _form_of(module: nn.Module, weight: Tensor, eps: float) -> _Form | None:
    """The form of the norm that a module computes, found under a weight drawn at random; None if it has none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, weight.shape[0], generator=generator) + 0.25
    x[:, 1:] *= eps**0.5  # beside it ε counts
    random = torch.randn(weight.shape, generator=generator)
    found: list[tuple[int, _Form]] = []
    with torch.no_grad(), outside_autocast(weight):
        for offset, rounds_first in itertools.product((0.0, 1.0), (True, False)):
            form = _Form(eps, offset, rounds_first)
            equal = 0
            for dtype in dict.fromkeys((weight.dtype, torch.float32)):
                x_, weight_ = x.to(weight.device, dtype), random.to(weight.device, dtype)
                expected = functional_call(module, {"weight": weight_}, (x_,))
                given = form(x_, weight_)
                if not _agree(expected, given):
                    break
                equal += int((expected == given).sum())
            else:
                found.append((equal, form))
    # Forms that round in other places agree as well, but in fewer elements.
    return max(found, key=lambda pair: pair[0])[1] if found else None


def _norm_or_reason(module: Any) -> _Form | str:
    if "forward" in module.__dict__:
        return "its forward is already replaced"
    if is_hooked(module):
        return "a hook is registered on it"
    eps = next((getattr(module, name) for name in _EPS_NAMES if hasattr(module, name)), None)
    weight = getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, nn.Parameter) or weight.dim() != 1:
        return "it has no one-dimensional weight and ε"
    choice = backends.choose("rms_norm", weight.device, weight.dtype)
    if choice.backend == "reference":
        return choice.reason
    try:
        form = _form_of(module, weight, eps)
    except _MISFITS as error:
        return f"it does not take one tensor ({type(error).__name__})"
    return form or "it computes something else"


class _NormForward:
    """The forward that replaces a norm's own, which it calls wherever the operator does not serve."""

    def __init__(self, module: nn.Module, form: _Form) -> None:
        self.module = module
        self.form = form
        self.original = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 1 and not kwargs:
            (x,), weight = args, self.module.weight
            assert isinstance(weight, Tensor)
            if _untouched_by_others(x, weight) and x.device == weight.device and _compiled("rms_norm", x):
                return self.form(x, weight)
        return self.original(*args, **kwargs)


def _turns(function: Callable[..., Any], rotated: int, wide_angles: bool) -> bool:
    """Whether a function computes what the operator does, for heads of 16 features, in every dtype that is compiled."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 5, heads, 16, generator=generator).transpose(1, 2) for heads in (4, 2))
    # The halves of cos and sin differ, so that a function that reads them otherwise gives itself away.
    cos, sin = (torch.randn(2, 5, rotated, generator=generator) for _ in range(2))
    try:
        with torch.no_grad(), outside_autocast(q):
            for dtype in cpu.DTYPES:
                angles = torch.promote_types(dtype, torch.float32) if wide_angles else dtype
                operands = [q.to(dtype), k.to(dtype), cos.to(angles), sin.to(angles)]
                given, expected = function(*operands), rotary(*operands)
                if not all(_agree(a, b) for a, b in zip(given, expected, strict=True)):
                    return False
    except _MISFITS:
        return False
    return True


class _Rotary:
    """What stands in a modeling file for its rotary function: the operator where it serves, else that function."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.users = 0
        self.served = {
            (partial, wide_angles)
            for partial, wide_angles in itertools.product((False, True), repeat=2)
            if _turns(original, 10 if partial else 16, wide_angles)
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            self.users
            and len(args) == 4
            and (not kwargs or kwargs == {"unsqueeze_dim": 1})
            and self._serves(*args)
        ):
            return rotary(*args)
        return self.original(*args, **kwargs)

    def _serves(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
        return (
            q.dim() == k.dim() == 4
            and cos.dim() == 3
            and (cos.shape[-1] < q.shape[-1], cos.dtype != q.dtype) in self.served
            and q.shape[0] == k.shape[0]
            and q.shape[2:] == k.shape[2:]
            and cos.shape == sin.shape == (cos.shape[0], q.shape[2], cos.shape[2])
            and cos.shape[0] in (1, q.shape[0])
            and cos.shape[2] % 2 == 0
            and cos.shape[2] <= q.shape[3]
            and q.device == k.device == cos.device == sin.device
            and not cos.requires_grad
            and not sin.requires_grad
            and cos.dtype in (q.dtype, torch.float32)
            and _untouched_by_others(q, k)
            and _untouched_by_others(cos, sin)
            and _compiled("rotary", q)
        )


_lock = threading.Lock()


@contextmanager
def _rotary_in(file: ModuleType) -> Iterator[bool]:
    """The operator in a modeling file while any context, in any thread, is open on it; whether it serves."""
    with _lock:
        wrapper = getattr(file, _ROTARY_NAME)
        if not isinstance(wrapper, _Rotary):
            wrapper = _Rotary(wrapper)
            if not wrapper.served:
                wrapper = None
            else:
                setattr(file, _ROTARY_NAME, wrapper)
        if wrapper is not None:
            wrapper.users += 1
    if wrapper is None:
        yield False
        return
    try:
        yield True
    finally:
        with _lock:
            wrapper.users -= 1
            # Whatever someone else has put over it meanwhile stays, and finds the original underneath.
            if wrapper.users == 0 and getattr(file, _ROTARY_NAME) is wrapper:
                setattr(file, _ROTARY_NAME, wrapper.original)


def _modeling_files(model: nn.Module) -> list[ModuleType]:
    """The Python modules that define the model's modules and know a rotary function of q, k, cos and sin."""
    files = []
    for name in dict.fromkeys(type(module).__module__ for module in model.modules()):
        function = getattr(sys.modules.get(name), _ROTARY_NAME, None)
        original = function.original if isinstance(function, _Rotary) else function
        if original is not None and [*inspect.signature(original).parameters][:4] == ["q", "k", "cos", "sin"]:
            files.append(sys.modules[name])
    return files


@contextmanager
def kernel_norms(model: nn.Module) -> Iterator[KernelNorms]:
    """RMS norms and rotary embeddings on the operators while inside the context, in training and in evaluation.

    A norm is a module whose class name ends in RMSNorm or LayerNorm, that has a weight and an ε and that computes what
    the operator computes; its ``forward`` is replaced on the instance. Calls that the operator does not serve
    (autocast, a compiler at work, an input in another dtype than the weight) run the module's own forward.

    The rotary embedding is no module but a function of the modeling file, so the file's global is replaced, as Liger
    does it: for every model of the process that was built from that file, until the last context on it closes. That is
    safe because the replacement computes what the function computes, as tried at entry in every dtype, with one
    rounding where it has three, and hands every call that it does not serve, with its arguments as they are, to the
    function itself. It asks neither for training mode nor for gradients: layers that run without a graph gain as much,
    and what is recomputed under a checkpoint has to be what was computed first.

    Args:
        model: a transformers model, bare or in PEFT.

    Yields:
        KernelNorms: what is in place, and why not the rest. On exit everything is as it was.
    """
    slow: Counter[str] = Counter()
    with ExitStack() as undo:
        norms = 0
        files = _modeling_files(model)
        turning = False
        try:
            for module in model.modules():
                if not type(module).__name__.endswith(_NORM_NAMES):
                    continue
                found = _norm_or_reason(module)
                if isinstance(found, str):
                    slow[f"{type(module).__name__}: {found}"] += 1
                    continue
                module.forward = _NormForward(module, found)
                undo.callback(module.__dict__.pop, "forward", None)
                norms += 1
            choice = backends.choose("rotary", *_placed(model))
            if not files:
                slow["the modeling file has no rotary function of q, k, cos and sin"] += 1
            elif choice.backend == "reference":
                slow[f"rotary embedding: {choice.reason}"] += 1
            else:
                for file in files:
                    served = undo.enter_context(_rotary_in(file))
                    turning = turning or served
                    if not served:
                        slow[f"rotary embedding: {file.__name__} computes it otherwise"] += 1
        except backends.BackendError as error:
            slow[str(error)] += 1
        reasons = tuple(reason if count == 1 else f"{count} × {reason}" for reason, count in slow.items())
        yield KernelNorms(norms, turning, reasons)


def _placed(model: nn.Module) -> tuple[str, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device.type, parameter.dtype
