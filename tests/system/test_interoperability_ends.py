"""Do flows between the stack and the prototype end, whoever ends them and however?"""

from __future__ import annotations

import errno

import pytest
from odd_prototypes import ImpatientFlow, OddClient, OddServer, SalFinFlow
from playing import (
    NOBODYS_SERVICE,
    OUR_SERVICE,
    THEIR_SERVICE,
    Playing,
    Tap,
    is_reset,
    options,
    random_data,
)
from prototype_wire import (
    OURS,
    Wire,
    sha256,
)

from serval_core.wire.scapy_layers import SAL
from tests.peers.application import Behaviour
from tests.peers.prototype import PrototypeClient, PrototypeServer
from tests.peers.prototype_flow import Flow
from tests.peers.prototype_peer import Peer
from tests.serval_core.stack_thread import Stream


def played_as(role: str, flow_class: type[Flow], behaviour: Behaviour) -> Peer:
    if role == "client":
        return OddClient(flow_class, OUR_SERVICE, OURS, behaviour, options())
    return OddServer(flow_class, THEIR_SERVICE, behaviour, options())


def stream_to(wire: Wire, role: str) -> Stream:
    """Our end of the flow to a prototype in this role."""
    return wire.listener.accept() if role == "client" else wire.stack.connect(str(THEIR_SERVICE))


@pytest.mark.parametrize("role", ["client", "server"])
@pytest.mark.parametrize("flow_class", [SalFinFlow, ImpatientFlow])
def test_an_end_of_stream_that_does_not_wait_for_tcp(wire: Wire, role: str, flow_class: type[Flow]) -> None:
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
