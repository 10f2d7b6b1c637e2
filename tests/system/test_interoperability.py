"""Does the stack on the real kernel understand the prototype, and the prototype it, in both roles and on bad wires?

One host runs our stack, the other a prototype played by scapy on a raw socket, which sees checksums left to
hardware and segments left to be cut. It counts what our side does wrong: `finished()` wants that to be nothing.
"""

from __future__ import annotations

import errno
import hashlib
import threading
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
from odd_prototypes import ImpatientFlow, OddClient, OddServer, SalFinFlow, SalRouter
from playing import (
    NOBODYS_SERVICE,
    OUR_SERVICE,
    THEIR_SERVICE,
    Kind,
    LoseFirst,
    Playing,
    Tap,
    is_acknowledgement,
    is_fin,
    is_reset,
    is_syn,
    is_syn_ack,
    is_tcp_fin,
    options,
    random_data,
)

from lab.hosts import Host, Lab
from lab.loss import Faults, FaultyWire
from lab.waiting import wait_for
from lab.wire_counter import WireCounter
from serval_core.sal_settings import SalSettings
from serval_core.wire.scapy_layers import IP, SAL, SALSource
from tests.peers.application import Behaviour, PeerResult
from tests.peers.prototype import PrototypeClient, PrototypeServer
from tests.peers.prototype_flow import Flow
from tests.peers.prototype_peer import Options, Peer
from tests.peers.raw_wire import Direction
from tests.serval_core.stack_thread import Accepting, StackThread, Stream, send_in_background

OURS, THEIRS, EVERYBODY = "10.1.0.1", "10.1.0.2", "10.1.0.255"
QUICK = SalSettings(connect_timeout_s=8.0, time_wait_s=0.2, fin_wait2_s=0.5)
MEGABYTE = 1 << 20

End = Callable[[Stream], None]


class Wire(NamedTuple):
    """Our host with its stack and a listener, and the prototype's host."""

    stack: StackThread
    listener: Accepting
    ours: Host
    theirs: Host

    def client(self, behaviour: Behaviour, how: Options, destination: str = OURS) -> PrototypeClient:
        return PrototypeClient(OUR_SERVICE, destination, behaviour, how)


@pytest.fixture(scope="module")
def shared_wire(root: None) -> Iterator[Wire]:
    with Lab() as lab:
        ours, theirs = lab.host("ours"), lab.host("theirs")
        lab.connect(ours, f"{OURS}/24", theirs, f"{THEIRS}/24")
        with StackThread(ours, sal=QUICK) as stack:
            yield Wire(stack, stack.listen(str(OUR_SERVICE)), ours, theirs)


@pytest.fixture
def wire(shared_wire: Wire) -> Iterator[Wire]:
    """The wire, and the proof that a test left nothing in the stack: no flow, no socket, no map entry."""
    yield shared_wire
    assert_idle(shared_wire.stack)


def assert_idle(stack: StackThread) -> None:
    def busy() -> list[object]:
        counters = stack.counters()
        left = {name: counters[name] for name in ("open_transports", "flow_map_entries") if counters[name]}
        return [*stack.flows(), left] if left or stack.flows() else []

    wait_for(lambda: not busy(), "the stack to be idle")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def echo(stream: Stream) -> None:
    """What comes goes back; ends when the peer does."""
    while data := stream.socket.recv(1 << 16):
        stream.socket.sendall(data)


def serve(stream: Stream, how: End) -> threading.Thread:
    """Do something with a stream in the background, then release it."""

    def run() -> None:
        how(stream)
        stream.release()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def exchange_as_server(wire: Wire, peer: Peer, data: bytes) -> PeerResult:
    """A prototype client, which sends `data`, is served by our echo."""
    playing = Playing(wire.theirs, peer)
    server = serve(wire.listener.accept(), echo)
    result = playing.finished()
    server.join(20)
    (flow,) = result.flows
    assert (flow.received_bytes, flow.received_sha256) == (len(data), sha256(data))
    end = (flow.state, flow.error, flow.end_of_stream)
    assert end == ("TIMEWAIT", "", True), "\n".join(result.log[-60:])
    return result


def exchange_as_client(wire: Wire, peer: Peer, size_bytes: int, destination: str = "") -> PeerResult:
    """Our client sends to a prototype that echoes."""
    playing = Playing(wire.theirs, peer)
    stream = wire.stack.connect(str(THEIR_SERVICE), destination)
    sent = send_in_background(stream, size_bytes)
    received = stream.receive_all()
    stream.release()
    result = playing.finished()
    assert received == sent() == result.flows[0].received_sha256
    assert (result.flows[0].received_bytes, result.flows[0].error) == (size_bytes, "")
    assert (result.flows[0].state, result.flows[0].end_of_stream) == ("CLOSED", True)
    return result


# Data.


@pytest.mark.parametrize("destination", [OURS, EVERYBODY])
def test_a_prototype_client_gets_a_megabyte_back(wire: Wire, destination: str) -> None:
    data = random_data(MEGABYTE)
    behaviour = Behaviour(data, close_when="received", expected_bytes=len(data))
    result = exchange_as_server(wire, wire.client(behaviour, options(), destination), data)
    assert result.flows[0].peer_address == OURS
    assert result.counters["largest_packet_bytes"] == 1500


@pytest.mark.parametrize("destination", [THEIRS, ""])
def test_a_prototype_server_sends_a_megabyte_back(wire: Wire, destination: str) -> None:
    """Without a destination the SYN is broadcast."""
    server = PrototypeServer(THEIR_SERVICE, Behaviour(echo=True), options())
    result = exchange_as_client(wire, server, MEGABYTE, destination)
    assert result.flows[0].peer_address == OURS
    assert result.counters["largest_packet_bytes"] == 1500


@pytest.mark.parametrize("closes_first", ["sender", "receiver"])
def test_uploads_of_a_prototype_client(wire: Wire, closes_first: str) -> None:
    data = random_data(300_000)
    client = wire.client(
        Behaviour(data, close_when="acknowledged" if closes_first == "sender" else "end_of_stream"), options()
    )
    playing = Playing(wire.theirs, client)
    stream = wire.listener.accept()
    digest = hashlib.sha256()
    while (digest.digest() != hashlib.sha256(data).digest()) and (received := stream.socket.recv(1 << 16)):
        digest.update(received)
    if closes_first == "sender":
        assert stream.socket.recv(1) == b""
    stream.release()
    (flow,) = playing.finished().flows
    assert (digest.hexdigest(), flow.sent_bytes, flow.error) == (sha256(data), len(data), "")


@pytest.mark.parametrize("close_when", ["sent", "acknowledged", "end_of_stream"])
def test_downloads_from_a_prototype_server(wire: Wire, close_when: str) -> None:
    data = random_data(300_000)
    behaviour = Behaviour(data, close_when=close_when)  # type: ignore[arg-type]
    playing = Playing(wire.theirs, PrototypeServer(THEIR_SERVICE, behaviour, options()))
    stream = wire.stack.connect(str(THEIR_SERVICE))
    digest = hashlib.sha256()
    while (digest.digest() != hashlib.sha256(data).digest()) and (received := stream.socket.recv(1 << 16)):
        digest.update(received)
    stream.release()
    (flow,) = playing.finished().flows
    assert (digest.hexdigest(), flow.sent_bytes, flow.error) == (sha256(data), len(data), "")


def test_half_close_towards_a_prototype_leaves_its_direction_open(wire: Wire) -> None:
    """The prototype has no half-close, but it sends what it has written after our end of stream."""
    data = random_data(MEGABYTE)
    playing = Playing(wire.theirs, PrototypeServer(THEIR_SERVICE, Behaviour(data), options()))
    stream = wire.stack.connect(str(THEIR_SERVICE))
    question = stream.send_random(20)  # and the end
    answer = stream.receive_all()
    stream.release()
    (flow,) = playing.finished().flows
    assert flow.received_sha256 == question
    assert flow.end_of_stream
    assert answer == sha256(data)


def test_twenty_connections_at_once_are_kept_apart(wire: Wire) -> None:
    server = PrototypeServer(THEIR_SERVICE, Behaviour(echo=True), options(), connections=20)
    playing = Playing(wire.theirs, server)
    outcomes = [wire.stack.begin_connect(str(THEIR_SERVICE), THEIRS) for _ in range(20)]
    streams = [stream for outcome in outcomes if isinstance(stream := outcome.get(timeout=10), Stream)]
    sent = [send_in_background(stream, 5_000 + seed, seed) for seed, stream in enumerate(streams)]
    received = [stream.receive_all() for stream in streams]
    for stream in streams:
        stream.release()
    assert received == [wait() for wait in sent]
    result = playing.finished()
    assert sorted(flow.received_sha256 for flow in result.flows) == sorted(received)
    assert len(received) == 20


# Bad wires.


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize(
    "faults",
    [
        pytest.param(Faults(drop=0.02, protocol=144), id="loss"),
        pytest.param(Faults(duplicate=0.1, reorder=0.1, protocol=144), id="duplicates-and-disorder"),
        pytest.param(Faults(duplicate=1.0, protocol=144), id="everything-twice"),
    ],
)
def test_an_echo_over_a_bad_wire(lab: Lab, role: str, faults: Faults) -> None:
    """`role` is the prototype's."""
    ours, theirs = lab.host("ours"), lab.host("theirs")
    ends = (ours, f"{OURS}/24", theirs, f"{THEIRS}/24")
    with (
        FaultyWire(lab, *ends, seed=4, left_to_right=faults, right_to_left=faults) as bad,
        StackThread(ours, sal=QUICK) as stack,
    ):
        wire = Wire(stack, stack.listen(str(OUR_SERVICE)), ours, theirs)
        data = random_data(300_000)
        if role == "client":
            behaviour = Behaviour(data, close_when="received", expected_bytes=len(data))
            exchange_as_server(wire, wire.client(behaviour, options()), data)
        else:
            exchange_as_client(wire, PrototypeServer(THEIR_SERVICE, Behaviour(echo=True), options()), len(data))
        assert_idle(stack)
        for direction in (bad.left_to_right, bad.right_to_left):
            assert (direction.dropped > 0) == (faults.drop > 0)
            assert (direction.duplicated + direction.reordered > 0) == (faults.duplicate > 0)


LOSSES_OF_A_CLIENT: dict[str, tuple[Direction, Kind]] = {
    "its SYN": ("sent", is_syn),
    "our SYN-ACK": ("received", is_syn_ack),
    "its handshake ACK": ("sent", is_acknowledgement),
    "its TCP FIN": ("sent", is_tcp_fin),
    "its SAL FIN": ("sent", is_fin),
    "our ACK of its SAL FIN": ("received", is_acknowledgement),
    "our TCP FIN": ("received", is_tcp_fin),
    "our SAL FIN": ("received", is_fin),
}


@pytest.mark.parametrize("lost", LOSSES_OF_A_CLIENT)
def test_a_prototype_client_whose_wire_loses(wire: Wire, lost: str) -> None:
    lose = LoseFirst(*LOSSES_OF_A_CLIENT[lost])
    data = random_data(20_000)
    behaviour = Behaviour(data, close_when="received", expected_bytes=len(data))
    exchange_as_server(wire, wire.client(behaviour, options(lose)), data)
    assert lose.lost == 1


def test_a_prototype_client_that_only_listens_survives_a_lost_handshake_ack(wire: Wire) -> None:
    """It sends no data that could complete the handshake: our SYN-ACK is repeated, it answers with a bare SAL ACK."""
    lose = LoseFirst("sent", is_acknowledgement)
    playing = Playing(wire.theirs, wire.client(Behaviour(), options(lose)))
    stream = wire.listener.accept()
    sent = stream.send_random(50_000)
    stream.receive_all()
    stream.release()
    (flow,) = playing.finished().flows
    assert lose.lost == 1
    assert flow.counters["stale_control_packets"] >= 1
    assert flow.received_sha256 == sent


LOSSES_OF_A_SERVER: dict[str, tuple[Direction, Kind]] = {
    "our SYN": ("received", is_syn),
    "its SYN-ACK": ("sent", is_syn_ack),
    "our handshake ACK": ("received", is_acknowledgement),
    "our TCP FIN": ("received", is_tcp_fin),
    "our SAL FIN": ("received", is_fin),
    "its ACK of our SAL FIN": ("sent", is_acknowledgement),
    "its TCP FIN": ("sent", is_tcp_fin),
    "its SAL FIN": ("sent", is_fin),
}


@pytest.mark.parametrize("lost", LOSSES_OF_A_SERVER)
def test_a_prototype_server_whose_wire_loses(wire: Wire, lost: str) -> None:
    lose = LoseFirst(*LOSSES_OF_A_SERVER[lost])
    exchange_as_client(wire, PrototypeServer(THEIR_SERVICE, Behaviour(echo=True), options(lose)), 20_000)
    assert lose.lost == 1


def test_a_prototype_server_that_speaks_first_survives_a_lost_handshake_ack(wire: Wire) -> None:
    """Its handshake never completes by itself; our ACK is repeated, SERVICE included, though nobody asks for it."""
    lose = LoseFirst("received", is_acknowledgement, how_many=2)
    data = random_data(50_000)
    behaviour = Behaviour(data, close_when="acknowledged")
    playing = Playing(wire.theirs, PrototypeServer(THEIR_SERVICE, behaviour, options(lose)))
    stream = wire.stack.connect(str(THEIR_SERVICE))
    assert stream.receive_all() == sha256(data)
    stream.release()
    playing.finished()
    assert lose.lost == 2


# Ends.


def played_as(role: str, flow_class: type[Flow], behaviour: Behaviour) -> Peer:
    if role == "client":
        return OddClient(flow_class, OUR_SERVICE, OURS, behaviour, options())
    return OddServer(flow_class, THEIR_SERVICE, behaviour, options())


def stream_to(wire: Wire, role: str) -> Stream:
    """Our end of the flow to a prototype in this role."""
    return wire.listener.accept() if role == "client" else wire.stack.connect(str(THEIR_SERVICE))


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("flow_class", [SalFinFlow, ImpatientFlow])
def test_an_end_of_stream_that_does_not_wait_for_tcp(
    wire: Wire, role: str, flow_class: type[Flow]
) -> None:
    """A SAL FIN without a TCP FIN, or right behind one, reaches our reader as the end, after all data."""
    data = random_data(100_000)
    playing = Playing(wire.theirs, played_as(role, flow_class, Behaviour(data, close_when="acknowledged")))
    stream = stream_to(wire, role)
    assert stream.receive_all() == sha256(data)
    stream.release()
    (flow,) = playing.finished().flows
    assert (flow.state, flow.error, flow.end_of_stream) == ("TIMEWAIT", "", True)


def send_for_ever(stream: Stream) -> None:
    while True:
        stream.socket.sendall(bytes(10_000))


@pytest.mark.parametrize("role", ["client", "server"])
def test_a_prototype_that_closes_with_unread_data_resets_us(wire: Wire, role: str) -> None:
    behaviour = Behaviour(stop_reading_at=1000)
    peer: Peer = wire.client(behaviour, options())
    if role == "server":
        peer = PrototypeServer(THEIR_SERVICE, behaviour, options())
    playing = Playing(wire.theirs, peer)
    stream = stream_to(wire, role)
    with pytest.raises((ConnectionResetError, BrokenPipeError)):
        send_for_ever(stream)
    assert stream.ended.get(timeout=10) == errno.ECONNRESET
    stream.release()
    assert playing.finished().flows[0].counters["resets_sent"] == 1


@pytest.mark.parametrize("role", ["client", "server"])
def test_our_abort_resets_a_prototype(wire: Wire, role: str) -> None:
    tap = Tap()
    peer: Peer = wire.client(Behaviour(), options(tap))
    if role == "server":
        peer = PrototypeServer(THEIR_SERVICE, Behaviour(), options(tap))
    playing = Playing(wire.theirs, peer)
    stream_to(wire, role).abort()
    (flow,) = playing.finished().flows
    assert (flow.state, flow.error) == ("CLOSED", "ECONNRESET")
    assert tap.first("received", is_reset)[SAL].src_flowid == flow.peer_flow_id


def test_an_unknown_service_is_silence(wire: Wire) -> None:
    """As the prototype has it: no RST, so that its client goes on asking."""
    tap = Tap()
    client = PrototypeClient(NOBODYS_SERVICE, OURS, Behaviour(), options(tap, timeout_s=1.0))
    before = wire.stack.counters().get("dropped_no_listener", 0)
    result = Playing(wire.theirs, client).result()
    assert result.timed_out
    (flow,) = result.flows
    received = [packet for way, packet in tap.packets if way == "received"]
    assert [packet for packet in received if packet[SAL].dst_flowid == flow.flow_id] == []
    assert wire.stack.counters()["dropped_no_listener"] == before + result.counters["sent"]


# Size.


@pytest.mark.parametrize("mtu", [1280, 1500, 9000])
def test_nothing_above_the_mtu_or_what_a_prototype_takes(lab: Lab, mtu: int) -> None:
    """Its MSS option says 1448, which is a packet of 1500 bytes, however large the wire's MTU is."""
    ours, theirs = lab.host("ours"), lab.host("theirs")
    names = lab.connect(ours, f"{OURS}/24", theirs, f"{THEIRS}/24", mtu=mtu)
    largest = min(mtu, 1500)
    with (
        StackThread(ours, sal=QUICK) as stack,
        WireCounter(ours, names[0], 144, longer_than_bytes=largest) as oversize,
    ):
        server = PrototypeServer(THEIR_SERVICE, Behaviour(), options(mtu_bytes=largest))
        playing = Playing(theirs, server)
        stream = stack.connect(str(THEIR_SERVICE))
        sent = stream.send_random(400_000)
        stream.receive_all()
        stream.release()
        result = playing.finished()
        assert result.flows[0].received_sha256 == sent
        assert oversize.count() == 0
        assert result.counters["largest_packet_bytes"] == largest
        assert_idle(stack)


# Service routers.


@pytest.mark.parametrize("routers", [1, 2])
@pytest.mark.parametrize("role", ["client", "server"])
def test_a_syn_that_service_routers_forwarded(lab: Lab, role: str, routers: int) -> None:
    """The SYN-ACK goes directly to SOURCE[0], our address appended; its last address is the peer of the client."""
    ours, theirs = lab.host("ours"), lab.host("theirs")
    first, second = lab.host("first"), lab.host("second")
    addresses = {ours: f"{OURS}/24", theirs: f"{THEIRS}/24", first: "10.1.0.11/24", second: "10.1.0.12/24"}
    lab.switch("switch", addresses)
    server_address, client_address = (OURS, THEIRS) if role == "client" else (THEIRS, OURS)
    hops = ["10.1.0.11", "10.1.0.12"][:routers]
    tap = Tap()
    data = random_data(20_000)
    with (
        SalRouter(second, server_address),
        SalRouter(first, [*hops, server_address][1]) as router,
        StackThread(ours, sal=QUICK) as stack,
    ):
        wire = Wire(stack, stack.listen(str(OUR_SERVICE)), ours, theirs)
        if role == "client":
            behaviour = Behaviour(data, close_when="received", expected_bytes=len(data))
            result = exchange_as_server(wire, wire.client(behaviour, options(tap), hops[0]), data)
            syn_ack = tap.first("received", is_syn_ack)
        else:
            server = PrototypeServer(THEIR_SERVICE, Behaviour(echo=True), options(tap))
            result = exchange_as_client(wire, server, len(data), hops[0])
            syn_ack = tap.first("sent", is_syn_ack)
        assert_idle(stack)
    assert (syn_ack[IP].src, syn_ack[IP].dst) == (server_address, client_address)
    assert syn_ack[SAL].extension(SALSource).addresses == [client_address, *hops, server_address]
    assert result.flows[0].peer_address == OURS
    assert router.forwarded == 1
