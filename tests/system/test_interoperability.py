"""Does the stack on the real kernel understand the prototype, and the prototype it, in both roles?"""

from __future__ import annotations

import hashlib

import pytest
from odd_prototypes import SalRouter
from playing import (
    OUR_SERVICE,
    THEIR_SERVICE,
    Playing,
    Tap,
    is_syn_ack,
    options,
    random_data,
)
from prototype_wire import (
    EVERYBODY,
    MEGABYTE,
    OURS,
    QUICK,
    THEIRS,
    Wire,
    assert_idle,
    exchange_as_client,
    exchange_as_server,
    sha256,
)

from lab.hosts import Lab
from lab.wire_counter import WireCounter
from serval_core.wire.scapy_layers import IP, SAL, SALSource
from tests.peers.application import Behaviour
from tests.peers.prototype import PrototypeServer
from tests.serval_core.stack_thread import StackThread, Stream, send_in_background

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
