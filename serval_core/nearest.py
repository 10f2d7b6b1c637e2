"""Which of the possible words was probably meant?"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, possible: Iterable[str]) -> str:
    """The end of a sentence about a wrong word: ' (nearest: "eth0")', or all that is possible."""
    words = list(possible)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.4)
    if close:
        return f' (nearest: "{close[0]}")'
    return f" (possible: {', '.join(words)})" if words else ""
