"""What carries bytes in the memory network, where there is no kernel? A TCP of the simplest kind.

One segment is outstanding at a time and repeated until it is acknowledged; there is no congestion control
and no window. It speaks real TCP segments, so a real peer could be put in its place. Only tests use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from errno import ETIMEDOUT

from serval_core.effects import OpenTransport
from serval_core.wire import tcp_segment
from serval_core.wire.tcp_segment import ACK, FIN, NO_OPTIONS, PSH, TcpSegment

_FIRST_TIMEOUT_S = 0.25
_LONGEST_TIMEOUT_S = 2.0
_TRIES = 25
_SERIAL_MASK = 0xFFFFFFFF


class ToyTransport:
    """The transport of one flow, as `OpenTransport` describes it.

    `received` are the bytes that came, `end_of_stream` says that no more will, `on_change` is called after
    either changed. `fin_acknowledged` and `gave_up` are for the host to tell the SAL.
    """

    def __init__(
        self,
        opened: OpenTransport,
        transmit: Callable[[OpenTransport, bytes], None],
        clock: Callable[[], float],
    ) -> None:
        self.opened = opened
        self.received = b""
        self.end_of_stream = False
        self.fin_acknowledged = False
        self.reported = False
        self.gave_up = False
        self.errno = 0
        self.deadline: float | None = None
        self.on_change: Callable[[ToyTransport], None] = lambda transport: None
        self._transmit = transmit
        self._clock = clock
        self._send_next = opened.parameters.send_next
        self._receive_next = opened.parameters.receive_next
        self._to_send = b""
        self._finishing = False
        self._outstanding: TcpSegment | None = None
        self._tries = 0

    def write(self, data: bytes) -> None:
        """Queue bytes for the peer."""
        assert not self._finishing
        self._to_send += data
        self._push()

    def finish(self) -> None:
        """No more bytes follow (SHUT_WR)."""
        self._finishing = True
        self._push()

    def end_stream(self) -> None:
        """The SAL says that the peer has closed."""
        if not self.end_of_stream:
            self.end_of_stream = True
            self.on_change(self)

    def move(self, local_address: int, peer_address: int, interface_index: int) -> None:
        """The flow is elsewhere. What is outstanding may have gone to nowhere, so it is repeated at once."""
        self.opened = replace(
            self.opened,
            local_address=local_address,
            peer_address=peer_address,
            interface_index=interface_index,
        )
        if self._outstanding is not None:
            self._tries = 0
            self._send_outstanding()

    def handle_timeout(self) -> None:
        """Repeat what is outstanding if that is due."""
        if self.deadline is None or self.deadline > self._clock() or self._outstanding is None:
            return
        if self._tries >= _TRIES:
            self.deadline = None
            self.gave_up, self.errno = True, ETIMEDOUT
        else:
            self._send_outstanding()

    def segment_received(self, data: bytes, source: int, destination: int) -> None:
        """Process a segment that arrived."""
        segment = tcp_segment.parse(data, source, destination)
        self._acknowledged(segment.acknowledgement)
        fin = segment.flags & FIN
        if not (segment.payload or fin):
            return
        if segment.sequence == self._receive_next and not self.end_of_stream:
            self.received += segment.payload
            self._receive_next = self._receive_next + len(segment.payload) + (fin != 0) & _SERIAL_MASK
            self.end_of_stream = fin != 0
            self.on_change(self)
        self._send(TcpSegment(0, 0, self._send_next, self._receive_next, ACK, 1000, 0, NO_OPTIONS, b""))

    def _acknowledged(self, acknowledgement: int) -> None:
        segment = self._outstanding
        if segment is None:
            return
        fin = segment.flags & FIN
        end = segment.sequence + len(segment.payload) + (fin != 0) & _SERIAL_MASK
        if acknowledgement == end:
            self._outstanding = self.deadline = None
            self._send_next = end
            self.fin_acknowledged = fin != 0
            self._push()

    def _push(self) -> None:
        if self._outstanding is not None or self.fin_acknowledged:
            return
        size = self.opened.parameters.mss_bytes
        payload, self._to_send = self._to_send[:size], self._to_send[size:]
        last = self._finishing and not self._to_send
        if payload or last:
            flags = ACK | (PSH if payload else 0) | (FIN if last else 0)
            self._tries = 0
            self._outstanding = TcpSegment(
                0, 0, self._send_next, self._receive_next, flags, 1000, 0, NO_OPTIONS, payload
            )
            self._send_outstanding()

    def _send_outstanding(self) -> None:
        assert self._outstanding is not None
        self.deadline = self._clock() + min(_FIRST_TIMEOUT_S * (1 << self._tries), _LONGEST_TIMEOUT_S)
        self._tries += 1
        self._send(self._outstanding._replace(acknowledgement=self._receive_next))

    def _send(self, segment: TcpSegment) -> None:
        opened = self.opened
        self._transmit(opened, tcp_segment.emit(segment, opened.local_address, opened.peer_address))
