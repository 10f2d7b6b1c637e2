"""When is something due next? The timers of one stack: a heap of deadlines with lazy deletion.

Most timers are cancelled (their packet is acknowledged), so cancelling costs one dictionary operation and
leaves the heap alone; dead entries go when they reach the top or outnumber the living.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush
from typing import Any, TypeVar

NO_TIMER = 0
_TIDY_FROM = 256

Owner = TypeVar("Owner")


class Timers:
    """Calls back with the owner of each timer, whatever that is, whose deadline has passed. Times are seconds of
    the caller's clock.
    """

    __slots__ = ("_heap", "_last_handle", "_live")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []
        self._live: dict[int, tuple[Callable[[Any, float], None], Any]] = {}
        self._last_handle = NO_TIMER

    def __len__(self) -> int:
        return len(self._live)

    def start(self, deadline: float, callback: Callable[[Owner, float], None], owner: Owner) -> int:
        """Have `callback(owner, now)` called at `deadline` or soon after.

        Returns the handle for `cancel`, never NO_TIMER.
        """
        self._last_handle = handle = self._last_handle + 1
        self._live[handle] = (callback, owner)
        heappush(self._heap, (deadline, handle))
        return handle

    def cancel(self, handle: int) -> None:
        """Forget a timer. NO_TIMER and timers that are over are fine."""
        if self._live.pop(handle, None) is not None and len(self._heap) > _TIDY_FROM + 2 * len(self._live):
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapify(self._heap)

    def next_deadline(self) -> float | None:
        """The earliest deadline, None without timers."""
        heap = self._heap
        while heap:
            if heap[0][1] in self._live:
                return heap[0][0]
            heappop(heap)
        return None

    def run(self, now: float) -> None:
        """Call back what is due, earliest first. Callbacks may start and cancel timers."""
        while self._heap and self._heap[0][0] <= now:
            due = self._live.pop(heappop(self._heap)[1], None)
            if due is not None:
                callback, owner = due
                callback(owner, now)
