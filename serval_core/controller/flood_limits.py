"""How many messages of one kind are too many? Token buckets, one per sender or one for all.

A bucket fills at a steady rate up to its size; each message takes one token, and a message that finds none is
too much. Time is an argument.
"""

from __future__ import annotations

from collections import OrderedDict

SENDERS_MAX = 8192
ROUNDING = 1e-6


class TokenBucket:
    """One bucket, full at the start."""

    __slots__ = ("_filled_at", "_rate_per_s", "_size", "_tokens")

    def __init__(self, rate_per_s: float, size: float, now: float) -> None:
        self._rate_per_s = rate_per_s
        self._size = size
        self._tokens = size
        self._filled_at = now

    def take(self, now: float) -> bool:
        """Take a token; false if there is none."""
        self._tokens = min(self._size, self._tokens + (now - self._filled_at) * self._rate_per_s)
        self._filled_at = now
        if self._tokens < 1 - ROUNDING:
            return False
        self._tokens -= 1
        return True

    def ready_at(self) -> float:
        """When there is a token, if none is taken before."""
        return self._filled_at + max(0.0, (1 - self._tokens) / self._rate_per_s)


class SenderBuckets:
    """A bucket for each sender. Only the most recent senders are remembered: many make none of them slow."""

    def __init__(self, rate_per_s: float, size: float) -> None:
        self._rate_per_s = rate_per_s
        self._size = size
        self._buckets: OrderedDict[int, TokenBucket] = OrderedDict()

    def take(self, sender: int, now: float) -> bool:
        """Take a token of `sender`'s; false if there is none."""
        bucket = self._buckets.get(sender)
        if bucket is None:
            if len(self._buckets) >= SENDERS_MAX:
                self._buckets.popitem(last=False)
            bucket = self._buckets[sender] = TokenBucket(self._rate_per_s, self._size, now)
        else:
            self._buckets.move_to_end(sender)
        return bucket.take(now)
