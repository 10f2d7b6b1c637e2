"""How does the prototype's TCP behave? Old Linux Reno: no SACK, no timestamps (OBSERVED 1 and 3, SPEC 4).

No socket and no clock in here: segments and times come in as arguments, segments to be sent are taken with
`take_output`. Positions in our stream are counted from our initial sequence number, which is 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from scapy.packet import Packet

from serval_core.wire.scapy_layers import ServalTCP

from .prototype_receiver import NEVER, SEQUENCE_NUMBERS, Receiver, signed_difference

SEGMENT_BYTES = 1408
SMALLEST_SEGMENT_BYTES = 48
ADVERTISED_MSS = 1448
WINDOW_SCALE = 1
MAX_WINDOW_SCALE = 14

INITIAL_TIMEOUT_S = 3.0
MIN_TIMEOUT_S = 0.2
MAX_TIMEOUT_S = 120.0
MAX_RETRANSMISSIONS = 15
DUPLICATES_FOR_RETRANSMISSION = 3
FIRST_CONGESTION_WINDOW = 3.0
SMALLEST_THRESHOLD = 2.0

FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10


def segment_bytes_for(mss_bytes: int | None) -> int:
    """How much the prototype sends per segment to a peer that offered this MSS.

    It reads the option with its bytes swapped: 1448 and 1460 come out huge, 1280 as 5.
    """
    if mss_bytes is None:
        return SEGMENT_BYTES
    swapped = (mss_bytes & 0xFF) << 8 | mss_bytes >> 8
    return max(SMALLEST_SEGMENT_BYTES, min(SEGMENT_BYTES, swapped))


def handshake_options() -> list[tuple[str, int | None]]:
    """The options of SYN and SYN-ACK, all that the prototype ever sends."""
    return [("MSS", ADVERTISED_MSS), ("NOP", None), ("WScale", WINDOW_SCALE)]


class PrototypeTcp:
    """One connection after its handshake. `peer_syn` is the peer's SYN or SYN-ACK segment.

    `deliver` gets the peer's bytes, in order and once. Congestion window and threshold are in segments.
    """

    def __init__(
        self,
        initial_sequence: int,
        peer_syn: Packet,
        deliver: Callable[[bytes], None],
        initial_timeout_s: float = INITIAL_TIMEOUT_S,
    ) -> None:
        options = dict(peer_syn.options)
        peer_scale = options.get("WScale")
        # Without the peer's option neither side scales.
        self.receiver = Receiver(peer_syn.seq, WINDOW_SCALE if peer_scale is not None else 0, deliver)
        self.counters: Counter[str] = Counter()
        self.gave_up = False
        self._initial_sequence = initial_sequence
        self._segment_bytes = segment_bytes_for(options.get("MSS"))
        self._peer_scale = min(peer_scale or 0, MAX_WINDOW_SCALE)
        self._peer_window_bytes = 0
        self._output: list[Packet] = []

        # Position 0 is our SYN, 1 the first byte of `_data`.
        self._data = bytearray()
        self._finishing = False
        self._acknowledged = 1
        self._next = 1
        self._furthest = 1
        self._last_small_end = 0

        self._congestion_window = FIRST_CONGESTION_WINDOW
        self._threshold = NEVER
        self._duplicates = 0
        self._recover = 0

        self._timeout_s = initial_timeout_s
        self._smoothed_s: float | None = None
        self._variation_s = 0.0
        self._timed: tuple[int, float] | None = None
        self._retransmissions = 0
        self._retransmit_at = NEVER

    @property
    def fin_acknowledged(self) -> bool:
        """Whether our FIN, and with it everything before, has reached the peer."""
        return self._finishing and self._acknowledged > self._end

    @property
    def everything_acknowledged(self) -> bool:
        """Whether every byte written so far has reached the peer."""
        return self._acknowledged >= self._end

    @property
    def acknowledged_bytes(self) -> int:
        """How many bytes have reached the peer."""
        return min(self._acknowledged - 1, len(self._data))

    @property
    def written_bytes(self) -> int:
        """How many bytes were written so far."""
        return len(self._data)

    @property
    def _end(self) -> int:
        return 1 + len(self._data)

    def set_unscaled_window(self, window: int) -> None:
        """The window field of a SYN-ACK is in bytes."""
        self._peer_window_bytes = window

    def write(self, data: bytes, now: float) -> None:
        """Queue bytes and send what the windows allow."""
        self._data += data
        self._send_what_fits(now)

    def finish(self, now: float) -> None:
        """Send a FIN after the last byte."""
        self._finishing = True
        self._send_what_fits(now)

    def received(self, tcp: Packet, now: float) -> None:
        """Process a segment of the peer."""
        if int(tcp.flags) & ACK:
            self._process_acknowledgement(tcp, now)
        if self.receiver.received(tcp, now):
            self._emit(self._furthest, ACK, b"")
        self._send_what_fits(now)

    def acknowledge(self) -> None:
        """Send an acknowledgement now."""
        self._emit(self._furthest, ACK, b"")

    def next_timeout(self) -> float:
        """When `handle_timeout` will have something to do."""
        return min(self._retransmit_at, self.receiver.acknowledge_at)

    def handle_timeout(self, now: float) -> None:
        """Send what is overdue."""
        if now >= self.receiver.acknowledge_at:
            self.acknowledge()
        if now < self._retransmit_at:
            return
        if self._acknowledged < self._furthest:
            self._retransmission_timeout(now)
        else:
            self._probe_window(now)

    def take_output(self) -> list[Packet]:
        """The segments to be sent, in order; they are forgotten here."""
        output, self._output = self._output, []
        return output

    def _process_acknowledgement(self, tcp: Packet, now: float) -> None:
        expected = self._initial_sequence + self._acknowledged
        acknowledged = self._acknowledged + signed_difference(tcp.ack, expected)
        if not self._acknowledged <= acknowledged <= self._furthest:
            return
        window_bytes = tcp.window << self._peer_scale
        is_duplicate = (
            acknowledged == self._acknowledged < self._furthest
            and window_bytes == self._peer_window_bytes
            and not len(tcp.payload)
            and not int(tcp.flags) & FIN
        )
        self._peer_window_bytes = window_bytes
        if acknowledged > self._acknowledged:
            self._new_acknowledgement(acknowledged, now)
        elif is_duplicate:
            self._duplicate_acknowledgement(now)

    def _new_acknowledgement(self, acknowledged: int, now: float) -> None:
        if self._timed is not None and acknowledged >= self._timed[0]:
            self._measure_round_trip(now - self._timed[1])
            self._timed = None
        is_partial = self._acknowledged < self._recover and acknowledged < self._recover
        self._acknowledged = acknowledged
        self._next = max(self._next, acknowledged)
        self._duplicates = 0
        self._retransmissions = 0
        self._retransmit_at = now + self._timeout_s if acknowledged < self._furthest else NEVER
        if is_partial:
            self._resend_first(now)
        elif self._congestion_window < self._threshold:
            self._congestion_window += 1
        else:
            self._congestion_window += 1 / self._congestion_window

    def _duplicate_acknowledgement(self, now: float) -> None:
        self._duplicates += 1
        if self._duplicates == DUPLICATES_FOR_RETRANSMISSION and self._acknowledged >= self._recover:
            self.counters["fast_retransmissions"] += 1
            self._recover = self._furthest
            self._lower_threshold()
            self._congestion_window = self._threshold
            self._resend_first(now)
        elif self._duplicates > DUPLICATES_FOR_RETRANSMISSION:
            self._congestion_window += 1

    def _retransmission_timeout(self, now: float) -> None:
        if self._retransmissions == MAX_RETRANSMISSIONS:
            self.gave_up = True
            self._retransmit_at = NEVER
            return
        self._retransmissions += 1
        self.counters["timeouts"] += 1
        self._lower_threshold()
        self._congestion_window = 1.0
        self._duplicates = 0
        self._recover = 0
        self._timed = None
        self._last_small_end = 0
        self._timeout_s = min(2 * self._timeout_s, MAX_TIMEOUT_S)
        self._retransmit_at = now + self._timeout_s
        # Go back: everything from the first missing byte on is sent again as the window opens.
        self._next = self._acknowledged
        self._resend_first(now)

    def _probe_window(self, now: float) -> None:
        """The peer's window is closed: an old empty segment makes it answer with the present one."""
        self.counters["window_probes"] += 1
        self._emit(self._acknowledged - 1, ACK, b"")
        self._timeout_s = min(2 * self._timeout_s, MAX_TIMEOUT_S)
        self._retransmit_at = now + self._timeout_s

    def _lower_threshold(self) -> None:
        in_flight = (self._furthest - self._acknowledged) / self._segment_bytes
        self._threshold = max(in_flight / 2, SMALLEST_THRESHOLD)

    def _measure_round_trip(self, sample_s: float) -> None:
        if self._smoothed_s is None:
            self._smoothed_s = sample_s
            self._variation_s = sample_s / 2
        else:
            self._variation_s += (abs(sample_s - self._smoothed_s) - self._variation_s) / 4
            self._smoothed_s += (sample_s - self._smoothed_s) / 8
        self._timeout_s = min(self._smoothed_s + max(4 * self._variation_s, MIN_TIMEOUT_S), MAX_TIMEOUT_S)

    def _send_what_fits(self, now: float) -> None:
        stream_end = self._end + (1 if self._finishing else 0)
        while self._next < stream_end:
            congestion_bytes = int(self._congestion_window * self._segment_bytes)
            room = self._acknowledged + min(congestion_bytes, self._peer_window_bytes) - self._next
            size = min(self._segment_bytes, self._end - self._next)
            if size > room:
                # A piece smaller than it could be goes out only when nothing else is under way.
                if room <= 0 or self._next > self._acknowledged:
                    break
                size = room
            if self._must_wait_for_more(size):
                break
            self._send_at(self._next, size, now)
        if self._next < stream_end and self._retransmit_at == NEVER:
            self._retransmit_at = now + self._timeout_s

    def _must_wait_for_more(self, size: int) -> bool:
        """Nagle's rule in Minshall's form: one small segment under way at a time, unless the stream ends."""
        if size == self._segment_bytes or self._finishing:
            return False
        return self._last_small_end > self._acknowledged

    def _resend_first(self, now: float) -> None:
        self._timed = None
        # What was never sent might not fit the peer's window, and the peer ignores all that lies behind.
        sent_bytes = min(self._furthest, self._end) - self._acknowledged
        self._send_at(self._acknowledged, min(self._segment_bytes, sent_bytes), now)

    def _send_at(self, position: int, size: int, now: float) -> None:
        payload = bytes(self._data[position - 1 : position - 1 + size])
        end = position + len(payload)
        flags = ACK
        if end == self._end:
            flags |= PSH if payload else 0
            if self._finishing:
                flags |= FIN
                end += 1
        if position < self._furthest:
            self.counters["segments_sent_again"] += 1
        elif self._timed is None:
            self._timed = (end, now)
        if 0 < len(payload) < self._segment_bytes:
            self._last_small_end = end
        if position == self._acknowledged:
            self._retransmit_at = now + self._timeout_s
        self._emit(position, flags, payload)
        self._next = max(self._next, end)
        self._furthest = max(self._furthest, end)

    def _emit(self, position: int, flags: int, payload: bytes) -> None:
        layer = ServalTCP(
            seq=(self._initial_sequence + position) % SEQUENCE_NUMBERS,
            ack=self.receiver.acknowledgement,
            flags=flags,
            window=self.receiver.window,
        )
        self._output.append(layer / payload if payload else layer)
        self.receiver.acknowledged()
