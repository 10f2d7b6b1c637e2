"""Does a played flow migrate, octet for octet, as the worked vectors say, and as SPEC 5.3 does in the odd cases?"""

from __future__ import annotations

from scapy.packet import Packet

from serval_core.wire.scapy_layers import IP, SAL, SALControl
from tests.serval_core.wire.vectors import SERVICE

from .application import Behaviour
from .prototype_flow import ACK, FIN, RSYN
from .prototype_mover import MovingFlow
from .test_prototype_flow import A_NUMBERS, B_NUMBERS, VECTORS, A, B, Recorder, from_server

MOVED = "192.168.7.1"


def client() -> tuple[MovingFlow, Recorder]:
    wire = Recorder()
    flow = MovingFlow(wire, Behaviour(), A_NUMBERS, bytes(SERVICE), initial_timeout_s=3.0)
    flow.connect(A, B, now=0.0)
    flow.packet_received(IP(VECTORS["1.2"]), now=0.01)
    wire.take()
    return flow, wire


def server() -> tuple[MovingFlow, Recorder]:
    wire = Recorder()
    flow = MovingFlow(wire, Behaviour(), B_NUMBERS, bytes(SERVICE), initial_timeout_s=3.0)
    flow.accept(B, IP(VECTORS["1.1"]), IP(VECTORS["1.3"]), now=0.0)
    wire.take()
    return flow, wire


def sent_control(packet: bytes) -> tuple[str, str, Packet]:
    ip = IP(packet)
    return ip.src, ip.dst, ip[SAL].extension(SALControl)


def test_a_client_migrates_as_in_the_vectors() -> None:
    flow, wire = client()
    flow.migrate(MOVED, now=1.0)
    assert wire.take() == [VECTORS["3.1"]]
    flow.packet_received(IP(VECTORS["3.2"]), now=1.01)
    assert wire.take() == [VECTORS["3.3"]]
    assert flow.migration == "INITIAL"


def test_a_server_follows_as_in_the_vectors() -> None:
    flow, wire = server()
    flow.packet_received(IP(VECTORS["3.1"]), now=1.0)
    assert wire.take() == [VECTORS["3.2"]]
    assert flow.result().peer_address == A
    flow.packet_received(IP(VECTORS["3.3"]), now=1.01)
    assert flow.migration == "INITIAL"
    assert flow.result().peer_address == MOVED


def test_a_repeated_rsyn_gets_a_bare_ack_at_the_old_address() -> None:
    flow, wire = server()
    flow.packet_received(IP(VECTORS["3.1"]), now=1.0)
    wire.take()
    flow.packet_received(IP(VECTORS["3.1"]), now=1.2)
    ((_, destination, control),) = map(sent_control, wire.take())
    assert (destination, int(control.flags)) == (A, ACK)


def test_a_bare_ack_wedges_a_mover() -> None:
    """SPEC 11.1, quirk 17."""
    flow, wire = client()
    flow.migrate(MOVED, now=1.0)
    flow.packet_received(from_server(ACK, 0x2001, 0x1002), now=1.1)
    wire.take()
    flow.packet_received(IP(VECTORS["3.2"]), now=1.2)
    assert flow.migration == "SENT"
    assert wire.take() == []


def test_an_rsyn_takes_an_unacknowledged_fin_along() -> None:
    flow, wire = client()
    flow._send_reliably(flow._control(FIN, 0x1001), 0x1001, 1.0)
    flow._send_next += 1
    flow.state = "FINWAIT1"
    wire.take()
    flow.migrate(MOVED, now=1.1)
    ((source, _, control),) = map(sent_control, wire.take())
    assert (source, int(control.flags), control.verno) == (MOVED, RSYN | FIN, 0x1002)
