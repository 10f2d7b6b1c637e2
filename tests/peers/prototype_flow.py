"""What does the prototype do with one flow, from SYN to CLOSED? As in OBSERVED 1 and SPEC 3, faults included.

Independent of our stack: states and rules are written down here a second time, in the prototype's own terms.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Literal, NamedTuple

from scapy.packet import Packet

from serval_core.wire.scapy_layers import IP, SAL, SALControl, SALService, SALSource, ServalTCP

from .application import Behaviour, FlowResult
from .prototype_receiver import FIRST_WINDOW_BYTES, NEVER, SEQUENCE_NUMBERS, signed_difference
from .prototype_tcp import ACK as TCP_ACK
from .prototype_tcp import RST as TCP_RST
from .prototype_tcp import SYN as TCP_SYN
from .prototype_tcp import PrototypeTcp, handshake_options
from .raw_wire import Wire

SYN, RSYN, ACK, RST, FIN = 0x80, 0x40, 0x20, 0x08, 0x04

MIN_TIMEOUT_S = 0.2
MAX_TIMEOUT_S = 120.0
MAX_RETRANSMISSIONS = 15
WAIT_S = 60.0

State = Literal[
    "REQUEST",
    "CONNECTED",
    "FINWAIT1",
    "FINWAIT2",
    "CLOSING",
    "CLOSEWAIT",
    "LASTACK",
    "TIMEWAIT",
    "CLOSED",
]
TRANSPORT_STATES = frozenset({"CONNECTED", "FINWAIT1", "FINWAIT2", "CLOSING", "CLOSEWAIT", "LASTACK"})


class Identity(NamedTuple):
    """The numbers that one side chooses for a flow."""

    flow_id: int
    nonce: bytes
    verno: int
    tcp_sequence: int


def syn_ack(identity: Identity, syn: Packet, own_address: str) -> Packet:
    """What a listener answers to `syn`: no SERVICE, and the list of forwarders only if there was one."""
    control = syn[SAL].extension(SALControl)
    extensions: list[Packet] = [
        SALControl(flags=SYN | ACK, verno=identity.verno, ackno=_next(control.verno), nonce=identity.nonce)
    ]
    source = syn[SAL].extension(SALSource)
    if source is not None:
        extensions.append(SALSource(addresses=[*source.addresses, own_address]))
    offers_scale = "WScale" in dict(syn[ServalTCP].options)
    header = SAL(src_flowid=identity.flow_id, dst_flowid=syn[SAL].src_flowid, extensions=extensions)
    return header / ServalTCP(
        seq=identity.tcp_sequence,
        ack=_next(syn[ServalTCP].seq),
        flags=TCP_SYN | TCP_ACK,
        window=FIRST_WINDOW_BYTES,
        options=handshake_options() if offers_scale else handshake_options()[:1],
    )


class Flow:
    """One flow. `connect` opens it actively, `accept` continues after a listener's handshake.

    `initial_timeout_s` is the retransmission timeout of control packets and TCP before a round trip was
    measured; the prototype's is 3 s.
    """

    def __init__(
        self,
        wire: Wire,
        behaviour: Behaviour,
        identity: Identity,
        service_id: bytes,
        initial_timeout_s: float,
    ) -> None:
        self.state: State = "REQUEST"
        self.ended_at = NEVER
        self.tcp: PrototypeTcp | None = None
        self._wire = wire
        self._behaviour = behaviour
        self._identity = identity
        self._service_id = service_id
        self._initial_timeout_s = initial_timeout_s
        self._counters: Counter[str] = Counter()
        self._error = ""

        self._local_address = ""
        self._peer_address = ""
        self._peer_flow_id = 0
        self._peer_nonce = b""
        self._send_unacknowledged = identity.verno
        self._send_next = _next(identity.verno)
        self._receive_next = 0

        self._outstanding: Packet | None = None
        self._outstanding_verno = 0
        self._sent_at = 0.0
        self._timeout_s = initial_timeout_s
        self._retransmissions = 0
        self._retransmit_at = NEVER
        self._wait_until = NEVER

        self._started_at = 0.0
        self._connected_at = 0.0
        self._received = hashlib.sha256()
        self._received_bytes = 0
        self._to_echo = bytearray()
        self._end_of_stream = False
        self._closed_by_application = False
        self._fin_sent = False

    def connect(self, local_address: str, destination: str, now: float) -> None:
        """Send the SYN: window 0, and of TCP's options the only two that there are."""
        self._local_address = local_address
        self._peer_address = destination
        self._started_at = now
        syn = ServalTCP(
            seq=self._identity.tcp_sequence, flags=TCP_SYN, window=0, options=handshake_options()
        )
        control = self._control(SYN, self._identity.verno, SALService(service_id=self._service_id))
        self._send_reliably(control / syn, self._identity.verno, now)

    def accept(self, local_address: str, syn: Packet, ack: Packet, now: float) -> None:
        """`ack` has completed the handshake that `syn` began; data in it is discarded."""
        self._local_address = local_address
        self._peer_address = ack[IP].src
        self._peer_flow_id = syn[SAL].src_flowid
        self._peer_nonce = syn[SAL].extension(SALControl).nonce
        self._receive_next = _next(syn[SAL].extension(SALControl).verno)
        self._send_unacknowledged = self._send_next
        self._started_at = now
        self.tcp = self._transport(syn[ServalTCP])
        if ServalTCP in ack:
            segment = ack[ServalTCP].copy()
            segment.remove_payload()
            self.tcp.received(segment, now)
        self._become_connected(now)

    def packet_received(self, packet: Packet, now: float) -> None:
        """Process a packet whose destination flow ID is ours."""
        control = packet[SAL].extension(SALControl)
        if self.state == "REQUEST":
            if control is not None:
                self._answer_to_syn(packet, control, now)
            return
        if control is not None and not self._control_received(control, now):
            return
        if self.state in TRANSPORT_STATES and ServalTCP in packet:
            self._segment_received(packet[ServalTCP], now)

    def next_timeout(self) -> float:
        """When `handle_timeout` will have something to do."""
        transport = NEVER
        if self.tcp is not None and self.state in TRANSPORT_STATES:
            transport = self.tcp.next_timeout()
        return min(transport, self._retransmit_at, self._wait_until)

    def handle_timeout(self, now: float) -> None:
        """Do what is overdue."""
        if now >= self._wait_until:
            self._end("", now)
        if now >= self._retransmit_at:
            self._resend(now)
        if self.tcp is not None and self.state in TRANSPORT_STATES and now >= self.tcp.next_timeout():
            self.tcp.handle_timeout(now)
            self._after_transport(now)

    def result(self) -> FlowResult:
        """What became of the flow so far."""
        counters = Counter(self._counters)
        if self.tcp is not None:
            counters += self.tcp.counters + self.tcp.receiver.counters
        return FlowResult(
            flow_id=self._identity.flow_id,
            peer_flow_id=self._peer_flow_id,
            peer_address=self._peer_address,
            state=self.state,
            error=self._error,
            sent_bytes=0 if self.tcp is None else self.tcp.written_bytes,
            received_bytes=self._received_bytes,
            received_sha256=self._received.hexdigest(),
            end_of_stream=self._end_of_stream,
            connect_s=self._connected_at - self._started_at if self.tcp is not None else 0.0,
            counters=dict(counters),
        )

    # The handshake, as client.

    def _answer_to_syn(self, packet: Packet, control: Packet, now: float) -> None:
        flags = int(control.flags)
        if flags & RST:
            self._end("ECONNREFUSED", now)
            return
        if flags & (SYN | ACK) != SYN | ACK or not self._acknowledgement_received(control, now):
            return
        # A SYN-ACK that TCP does not like is dropped, but the SYN is not repeated any more.
        if ServalTCP not in packet or packet[ServalTCP].ack != _next(self._identity.tcp_sequence):
            self._counters["unfit_syn_acks"] += 1
            return
        source = packet[SAL].extension(SALSource)
        self._peer_address = packet[IP].src if source is None else source.addresses[-1]
        self._local_address = packet[IP].dst
        self._peer_flow_id = packet[SAL].src_flowid
        self._peer_nonce = control.nonce
        self._receive_next = _next(control.verno)
        self.tcp = self._transport(packet[ServalTCP])
        self.tcp.set_unscaled_window(packet[ServalTCP].window)
        # Sent once: nothing ever repeats it.
        self.tcp.acknowledge()
        (acknowledgement,) = self.tcp.take_output()
        service = SALService(service_id=self._service_id)
        self._send(self._control(ACK, self._send_next, service) / acknowledgement)
        self._become_connected(now)

    def _transport(self, peer_syn: Packet) -> PrototypeTcp:
        return PrototypeTcp(self._identity.tcp_sequence, peer_syn, self._deliver, self._initial_timeout_s)

    def _become_connected(self, now: float) -> None:
        assert self.tcp is not None
        self.state = "CONNECTED"
        self._connected_at = now
        self.tcp.receiver.reading = self._behaviour.stop_reading_at != 0
        if self._behaviour.send:
            self.tcp.write(self._behaviour.send, now)
        self._after_transport(now)

    # Control packets.

    def _control_received(self, control: Packet, now: float) -> bool:
        """Process a CONTROL extension; false when the packet goes no further."""
        flags = int(control.flags)
        if signed_difference(control.verno, self._receive_next) < 0 and flags not in (ACK, RSYN | ACK):
            self._counters["stale_control_packets"] += 1
            self._send(self._control(ACK, self._send_next))
            return False
        if flags & RST:
            self._end("EPIPE" if self.state == "CLOSEWAIT" else "ECONNRESET", now)
            return False
        if self.state == "TIMEWAIT":
            if flags & FIN:
                self._send(self._control(ACK, self._send_next))
            return False
        is_acknowledged = bool(flags & ACK) and self._acknowledgement_received(control, now)
        if flags & FIN:
            self._fin_received(control, is_acknowledged, now)
        elif is_acknowledged:
            # Any acknowledgement will do, even one of nothing in particular.
            if self.state == "FINWAIT1":
                self.state = "FINWAIT2"
                self._wait_until = now + WAIT_S
            elif self.state == "CLOSING":
                self._wait_for_late_packets(now)
            elif self.state == "LASTACK":
                self._end("", now)
        return True

    def _fin_received(self, control: Packet, is_acknowledged: bool, now: float) -> None:
        if self.state in ("CLOSING", "CLOSEWAIT", "LASTACK"):
            self._send(self._control(ACK, self._send_next))
            return
        if control.nonce != self._peer_nonce:
            self._counters["wrong_nonces"] += 1
            return
        self._receive_next = _next(control.verno)
        self._end_of_stream = True
        self._send(self._control(ACK, self._send_next))
        if self.state == "CONNECTED":
            self.state = "CLOSEWAIT"
            self._after_transport(now)
        elif self.state == "FINWAIT1" and not is_acknowledged:
            self.state = "CLOSING"
        else:
            self._wait_for_late_packets(now)

    def _acknowledgement_received(self, control: Packet, now: float) -> bool:
        """Whether the acknowledgement is valid. A control packet that it covers is not repeated any more."""
        if signed_difference(control.ackno, self._send_unacknowledged) < 0:
            return False
        if signed_difference(control.ackno, self._send_next) > 0:
            return False
        self._send_unacknowledged = control.ackno
        if self._outstanding is not None and signed_difference(control.ackno, self._outstanding_verno) > 0:
            self._outstanding = None
            self._retransmit_at = NEVER
            if self._retransmissions == 0:
                sample_s = now - self._sent_at
                self._timeout_s = min(sample_s + max(2 * sample_s, MIN_TIMEOUT_S), MAX_TIMEOUT_S)
        return True

    def _send_reliably(self, packet: Packet, verno: int, now: float) -> None:
        self._outstanding = packet
        self._outstanding_verno = verno
        self._retransmissions = 0
        self._sent_at = now
        self._retransmit_at = now + self._timeout_s
        self._send(packet)

    def _resend(self, now: float) -> None:
        if self._outstanding is None or self._retransmissions == MAX_RETRANSMISSIONS:
            self._end("ETIMEDOUT", now)
            return
        self._retransmissions += 1
        self._counters["control_packets_sent_again"] += 1
        self._retransmit_at = now + min(self._timeout_s * 2**self._retransmissions, MAX_TIMEOUT_S)
        self._send(self._outstanding)

    def _control(self, flags: int, verno: int, *more: Packet) -> Packet:
        control = SALControl(flags=flags, verno=verno, ackno=self._receive_next, nonce=self._identity.nonce)
        return SAL(
            src_flowid=self._identity.flow_id, dst_flowid=self._peer_flow_id, extensions=[control, *more]
        )

    def _send(self, layers: Packet) -> None:
        self._wire.send(self._local_address, self._peer_address, layers)

    # Transport and application.

    def _segment_received(self, segment: Packet, now: float) -> None:
        assert self.tcp is not None
        if int(segment.flags) & (TCP_RST | TCP_SYN):
            self._counters["tcp_resets"] += 1
            self._end("ECONNRESET", now)
            return
        if self._closed_by_application and self.tcp.receiver.brings_news(segment):
            # Data for nobody kills the flow, and nobody is told.
            self._counters["data_after_close"] += 1
            self._end("ECONNRESET", now)
            return
        self.tcp.received(segment, now)
        self._after_transport(now)

    def _deliver(self, data: bytes) -> None:
        self._received.update(data)
        self._received_bytes += len(data)
        if self._behaviour.echo:
            self._to_echo += data
        stop_at = self._behaviour.stop_reading_at
        if self.tcp is not None and stop_at is not None and self._received_bytes >= stop_at:
            self.tcp.receiver.reading = False

    def _after_transport(self, now: float) -> None:
        """Let the application act, and the SAL after it; then send what TCP has to say."""
        assert self.tcp is not None
        if not self._closed_by_application:
            self._application(now)
        for layer in self.tcp.take_output():
            self._send(SAL(src_flowid=self._identity.flow_id, dst_flowid=self._peer_flow_id) / layer)
        if self.tcp.gave_up:
            self._end("ETIMEDOUT", now)
        elif self.state in TRANSPORT_STATES and self.tcp.fin_acknowledged and not self._fin_sent:
            self._fin_sent = True
            fin = self._control(FIN, self._send_next)
            verno, self._send_next = self._send_next, _next(self._send_next)
            self._send_reliably(fin, verno, now)

    def _application(self, now: float) -> None:
        assert self.tcp is not None
        if self._to_echo:
            data, self._to_echo = bytes(self._to_echo), bytearray()
            self.tcp.write(data, now)
        if self.tcp.receiver.unread_bytes or self._wants_to_close():
            self._close(now)

    def _wants_to_close(self) -> bool:
        assert self.tcp is not None
        if self._end_of_stream or self._behaviour.close_when == "sent":
            return True
        if self._behaviour.close_when == "acknowledged":
            return self.tcp.everything_acknowledged
        if self._behaviour.close_when == "received":
            enough = self._received_bytes >= self._behaviour.expected_bytes
            return enough and self.tcp.everything_acknowledged
        return False

    def _close(self, now: float) -> None:
        """The application's close(): with bytes that it never read, a reset."""
        assert self.tcp is not None
        self._closed_by_application = True
        if self.tcp.receiver.unread_bytes:
            self._counters["resets_sent"] += 1
            self._send(self._control(RST | ACK, self._send_next))
            self.tcp.take_output()
            self._end("", now)
            return
        self.state = "LASTACK" if self.state == "CLOSEWAIT" else "FINWAIT1"
        self.tcp.finish(now)

    def _wait_for_late_packets(self, now: float) -> None:
        self.state = "TIMEWAIT"
        self.ended_at = now
        self._outstanding = None
        self._retransmit_at = NEVER
        self._wait_until = now + WAIT_S

    def _end(self, error: str, now: float) -> None:
        self.state = "CLOSED"
        self._error = error
        self.ended_at = min(self.ended_at, now)
        self._outstanding = None
        self._retransmit_at = NEVER
        self._wait_until = NEVER


def _next(number: int) -> int:
    return (number + 1) % SEQUENCE_NUMBERS
