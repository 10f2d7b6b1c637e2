"""Whose mistake was it? The error classes of the stack.

`OurMistake`: the caller used the API wrongly. `TheirMistake`: bytes from the network broke a rule; it carries the reason
under which the packet is counted. `KernelRefused`: a system call failed; it says what to do about it.
"""

from __future__ import annotations

import os


class ServalError(Exception):
    """Base of every error that this stack raises on purpose."""


class OurMistake(ServalError):
    """The API was used in a way its documentation excludes."""


class TheirMistake(ServalError):
    """A packet violates the protocol. `reason` is a short constant, used as the name of the drop counter."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class KernelRefused(ServalError):
    """A system call failed. `call` names it, `errno` says how, `hint` says what the operator can do about it."""

    def __init__(self, call: str, errno: int, hint: str) -> None:
        super().__init__(f"{call}: {os.strerror(errno)}. {hint}")
        self.call = call
        self.errno = errno
        self.hint = hint
