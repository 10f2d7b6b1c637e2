"""How good is the way to a host through each interface? What answers took, and how many did not come.

Learned from SYNs, from RSYNs, and from what the kernel's TCP measures on live flows. Knows no policy: who chooses
by it is `path_choice`. Times are in seconds of the caller's clock, losses are shares from 0 to 1.
"""

from __future__ import annotations

RECORDS_LIMIT = 4096
STALE_S = 60.0
"""After this time a measurement says nothing any more, and the path is to be measured again."""
_GAIN = 1 / 8
_LOSS_GAIN = 1 / 4  # per SYN; of what TCP reports, many packets count at once

Key = tuple[int, int]  # interface index, IPv4 address of the other host


class _Record:
    __slots__ = ("loss", "measured_at", "round_trip_s")

    def __init__(self) -> None:
        self.round_trip_s: float | None = None
        self.loss = 0.0
        self.measured_at = 0.0


class PathQuality:
    """What one stack has measured: of RECORDS_LIMIT paths at most, the oldest go first."""

    __slots__ = ("_records",)

    def __init__(self) -> None:
        self._records: dict[Key, _Record] = {}

    def __len__(self) -> int:
        return len(self._records)

    def answered(self, path: Key, round_trip_s: float | None, now: float) -> None:
        """A packet was answered; None if nobody knows which copy of it."""
        record = self._record(path, now)
        record.loss -= record.loss * _LOSS_GAIN
        if round_trip_s is not None:
            self._smooth(record, round_trip_s)

    def silent(self, path: Key, now: float) -> None:
        """A packet was not answered in time."""
        record = self._record(path, now)
        record.loss += (1 - record.loss) * _LOSS_GAIN

    def measured(self, path: Key, round_trip_s: float, sent: int, lost: int, now: float) -> None:
        """What TCP says of a flow on this path: its smoothed round-trip time, and the packets of a while."""
        record = self._record(path, now)
        self._smooth(record, round_trip_s)
        if sent > 0:
            weight = min(1.0, sent / 256)
            record.loss += (min(lost / sent, 1.0) - record.loss) * weight

    def round_trip_s(self, path: Key, now: float) -> float | None:
        """The round-trip time of a path, None if that is not known (any more)."""
        record = self._fresh(path, now)
        return None if record is None else record.round_trip_s

    def loss(self, path: Key, now: float) -> float | None:
        """The share of packets that a path loses, None if that is not known (any more)."""
        record = self._fresh(path, now)
        return None if record is None else record.loss

    def _fresh(self, path: Key, now: float) -> _Record | None:
        record = self._records.get(path)
        return record if record is not None and now - record.measured_at < STALE_S else None

    def _record(self, path: Key, now: float) -> _Record:
        record = self._fresh(path, now)
        if record is None:
            self._records.pop(path, None)
            if len(self._records) >= RECORDS_LIMIT:
                del self._records[next(iter(self._records))]
            record = self._records[path] = _Record()
        record.measured_at = now
        return record

    @staticmethod
    def _smooth(record: _Record, round_trip_s: float) -> None:
        known = record.round_trip_s
        record.round_trip_s = round_trip_s if known is None else known + (round_trip_s - known) * _GAIN
