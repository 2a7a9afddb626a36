"""The first use of an operator on a card: a check of it there, so that a card on which it is wrong gets eager torch.

Compilers and drivers have made kernels that run and write nothing, on one kind of card and no other. So each operator,
in each dtype, is held to the reference once a process and card before it serves (:mod:`aletheia_kernels.selftest`). The
interpreter needs no such check.
"""

from __future__ import annotations

import warnings

import torch
from torch.utils._python_dispatch import _disable_current_modes

# (operator, index of the card, dtype) -> why it does not serve; None while it is being checked, and where it was right.
_refusals: dict[tuple[str, int, torch.dtype], str | None] = {}


def refusal(operator: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton operator is not trusted on the card behind a device; None where it is, and without a card."""
    if not _is_card(device):
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    key = operator, index, dtype
    if key not in _refusals:
        if _is_traced():
            return None
        # The check runs the operator through its public function, perhaps on autograd's thread for this card: whoever
        # asks meanwhile is served, and must not wait here for the check that waits for him.
        _refusals[key] = None
        try:
            _refusals[key] = check(operator, torch.device(device.type, index), dtype)
        except torch.OutOfMemoryError:
            del _refusals[key]
            raise
    return _refusals[key]


def _is_card(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_available()


def _is_traced() -> bool:
    """Whether this call is only being recorded: then nothing can be computed and compared."""
    return torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing()


def check(operator: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Runs the operator's self-test on the device; why it does not serve, after a warning that says so, or None."""
    from aletheia_kernels import selftest

    try:
        with _disable_current_modes():
            error, allowed = selftest.check(operator, device, dtype)
        if error <= allowed:
            return None
        finding = f"a relative error of {error:.1e} where {allowed:.0e} is allowed"
    except torch.OutOfMemoryError:
        raise
    except Exception as exception:
        finding = f"{type(exception).__name__}: {exception}"
    place = f"{operator} in {str(dtype).removeprefix('torch.')} on {_name(device)}"
    warnings.warn(
        f"aletheia_kernels: the self-test of {place} failed, so eager torch serves it in this process."
        " Results are right, and slower. Please report it to the aletheia-kernels issue tracker with this line:"
        f" {place}, torch {torch.__version__}, triton {_triton_version()}: {finding}",
        RuntimeWarning,
        stacklevel=2,
    )
    return f"its self-test failed on {_name(device)} ({finding})"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"


def _triton_version() -> str:
    import triton

    return triton.__version__
