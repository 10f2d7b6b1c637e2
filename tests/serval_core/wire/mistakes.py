"""With which reason is a packet refused?"""

from __future__ import annotations

from collections.abc import Callable

from serval_core.errors import TheirMistake


def reason_for(parse: Callable[[bytes], object], data: bytes) -> str | None:
    """The reason that `parse` gives for refusing `data`, or None when it takes it."""
    try:
        parse(data)
    except TheirMistake as mistake:
        return mistake.reason
    return None
