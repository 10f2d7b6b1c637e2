"""How is something that may happen thousands of times per second said rarely?"""

from __future__ import annotations

import time

import structlog

log = structlog.get_logger("translator")

SILENCE_S = 10.0


class Complaint:
    """A warning that comes at most once in SILENCE_S; the next one says how many there would have been."""

    __slots__ = ("_due_s", "_unsaid")

    def __init__(self) -> None:
        self._due_s = 0.0
        self._unsaid = 0

    def say(self, event: str, **details: object) -> None:
        """Log it, or count it."""
        now = time.monotonic()
        if now < self._due_s:
            self._unsaid += 1
            return
        if self._unsaid:
            details["unsaid"] = self._unsaid
        log.warning(event, **details)
        self._due_s = now + SILENCE_S
        self._unsaid = 0
