"""How do we wait for something that can be observed? By looking at it until it happened or time is up."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class NeverHappened(AssertionError):
    """The observed condition did not come true before its deadline."""


def wait_for(observe: Callable[[], T], what: str, timeout_s: float = 10.0, interval_s: float = 0.01) -> T:
    """Call `observe` until it returns something true and return that; `NeverHappened` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        if seen := observe():
            return seen
        if time.monotonic() >= deadline:
            raise NeverHappened(f"waited {timeout_s:g} s for {what}; last seen: {seen!r}")
        time.sleep(interval_s)
