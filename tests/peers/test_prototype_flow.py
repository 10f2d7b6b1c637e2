"""Does a played flow send, octet for octet, what the worked vectors say that the prototype sends?"""

from __future__ import annotations

import pytest
from scapy.packet import Packet

from serval_core.wire.scapy_layers import IP, SAL, SALControl, ServalTCP
from tests.serval_core.wire.vectors import A_NONCE, B_NONCE, PACKETS, SERVICE

from .application import Behaviour
from .prototype_flow import ACK, FIN, RST, RSYN, SYN, Flow, Identity, syn_ack

VECTORS = {vector.title.split()[0]: vector.packet for vector in PACKETS}
A_NUMBERS = Identity(2, A_NONCE, 0x1000, 0x0A000000)
B_NUMBERS = Identity(5, B_NONCE, 0x2000, 0x0B000000)
A, B = "10.0.0.1", "10.0.0.2"


class Recorder:
    """A wire that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def send(self, source: str, destination: str, layers: Packet) -> None:
        self.sent.append(bytes(IP(src=source, dst=destination, id=0, flags=0) / layers))

    def take(self) -> list[bytes]:
        sent, self.sent = self.sent, []
        return sent


def open_client(behaviour: Behaviour) -> tuple[Flow, Recorder]:
    """A client after the handshake of vectors 1.1 to 1.3; what it sent then is still in the recorder."""
    wire = Recorder()
    flow = Flow(wire, behaviour, A_NUMBERS, bytes(SERVICE), initial_timeout_s=3.0)
    flow.connect(A, B, now=0.0)
    flow.packet_received(IP(VECTORS["1.2"]), now=0.01)
    return flow, wire


def open_server(behaviour: Behaviour) -> tuple[Flow, Recorder]:
    """A server after the same handshake."""
    wire = Recorder()
    flow = Flow(wire, behaviour, B_NUMBERS, bytes(SERVICE), initial_timeout_s=3.0)
    flow.accept(B, IP(VECTORS["1.1"]), IP(VECTORS["1.3"]), now=0.0)
    return flow, wire


def from_server(flags: int, verno: int, ackno: int, nonce: bytes = B_NONCE) -> Packet:
    control = SALControl(flags=flags, verno=verno, ackno=ackno, nonce=nonce)
    return IP(bytes(IP(src=B, dst=A) / SAL(src_flowid=5, dst_flowid=2, extensions=[control])))


def segment(**fields: object) -> Packet:
    tcp = ServalTCP(window=2896, **fields)
    return IP(bytes(IP(src=B, dst=A) / SAL(src_flowid=5, dst_flowid=2) / tcp))


FIN_SEGMENT = segment(flags="FA", seq=0x0B000001, ack=0x0A000001)
ACK_OF_FIN = segment(flags="A", seq=0x0B000001, ack=0x0A000007)


def test_a_client_sends_the_worked_connection() -> None:
    flow, wire = open_client(Behaviour(b"hello", close_when="sent"))
    syn, ack, data, fin_segment = wire.take()
    assert syn == VECTORS["1.1"]
    assert ack == VECTORS["1.3"]
    assert data == VECTORS["1.4"]
    assert fin_segment == VECTORS["2.1"]
    flow.packet_received(ACK_OF_FIN, now=0.02)
    assert wire.take() == [VECTORS["2.2"]]
    assert flow.state == "FINWAIT1"
    flow.packet_received(IP(VECTORS["2.3"]), now=0.03)
    assert flow.state == "FINWAIT2"
    flow.packet_received(from_server(FIN, 0x2001, 0x1002), now=0.04)
    assert flow.state == "TIMEWAIT"
    (last,) = wire.take()
    control = IP(last)[SAL].extension(SALControl)
    assert (int(control.flags), control.verno, control.ackno) == (ACK, 0x1002, 0x2002)


@pytest.mark.parametrize(("syn", "answer"), [("1.1", "1.2"), ("4.2", "4.3")])
def test_a_listener_sends_the_worked_syn_acks(syn: str, answer: str) -> None:
    packet = IP(src=B, dst=A, id=0, flags=0) / syn_ack(B_NUMBERS, IP(VECTORS[syn]), B)
    assert bytes(packet) == VECTORS[answer]


def test_a_forwarded_client_takes_the_last_address() -> None:
    wire = Recorder()
    flow = Flow(wire, Behaviour(), A_NUMBERS, bytes(SERVICE), initial_timeout_s=3.0)
    flow.connect(A, "10.0.0.9", now=0.0)
    flow.packet_received(IP(VECTORS["4.3"]), now=0.01)
    assert wire.take() == [VECTORS["4.1"], VECTORS["1.3"]]


def test_the_syn_is_repeated_unchanged_at_3_9_21_seconds() -> None:
    wire = Recorder()
    flow = Flow(wire, Behaviour(), A_NUMBERS, bytes(SERVICE), initial_timeout_s=3.0)
    flow.connect(A, B, now=0.0)
    times = []
    for _ in range(4):
        times.append(flow.next_timeout())
        flow.handle_timeout(times[-1])
    assert times == [3.0, 9.0, 21.0, 45.0]
    assert wire.take() == [VECTORS["1.1"]] * 5


def test_a_fin_segment_alone_is_no_end_of_stream() -> None:
    flow, wire = open_client(Behaviour())
    wire.take()
    flow.packet_received(FIN_SEGMENT, now=0.02)
    assert flow.tcp is not None
    assert flow.tcp.receiver.fin_received
    assert not flow.result().end_of_stream
    assert flow.state == "CONNECTED"
    assert [IP(packet)[ServalTCP].ack for packet in wire.take()] == [0x0B000002]


def test_a_sal_fin_alone_is_the_end_of_the_stream() -> None:
    flow, wire = open_client(Behaviour())
    wire.take()
    flow.packet_received(from_server(FIN, 0x2001, 0x1001), now=0.02)
    assert flow.result().end_of_stream
    # The program closes at once.
    assert flow.state == "LASTACK"
    acknowledgement, fin_segment = wire.take()
    assert int(IP(acknowledgement)[SAL].extension(SALControl).flags) == ACK
    assert ServalTCP not in IP(acknowledgement)
    assert IP(fin_segment)[ServalTCP].flags == "FA"


def test_a_fin_with_a_wrong_nonce_is_ignored_but_a_reset_is_not() -> None:
    flow, wire = open_client(Behaviour())
    wire.take()
    flow.packet_received(from_server(FIN, 0x2001, 0x1001, nonce=bytes(8)), now=0.02)
    assert (flow.state, wire.take(), flow.result().end_of_stream) == ("CONNECTED", [], False)
    flow.packet_received(from_server(RST, 0x2001, 0, nonce=bytes(8)), now=0.03)
    assert (flow.state, flow.result().error) == ("CLOSED", "ECONNRESET")


def test_a_reset_refuses_a_request_and_breaks_a_half_closed_flow() -> None:
    wire = Recorder()
    flow = Flow(wire, Behaviour(), A_NUMBERS, bytes(SERVICE), initial_timeout_s=3.0)
    flow.connect(A, B, now=0.0)
    flow.packet_received(from_server(RST | ACK, 0, 0x1001), now=0.01)
    assert (flow.state, flow.result().error) == ("CLOSED", "ECONNREFUSED")


@pytest.mark.parametrize("flags", [SYN | ACK, FIN, RST])
def test_stale_control_packets_are_acknowledged_without_service_and_transport(flags: int) -> None:
    flow, wire = open_client(Behaviour())
    wire.take()
    flow.packet_received(from_server(flags, 0x2000, 0x1001), now=0.02)
    (answer,) = wire.take()
    control = IP(answer)[SAL].extension(SALControl)
    assert (int(control.flags), control.verno, control.ackno) == (ACK, 0x1001, 0x2001)
    assert len(IP(answer)[SAL].extensions) == 1
    assert ServalTCP not in IP(answer)
    assert flow.state == "CONNECTED"


@pytest.mark.parametrize("flags", [ACK, RSYN | ACK])
def test_stale_acknowledgements_are_not_answered(flags: int) -> None:
    flow, wire = open_client(Behaviour())
    wire.take()
    flow.packet_received(from_server(flags, 0x1FFF, 0x1001), now=0.02)
    assert wire.take() == []


def test_closing_with_unread_bytes_resets() -> None:
    flow, wire = open_client(Behaviour(stop_reading_at=0))
    wire.take()
    flow.packet_received(segment(flags="PA", seq=0x0B000001, ack=0x0A000001) / b"unread", now=0.02)
    assert flow.state == "CLOSED"
    assert wire.take() == [VECTORS["6.2"]]


def test_data_after_close_kills_the_flow_silently() -> None:
    flow, wire = open_client(Behaviour(close_when="sent"))
    wire.take()
    flow.packet_received(segment(flags="PA", seq=0x0B000001, ack=0x0A000001) / b"late", now=0.02)
    assert (flow.state, flow.result().error) == ("CLOSED", "ECONNRESET")
    assert wire.take() == []


def test_a_syn_ack_that_tcp_does_not_like_silences_the_client() -> None:
    wire = Recorder()
    flow = Flow(wire, Behaviour(), A_NUMBERS, bytes(SERVICE), initial_timeout_s=3.0)
    flow.connect(A, B, now=0.0)
    wire.take()
    answer = IP(VECTORS["1.2"])
    answer[ServalTCP].ack += 1
    flow.packet_received(answer, now=0.01)
    assert (flow.state, wire.take(), flow.next_timeout()) == ("REQUEST", [], float("inf"))


def test_a_server_reads_the_worked_data_and_answers_the_worked_fin() -> None:
    flow, wire = open_server(Behaviour())
    flow.packet_received(IP(VECTORS["1.4"]), now=0.01)
    flow.packet_received(IP(VECTORS["2.1"]), now=0.02)
    wire.take()
    flow.packet_received(IP(VECTORS["2.2"]), now=0.03)
    assert wire.take()[0] == VECTORS["2.3"]
    result = flow.result()
    assert (result.received_bytes, result.end_of_stream, result.error) == (5, True, "")
    assert flow.state == "LASTACK"


def test_a_fin_is_repeated_soon_once_a_round_trip_was_measured() -> None:
    flow, wire = open_client(Behaviour(b"hello", close_when="sent"))
    flow.packet_received(ACK_OF_FIN, now=0.02)
    wire.take()
    repeats = []
    for _ in range(3):
        repeats.append(round(flow.next_timeout() - 0.02, 3))
        flow.handle_timeout(flow.next_timeout())
    assert repeats == [0.21, 0.63, 1.47]
    assert wire.take() == [VECTORS["2.2"]] * 3


def test_fifteen_repeats_without_an_answer_are_a_timeout() -> None:
    wire = Recorder()
    flow = Flow(wire, Behaviour(), A_NUMBERS, bytes(SERVICE), initial_timeout_s=3.0)
    flow.connect(A, B, now=0.0)
    while flow.state == "REQUEST":
        flow.handle_timeout(flow.next_timeout())
    assert flow.result().error == "ETIMEDOUT"
    assert len(wire.take()) == 16


def test_states_for_simultaneous_close() -> None:
    flow, wire = open_client(Behaviour(b"hello", close_when="sent"))
    flow.packet_received(ACK_OF_FIN, now=0.02)
    flow.packet_received(from_server(FIN, 0x2001, 0x1001), now=0.03)
    assert flow.state == "CLOSING"
    flow.packet_received(from_server(ACK, 0x2002, 0x1002), now=0.04)
    assert flow.state == "TIMEWAIT"
    wire.take()
    flow.packet_received(from_server(FIN | ACK, 0x2001, 0x1002), now=0.05)
    assert len(wire.take()) == 1
    flow.handle_timeout(flow.next_timeout())
    assert flow.state == "CLOSED"


def test_the_control_bits_are_those_of_the_layers() -> None:
    names = {"SYN": SYN, "RSYN": RSYN, "ACK": ACK, "RST": RST, "FIN": FIN}
    for name, bit in names.items():
        assert SALControl(flags=name).flags == bit
