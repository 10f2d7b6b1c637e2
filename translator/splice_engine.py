"""Which splice engine relays the bytes on this machine?

The compiled one (splice_ext) where it was built, else the pure Python one (splice_fallback), which does the
same with more CPU. Import everything about splice engines from here.
"""

from __future__ import annotations

from translator.splice_types import Completion, CompletionReason, DirectionState, PairCounters

FALLBACK_BECAUSE: str | None = None
"""Why the compiled engine could not be loaded; None when it is in use."""

try:
    from translator.splice_ext import SpliceEngine
except ImportError as error:
    from translator.splice_fallback import SpliceEngine  # type: ignore[assignment]

    FALLBACK_BECAUSE = str(error)

__all__ = [
    "FALLBACK_BECAUSE",
    "Completion",
    "CompletionReason",
    "DirectionState",
    "PairCounters",
    "SpliceEngine",
]
