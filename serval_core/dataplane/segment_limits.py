"""How large may the segments of a flow's socket be, and who reminds it of that? See `after_move` for how it is told."""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import NamedTuple

from serval_core.dataplane.flow_sockets import FlowSockets, SocketState
from serval_core.handshake import mss_for_path
from serval_core.names import FlowID
from serval_core.wire import ipv4, sal, tcp_segment

TIMESTAMP_BYTES = 12  # of every TCP header, when both ends have them
REMINDERS_MAX = 256  # at a time: of all flows there can be, within half of the kernel's ten minutes


class SegmentSize(NamedTuple):
    """What a flow's handshake said about it."""

    mss_bytes: int
    timestamps: bool


class SegmentLimits:
    """The flows of one data plane. MTUs are those of the path, SAL header included, outer UDP not."""

    def __init__(self, sockets: FlowSockets) -> None:
        self._sockets = sockets
        self._sizes: dict[FlowID, SegmentSize] = {}
        self._limits: OrderedDict[FlowID, int] = OrderedDict()  # MTUs that sockets have to be reminded of

    def begin(self, flow_id: FlowID, size: SegmentSize) -> None:
        """A flow has a socket."""
        self._sizes[flow_id] = size

    def forget(self, flow_id: FlowID) -> None:
        """It has none any more."""
        self._sizes.pop(flow_id, None)
        self._limits.pop(flow_id, None)

    def limit(self, flow_id: FlowID, seen: SocketState, mtu_bytes: int, lasting: bool) -> None:
        """Have the socket send no packets that are larger, for good if `lasting`."""
        size = self._sizes.get(flow_id)
        if lasting and size is not None and size.mss_bytes > mss_for_path(mtu_bytes):
            self._limits[flow_id] = mtu_bytes
        elif lasting:
            self._limits.pop(flow_id, None)
        if seen.mss_bytes + self._options_bytes(flow_id) > mss_for_path(mtu_bytes):
            self._sockets.too_big(flow_id, seen, mtu_bytes)

    def repeat_all(self, flow_id: FlowID, seen: SocketState) -> None:
        """Have the kernel socket repeat all that is unacknowledged, at once: it was lost with a path that is no more."""
        headers_bytes = sal.BASE_BYTES + ipv4.HEADER_BYTES + tcp_segment.HEADER_BYTES + self._options_bytes(flow_id)
        mtu_bytes = headers_bytes + seen.mss_bytes - 1
        if flow_id in self._limits:
            self._limits[flow_id] = mtu_bytes  # the kernel ignores being reminded of a larger one
        self._sockets.too_big(flow_id, seen, mtu_bytes)

    def remind(self) -> None:
        """Tell some of the sockets again how large their packets may be, those first that have not been told for the longest time.

        The kernel forgets it after `net.ipv4.route.mtu_expires`, unless it is told again in the second half of that
        time. What is too large then has no router on its way that would say so.
        """
        for flow_id in list(islice(self._limits, REMINDERS_MAX)):
            self._limits.move_to_end(flow_id)
            seen = self._sockets.look(flow_id)
            if seen is not None and seen.mss_bytes:
                self._sockets.too_big(flow_id, seen, self._limits[flow_id])

    def _options_bytes(self, flow_id: FlowID) -> int:
        size = self._sizes.get(flow_id)
        return TIMESTAMP_BYTES if size is not None and size.timestamps else 0
