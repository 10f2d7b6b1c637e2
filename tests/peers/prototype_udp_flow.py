"""How does a prototype's connected datagram socket behave, as client and as server? See `prototype_udp`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

from scapy.packet import Packet

from serval_core.wire.scapy_layers import IP, SAL, SALControl, SALService, ServalUDP

from .prototype_flow import ACK, FIN, RST, SYN
from .prototype_receiver import SEQUENCE_NUMBERS, signed_difference
from .prototype_udp import UDP_PROTOCOL, UdpSocket, payload_of, service_number, udp
from .raw_wire import source_address

INITIAL_TIMEOUT_S = 3.0
LINGER_S = 0.3
QUIT = b"quit"

State = Literal["LISTEN", "REQUEST", "CONNECTED", "FINWAIT1", "FINWAIT2", "CLOSING", "LASTACK", "TIMEWAIT", "CLOSED"]
"""The program closes at the end of the stream at once, so nothing stays in CLOSEWAIT."""


class ConnectedSocket(UdpSocket):
    """What client and server do once they know each other."""

    def __init__(self, service_id: int, **how: float) -> None:
        super().__init__(**how)  # type: ignore[arg-type]
        self._service_id = service_number(service_id)
        self._flow_id = 0
        self._nonce = self._numbers.randbytes(8)
        self._send_next = self._numbers.getrandbits(32)
        self._send_unacknowledged = self._send_next
        self._receive_next = 0
        self._peer_flow_id = 0
        self._peer_nonce = b""
        self._local_address = ""
        self._peer_address = ""
        self._outstanding: Packet | None = None
        self._repeat_after_s = INITIAL_TIMEOUT_S
        self._become("LISTEN")

    def _become(self, state: State) -> None:
        self.state = state
        self.result.state = state

    def _control(self, flags: int, verno: int, *more: Packet) -> Packet:
        control = SALControl(
            flags=flags, verno=verno % SEQUENCE_NUMBERS, ackno=self._receive_next, nonce=self._nonce
        )
        return SAL(
            src_flowid=self._flow_id,
            dst_flowid=self._peer_flow_id,
            protocol=UDP_PROTOCOL,
            extensions=[control, *more],
        )

    def _transmit(self, layers: Packet) -> None:
        self._wire.send(self._local_address, self._peer_address, layers)

    def _send_reliably(self, layers: Packet, now: float) -> None:
        self._outstanding = layers
        self._resend_at = now + self._repeat_after_s
        self._send_next = (self._send_next + 1) % SEQUENCE_NUMBERS
        self._transmit(layers)

    def _timeout(self, now: float) -> None:
        assert self._outstanding is not None
        self.result.counters["control_packets_sent_again"] += 1
        self._repeat_after_s *= 2
        self._resend_at = now + self._repeat_after_s
        self._transmit(self._outstanding)

    def _acknowledged(self) -> None:
        self._outstanding = None
        self._resend_at = float("inf")

    def _say(self, payload: bytes) -> None:
        header = SAL(src_flowid=self._flow_id, dst_flowid=self._peer_flow_id, protocol=UDP_PROTOCOL)
        self._transmit(header / udp(payload))

    def _close(self, next_state: State, now: float) -> None:
        """The FIN goes at once: there is no TCP FIN to wait for."""
        self._become(next_state)
        self._repeat_after_s = 0.2
        self._send_reliably(self._control(FIN, self._send_next), now)

    @abstractmethod
    def _heard(self, payload: bytes, now: float) -> None:
        """The program gets a datagram."""

    def _flow_packet(self, packet: Packet, now: float) -> None:
        """A packet for a flow that is open."""
        control = packet[SAL].extension(SALControl)
        if control is None:
            if ServalUDP in packet:
                self._heard(payload_of(packet), now)
            return
        flags = int(control.flags)
        if signed_difference(control.verno, self._receive_next) < 0 and flags != ACK:
            self.result.counters["stale_control_packets"] += 1
            self._transmit(self._control(ACK, self._send_next))
            return
        if flags & RST:  # whatever its nonce
            self._become("CLOSED")
            self._end("ECONNRESET")
            return
        is_acknowledged = bool(flags & ACK) and (
            signed_difference(control.ackno, self._send_unacknowledged) >= 0
            and signed_difference(control.ackno, self._send_next) <= 0
        )
        if is_acknowledged:
            self._send_unacknowledged = control.ackno
            if self._outstanding is not None and control.ackno == self._send_next:
                self._acknowledged()
        if flags & FIN:
            self._fin(control, is_acknowledged, now)
        elif is_acknowledged and self.state == "FINWAIT1":
            self._become("FINWAIT2")
        elif is_acknowledged and self.state == "CLOSING":
            self._wait_for_late_packets()
        elif is_acknowledged and self.state == "LASTACK":
            self._become("CLOSED")
            self._end("")

    def _fin(self, control: Packet, is_acknowledged: bool, now: float) -> None:
        if control.nonce != self._peer_nonce:
            self.result.counters["wrong_nonces"] += 1
            return
        self._receive_next = (control.verno + 1) % SEQUENCE_NUMBERS
        self.result.end_of_stream = True
        self._transmit(self._control(ACK, self._send_next))
        if self.state == "CONNECTED":
            self._close("LASTACK", now)
        elif self.state == "FINWAIT1" and not is_acknowledged:
            self._become("CLOSING")
        else:
            self._wait_for_late_packets()

    def _wait_for_late_packets(self) -> None:
        self._acknowledged()
        self._become("TIMEWAIT")
        self._end("", LINGER_S)


class PrototypeUdpClient(ConnectedSocket):
    """Connects to `service_id` at `destination`, says each message after the answer to the one before, closes."""

    def __init__(self, service_id: int, destination: str, messages: Sequence[bytes], **how: float) -> None:
        super().__init__(service_id, **how)
        self._destination = destination
        self._messages = list(messages)

    def _start(self, now: float) -> None:
        self._flow_id = 2
        self._local_address = source_address(self._destination)
        self._peer_address = self._destination
        self._become("REQUEST")
        syn = self._control(SYN, self._send_next, SALService(service_id=self._service_id))
        self._send_reliably(syn / udp(), now)

    def _packet(self, packet: Packet, reply_address: str, now: float) -> None:
        if packet[SAL].dst_flowid != self._flow_id:
            return
        if self.state != "REQUEST":
            self._flow_packet(packet, now)
            return
        control = packet[SAL].extension(SALControl)
        if control is None or int(control.flags) != SYN | ACK or control.ackno != self._send_next:
            return
        if ServalUDP not in packet or payload_of(packet):
            self.result.counters["malformed_packets"] += 1
            return
        self._acknowledged()
        self._send_unacknowledged = self._send_next
        self._peer_flow_id = packet[SAL].src_flowid
        self._peer_nonce = control.nonce
        self._receive_next = (control.verno + 1) % SEQUENCE_NUMBERS
        self._local_address, self._peer_address = packet[IP].dst, packet[IP].src
        self._become("CONNECTED")
        ack = self._control(ACK, self._send_next, SALService(service_id=self._service_id))
        self._transmit(ack / udp(checksummed=False))
        self._next_message(now)

    def _heard(self, payload: bytes, now: float) -> None:
        self.result.received.append(payload)
        self._next_message(now)

    def _next_message(self, now: float) -> None:
        if self._messages:
            self._say(self._messages.pop(0))
        elif self.state == "CONNECTED":
            self._close("FINWAIT1", now)


class PrototypeUdpServer(ConnectedSocket):
    """Accepts one connection to `service_id` and answers in upper case, until QUIT or the peer's FIN comes.

    A datagram that comes before the handshake ACK is lost, as in the prototype.
    """

    def __init__(self, service_id: int, **how: float) -> None:
        super().__init__(service_id, **how)
        self._syn: Packet | None = None

    def _start(self, now: float) -> None:
        """A listener is there as soon as the socket is."""

    def _packet(self, packet: Packet, reply_address: str, now: float) -> None:
        if self.state != "LISTEN":
            if packet[SAL].dst_flowid == self._flow_id:
                self._flow_packet(packet, now)
            return
        control = packet[SAL].extension(SALControl)
        service = packet[SAL].extension(SALService)
        if control is None or service is None or service.service_id != self._service_id:
            self.result.counters["packets_for_no_flow"] += 1
        elif int(control.flags) == SYN:
            self._answer_syn(packet, control, reply_address)
        elif int(control.flags) == ACK and packet[SAL].dst_flowid == self._flow_id:
            self._handshake_ack(packet, control)

    def _answer_syn(self, packet: Packet, control: Packet, reply_address: str) -> None:
        if ServalUDP not in packet:
            self.result.counters["syns_without_udp"] += 1
            return
        if self._syn is None:
            self._syn = packet
            self._flow_id = 3
            self._peer_flow_id = packet[SAL].src_flowid
            self._peer_nonce = control.nonce
            self._receive_next = (control.verno + 1) % SEQUENCE_NUMBERS
            self._local_address, self._peer_address = reply_address, packet[IP].src
        self._transmit(self._control(SYN | ACK, self._send_next) / udp(checksummed=False))

    def _handshake_ack(self, packet: Packet, control: Packet) -> None:
        expected = self._receive_next, (self._send_next + 1) % SEQUENCE_NUMBERS, self._peer_nonce
        if (control.verno, control.ackno, control.nonce) != expected:
            self.result.counters["unfit_handshake_acks"] += 1
            return
        self._send_next = self._send_unacknowledged = control.ackno
        self._peer_address = packet[IP].src
        self._become("CONNECTED")

    def _heard(self, payload: bytes, now: float) -> None:
        self.result.received.append(payload)
        if self.state == "CONNECTED":
            self._say(payload.upper())
            if payload == QUIT:
                self._close("FINWAIT1", now)
