"""What does the prototype's TCP do with the segments that arrive? In order, with reassembly, and no SACK.

No clock: times come in as arguments. Positions in the peer's stream are counted from its initial sequence
number, which is 0, so that they never wrap.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from scapy.packet import Packet

SEQUENCE_NUMBERS = 1 << 32
FIRST_WINDOW_BYTES = 5792
LARGEST_WINDOW_BYTES = 64088
WINDOW_GROWTH_BYTES = 2 * 1448
DELAYED_ACK_S = 0.04
SEGMENTS_PER_ACK = 2
QUICK_ACKS = 2
NEVER = float("inf")

FIN = 0x01


def signed_difference(a: int, b: int) -> int:
    """How far sequence number `a` lies behind `b`; negative when it lies before."""
    half = SEQUENCE_NUMBERS // 2
    return (a - b + half) % SEQUENCE_NUMBERS - half


class Receiver:
    """The receiving half of a connection. `deliver` gets the peer's bytes, in order and once."""

    def __init__(self, initial_sequence: int, window_scale: int, deliver: Callable[[bytes], None]) -> None:
        self.counters: Counter[str] = Counter()
        self.unread_bytes = 0
        self.reading = True
        self.acknowledge_at = NEVER
        self._initial_sequence = initial_sequence
        self._window_scale = window_scale
        self._deliver = deliver
        self._next = 1
        self._early: dict[int, bytes] = {}
        self._fin_at: int | None = None
        self._window_bytes = FIRST_WINDOW_BYTES
        self._segments_to_acknowledge = 0
        self._quick_acks = QUICK_ACKS

    @property
    def acknowledgement(self) -> int:
        """The acknowledgement number for what is here."""
        return (self._initial_sequence + self._next) % SEQUENCE_NUMBERS

    @property
    def window(self) -> int:
        """The window field of our next segment."""
        return min(0xFFFF, self._free_bytes >> self._window_scale)

    @property
    def fin_received(self) -> bool:
        """Whether the peer's FIN, and with it everything before, is here."""
        return self._fin_at is not None and self._next > self._fin_at

    @property
    def _free_bytes(self) -> int:
        return max(0, self._window_bytes - self.unread_bytes)

    def brings_news(self, tcp: Packet) -> bool:
        """Whether a segment has bytes that are not here yet."""
        return len(tcp.payload) > 0 and self._offset(tcp) + len(tcp.payload) > self._next

    def acknowledged(self) -> None:
        """An acknowledgement leaves, alone or with data."""
        self._segments_to_acknowledge = 0
        self.acknowledge_at = NEVER

    def received(self, tcp: Packet, now: float) -> bool:
        """Process a segment; true when it is to be acknowledged at once."""
        offset = self._offset(tcp)
        payload = bytes(tcp.payload)
        fin = bool(int(tcp.flags) & FIN)
        if not payload and not fin:
            # Old and empty is a window probe: it wants to hear our window.
            return offset < self._next
        payload, fin = self._cut_to_window(offset, payload, fin)
        if fin:
            self._fin_at = offset + len(payload)
        before = self._next
        had_gap = bool(self._early)
        self._take_in(offset, payload)
        if self._fin_at == self._next:
            self._next += 1
        if self._next == before or had_gap or self.fin_received:
            return True
        self._window_bytes = min(LARGEST_WINDOW_BYTES, self._window_bytes + WINDOW_GROWTH_BYTES)
        if self._quick_acks:
            self._quick_acks -= 1
            return True
        self._segments_to_acknowledge += 1
        self.acknowledge_at = min(self.acknowledge_at, now + DELAYED_ACK_S)
        return self._segments_to_acknowledge >= SEGMENTS_PER_ACK

    def _offset(self, tcp: Packet) -> int:
        return self._next + signed_difference(tcp.seq, self.acknowledgement)

    def _cut_to_window(self, offset: int, payload: bytes, fin: bool) -> tuple[bytes, bool]:
        limit = self._next + self._free_bytes
        if offset + len(payload) <= limit:
            return payload, fin
        allowed = max(0, limit - offset)
        self.counters["bytes_beyond_window"] += len(payload) - allowed
        return payload[:allowed], False

    def _take_in(self, offset: int, payload: bytes) -> None:
        if offset > self._next:
            if payload:
                self.counters["segments_out_of_order"] += 1
                self._early.setdefault(offset, payload)
            return
        self._accept(payload[self._next - offset :])
        while ready := [start for start in self._early if start <= self._next]:
            for start in sorted(ready):
                self._accept(self._early.pop(start)[self._next - start :])

    def _accept(self, payload: bytes) -> None:
        if not payload:
            return
        self._next += len(payload)
        if self.reading:
            self._deliver(payload)
        else:
            self.unread_bytes += len(payload)
