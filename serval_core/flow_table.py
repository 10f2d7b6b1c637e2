"""Which flow is meant? Finds flows by flowID and by the SYN that made them, and hands out flowIDs.

TIMEWAIT lives here too: thousands of connections per second stay a minute each, so what is left of a flow
is one tuple in a queue ordered by time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from serval_core.flow import Flow, SynKey, TimeWait
from serval_core.names import FlowID

# Records go in bunches: waking up for each of thousands per second would keep an idle stack busy.
_TIME_WAIT_GRANULARITY_S = 1.0


class FlowTable:
    """The flows of one stack, by their own flowID."""

    __slots__ = ("_expiry", "_time_wait_limit", "_time_wait_s", "by_id", "by_syn", "half_open", "time_wait")

    def __init__(self, time_wait_s: float, time_wait_limit: int) -> None:
        self.by_id: dict[int, Flow] = {}
        self.by_syn: dict[SynKey, Flow] = {}
        self.half_open = 0
        self.time_wait: dict[int, TimeWait] = {}
        self._expiry: deque[tuple[float, FlowID]] = deque()
        self._time_wait_s = time_wait_s
        self._time_wait_limit = time_wait_limit

    def new_flow_id(self, random_bits: Callable[[int], int]) -> FlowID:
        """An unused random flowID (SPEC 11.1, quirk 9).

        Its halves avoid the values that the `native` framing cannot use as ports (DESIGN 2.1).
        """
        while True:
            number = random_bits(32)
            if (
                number & 0xFFFF
                and 0 < number >> 16 < 0xFFFF
                and number not in self.by_id
                and number not in self.time_wait
            ):
                return FlowID(number)

    def add(self, flow: Flow) -> None:
        """Make a flow known by its flowID and, for a passive one, by its SYN."""
        self.by_id[flow.flow_id] = flow
        if flow.syn_key is not None:
            self.by_syn[flow.syn_key] = flow

    def remove(self, flow: Flow) -> None:
        """Forget a flow. KeyError when it is not in the table."""
        del self.by_id[flow.flow_id]
        if flow.syn_key is not None:
            del self.by_syn[flow.syn_key]

    def keep_in_time_wait(self, flow_id: FlowID, record: TimeWait, now: float) -> None:
        """Remember a flow that has just been removed for the TIMEWAIT period. The oldest gives way."""
        if self._time_wait_limit <= 0:
            return
        if len(self._expiry) >= self._time_wait_limit:
            del self.time_wait[self._expiry.popleft()[1]]
        self.time_wait[flow_id] = record
        self._expiry.append((now + self._time_wait_s, flow_id))

    def next_expiry(self) -> float | None:
        """When `expire` should be called next; None while nothing is in TIMEWAIT."""
        return self._expiry[0][0] + _TIME_WAIT_GRANULARITY_S if self._expiry else None

    def expire(self, now: float) -> None:
        """Forget what has been in TIMEWAIT long enough."""
        expiry = self._expiry
        while expiry and expiry[0][0] <= now:
            del self.time_wait[expiry.popleft()[1]]
