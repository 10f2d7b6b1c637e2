"""Does our SAL stand in for either end of a conversation that two prototypes were recorded in?

The recorded packets of one end are replayed with our names and numbers in place of the other end's, and what
we answer is compared with what that end answered.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from serval_core.addresses import is_unicast
from serval_core.effects import Accepted, Connected, EndOfStream, FlowEnded, OpenTransport
from serval_core.names import FlowID
from serval_core.wire import ipv4, sal, tcp_segment
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import ACK, FIN, RSYN, SYN, SalPacket
from tests.serval_core.lone_host import LOCAL, SERVICE_ID, LoneHost, Sent
from tests.serval_core.wire.captures import CAPTURES, Capture, is_whole

CLIENT_FLOW, SERVER_FLOW = 2, 3
CONTROL_PACKETS = {
    "SYN": 0,
    "SYN-ACK": 1,
    "ACK": 2,
    "server FIN": 7,
    "its ACK": 8,
    "client FIN": 11,
    "ACK of it": 12,
}


class Recorded(NamedTuple):
    ip: IPv4Packet
    sal: SalPacket


RECORDING = [
    Recorded(ip, sal.parse(ip.payload)) for ip in (ipv4.parse(packet) for packet in CAPTURES[0].packets())
]


class Shape(NamedTuple):
    """What two packets must share to mean the same. Numbers count from the initial ones."""

    flags: int
    verno: int
    ackno: int
    services: tuple[bytes, ...]
    tcp_flags: int | None
    tcp_sequence: int
    tcp_acknowledgement: int


class Numbers(NamedTuple):
    """The initial numbers of one end."""

    flow_id: int
    verno: int
    sequence: int

    @classmethod
    def of(cls, packet: SalPacket) -> Numbers:
        assert packet.control is not None
        segment = tcp_segment.parse(packet.transport, 0, 0, verify=False)
        return cls(packet.src_flow_id, packet.control.verno, segment.sequence)


def shape(packet: SalPacket, own: Numbers, other: Numbers | None) -> Shape:
    control = packet.control
    assert control is not None
    flags, sequence, acknowledgement = None, 0, 0
    if packet.transport:
        segment = tcp_segment.parse(packet.transport, 0, 0, verify=False)
        flags = segment.flags
        sequence = segment.sequence - own.sequence & 0xFFFFFFFF
        acknowledgement = 0 if other is None else segment.acknowledgement - other.sequence & 0xFFFFFFFF
    return Shape(
        control.flags,
        control.verno - own.verno & 0xFFFFFFFF,
        control.ackno if other is None else control.ackno - other.verno & 0xFFFFFFFF,
        packet.services,
        flags,
        sequence,
        acknowledgement,
    )


SERVER = Numbers.of(RECORDING[CONTROL_PACKETS["SYN-ACK"]].sal)
CLIENT = Numbers.of(RECORDING[CONTROL_PACKETS["SYN"]].sal)


def recorded_shape(name: str) -> Shape:
    packet = RECORDING[CONTROL_PACKETS[name]].sal
    from_client = packet.src_flow_id == CLIENT_FLOW
    own, other = (CLIENT, SERVER) if from_client else (SERVER, CLIENT)
    return shape(packet, own, None if name == "SYN" else other)


class Replay:
    """A host of ours in the place of the recorded `replaced` end."""

    def __init__(self, replaced: Numbers, other: Numbers) -> None:
        self.host = LoneHost()
        self._replaced = replaced
        self._other = other
        self._own: Numbers | None = None

    def play(self, name: str, broadcast: bool = False) -> None:
        """Let the other end say what it said."""
        ip, packet = RECORDING[CONTROL_PACKETS[name]]
        assert packet.control is not None
        transport = packet.transport
        destination = ip.destination if broadcast else LOCAL
        if self._own is not None:
            shift = self._own.verno - self._replaced.verno
            packet = packet._replace(
                dst_flow_id=self._own.flow_id,
                control=packet.control._replace(ackno=packet.control.ackno + shift & 0xFFFFFFFF),
            )
            if transport:
                segment = tcp_segment.parse(transport, ip.source, ip.destination)
                shift = self._own.sequence - self._replaced.sequence
                segment = segment._replace(acknowledgement=segment.acknowledgement + shift & 0xFFFFFFFF)
                transport = tcp_segment.emit(segment, ip.source, destination)
        payload = sal.emit(packet._replace(transport=transport))
        self.host.receive(ipv4.emit(ip.source, destination, sal.PROTOCOL_SAL, payload), broadcast)

    def expect(self, name: str) -> Sent:
        """We must answer as the replaced end did, with one packet."""
        sent = self.host.only_packet()
        if self._own is None:
            self._own = Numbers.of(sent.sal)
        assert shape(sent.sal, self._own, None if name == "SYN" else self._other) == recorded_shape(name)
        return sent


def test_as_server() -> None:
    replay = Replay(SERVER, CLIENT)
    host = replay.host
    host.listen()
    replay.play("SYN", broadcast=True)
    answer = replay.expect("SYN-ACK")
    assert is_unicast(answer.source)
    replay.play("ACK")
    assert host.packets() == []
    ((_, flow_id, service_id),) = [
        (each.listener_id, each.flow_id, each.service_id) for each in host.news(Accepted)
    ]
    assert service_id == SERVICE_ID
    (transport,) = host.news(OpenTransport)
    assert transport.parameters.mss_bytes == 1448
    assert transport.parameters.send_window_scale == 1
    host.sal.fin_acknowledged(flow_id, host.now)
    replay.expect("server FIN")
    replay.play("its ACK")
    assert host.states() == ["FINWAIT2"]
    host.sal.release(flow_id, host.now)
    replay.play("client FIN")
    replay.expect("ACK of it")
    assert host.news(FlowEnded) == [FlowEnded(flow_id, 0)]
    assert len(host.sal._core.flows.time_wait) == 1


def test_as_client() -> None:
    replay = Replay(CLIENT, SERVER)
    host = replay.host
    host.forward(RECORDING[CONTROL_PACKETS["SYN-ACK"]].ip.source)
    flow_id = host.connect()
    replay.expect("SYN")
    replay.play("SYN-ACK")
    replay.expect("ACK")
    assert host.news(Connected) == [Connected(flow_id)]
    (transport,) = host.news(OpenTransport)
    assert transport.parameters.send_window_bytes == 5792
    replay.play("server FIN")
    replay.expect("its ACK")
    assert host.news(EndOfStream) == [EndOfStream(flow_id)]
    host.sal.release(flow_id, host.now)
    host.sal.fin_acknowledged(flow_id, host.now)
    replay.expect("client FIN")
    replay.play("ACK of it")
    assert host.news(FlowEnded) == [FlowEnded(flow_id, 0)]


def test_the_recording_is_what_the_names_say() -> None:
    flags = {}
    for name, at in CONTROL_PACKETS.items():
        control = RECORDING[at].sal.control
        assert control is not None
        flags[name] = control.flags
    assert flags == {
        "SYN": SYN,
        "SYN-ACK": SYN | ACK,
        "ACK": ACK,
        "server FIN": FIN,
        "its ACK": ACK,
        "client FIN": FIN,
        "ACK of it": ACK,
    }
    assert {packet.sal.src_flow_id for packet in RECORDING} == {CLIENT_FLOW, SERVER_FLOW}


@pytest.mark.parametrize("capture", CAPTURES, ids=lambda capture: capture.name)
def test_of_what_prototypes_sent_only_syns_make_flows(capture: Capture) -> None:
    host = LoneHost()
    host.listen()
    syns = set()
    for packet in capture.packets():
        if is_whole(packet):
            host.receive(packet)
            parsed = ipv4.parse(packet)
            if parsed.payload[14] & (SYN | ACK | RSYN) == SYN and parsed.payload[8] > 3:
                syns.add(parsed.payload[:4])
    assert {flow["peer_flow_id"] for flow in host.sal.flows()} <= {
        FlowID(int.from_bytes(each, "big")) for each in syns
    }
    assert host.news(OpenTransport) == []
