"""Does anything come back on a flow's path? Told by packet counters, which are looked at from time to time.

A TCP that sends is answered within a round trip: it gets acknowledgements, or at least an answer to its probes. So a
flow whose counter of sent packets goes on growing while that of received ones stands still has lost its path, or its
peer. One that is silent in both directions is just idle. Times are in seconds of the caller's clock.
"""

from __future__ import annotations

from collections.abc import Collection

from serval_core.names import FlowID

_GROWTHS_MIN = 2  # looks in a row at which more had been sent


class _Record:
    __slots__ = ("began_at", "first_packets_in", "growths", "looked_at", "packets_in", "packets_out")

    def __init__(self, packets_out: int, packets_in: int, now: float) -> None:
        self.packets_in = self.first_packets_in = packets_in
        self.packets_out = packets_out
        self.looked_at = now
        self.restart()

    def restart(self) -> None:
        self.growths = 0
        self.began_at = 0.0


class SilenceWatch:
    """Watches the flows of one stack. Each look at a flow is a call of `looked`."""

    __slots__ = ("_records",)

    def __init__(self) -> None:
        self._records: dict[FlowID, _Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def looked(self, flow_id: FlowID, packets_out: int, packets_in: int, silence_s: float, now: float) -> bool:
        """Take note of a flow's counters; whether it has been sending in vain for `silence_s`. Says so once, and
        then again after the same time.
        """
        record = self._records.get(flow_id)
        if record is None:
            self._records[flow_id] = _Record(packets_out, packets_in, now)
            return False
        looked_before, record.looked_at = record.looked_at, now
        if packets_in != record.packets_in:
            record.packets_in, record.packets_out = packets_in, packets_out
            record.restart()
            return False
        if packets_out > record.packets_out:
            record.packets_out = packets_out
            record.growths += 1
            if record.growths == 1:
                record.began_at = looked_before
        if record.growths < _GROWTHS_MIN or now - record.began_at < silence_s:
            return False
        record.restart()
        return True

    def answers(self, flow_id: FlowID) -> int:
        """How many packets the flow has received on its present path since that was first looked at."""
        record = self._records.get(flow_id)
        return 0 if record is None else record.packets_in - record.first_packets_in

    def restart(self, flow_id: FlowID) -> None:
        """The flow has another path."""
        self._records.pop(flow_id, None)

    def keep_only(self, flow_ids: Collection[FlowID]) -> None:
        """Forget all other flows."""
        for gone in [each for each in self._records if each not in flow_ids]:
            del self._records[gone]
