"""The errors that are the user's to mend: one line that says what is wrong, where, and how to mend it."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what was given (a file, a name, a number), not in the program.

    The message is one line: line breaks, which a file name or a wrapped library error can bring along, become
    spaces. The command line prints it as ``aletheia: error: <line>`` and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(part.strip() for part in message.splitlines()))


class NonFiniteLoss(UserError):
    """Training met a NaN or infinite loss and stopped. ``step`` is the optimizer step, counted from 1."""

    def __init__(self, message: str, *, step: int) -> None:
        super().__init__(message)
        self.step = step
