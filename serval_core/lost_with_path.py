"""What if data was lost with the path that a flow has left? Then it is repeated soon, not when TCP's timer has run out.

A path that breaks takes along what is under way, which the kernel notices after 200 ms at the earliest. A flow that was
moved from a path that works goes on being acknowledged. So one that has heard nothing new of its data for two round trips
after a move has lost it, and the data plane lets its socket repeat it (`dataplane.after_move`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from serval_core.dataplane.flow_sockets import SocketState
from serval_core.names import FlowID

WAIT_MIN_S = 0.02
ROUND_TRIPS = 2


class LostWithPath:
    """Looks after the flows of one stack that have just been moved. Belongs to its loop."""

    __slots__ = ("_look_at", "_repeat_all", "_waiting", "repeated")

    def __init__(
        self, look: Callable[[FlowID], SocketState | None], repeat_all: Callable[[FlowID, SocketState], None]
    ) -> None:
        """`look` finds the kernel socket of a flow, `repeat_all` has it repeat what is unacknowledged."""
        self._look_at = look
        self._repeat_all = repeat_all
        self._waiting: dict[FlowID, asyncio.TimerHandle] = {}
        self.repeated = 0
        """How often something was."""

    def moved(self, flow_id: FlowID) -> None:
        """A flow takes another path from now on."""
        self._forget(flow_id)
        seen = self._look_at(flow_id)
        # After a timeout TCP repeats by itself (`after_move`).
        if seen is not None and seen.send_next != seen.send_unacknowledged and not seen.timeouts:
            wait_s = max(WAIT_MIN_S, ROUND_TRIPS * seen.round_trip_us / 1e6)
            loop = asyncio.get_running_loop()
            self._waiting[flow_id] = loop.call_later(wait_s, self._look, flow_id, seen.send_unacknowledged)

    def close(self) -> None:
        """Look after nobody any more."""
        for flow_id in list(self._waiting):
            self._forget(flow_id)

    def _forget(self, flow_id: FlowID) -> None:
        timer = self._waiting.pop(flow_id, None)
        if timer is not None:
            timer.cancel()

    def _look(self, flow_id: FlowID, unacknowledged: int) -> None:
        del self._waiting[flow_id]
        seen = self._look_at(flow_id)
        if seen is not None and seen.mss_bytes and seen.send_unacknowledged == unacknowledged and not seen.timeouts:
            self._repeat_all(flow_id, seen)
            self.repeated += 1
