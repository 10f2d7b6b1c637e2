"""Do native sockets get along with the prototype? Its flows end in ways that only the stack could tell a program of, which holds
the kernel socket alone.
"""

from __future__ import annotations

import pytest
from odd_prototypes import ImpatientFlow, OddServer, SalFinFlow
from playing import THEIR_SERVICE, Playing, options, random_data
from prototype_wire import OURS, Wire, sha256

from serval_core import sockets
from serval_core.sockets import ServalSocket
from tests.peers.application import Behaviour
from tests.peers.prototype import PrototypeClient, PrototypeServer
from tests.peers.prototype_flow import Flow
from tests.serval_core.native_hosts import receive_all

NATIVE_SERVICE = 4711


def connect(wire: Wire) -> ServalSocket:
    return wire.ours.call(sockets.create_connection, str(THEIR_SERVICE), 20.0)


@pytest.mark.parametrize("flow_class", [SalFinFlow, ImpatientFlow])
def test_an_end_of_stream_that_does_not_wait_for_tcp(wire: Wire, flow_class: type[Flow]) -> None:
    """A SAL FIN without a TCP FIN, or right behind one, reaches the program as the end, after all data."""
    data = random_data(100_000)
    server = OddServer(flow_class, THEIR_SERVICE, Behaviour(data, close_when="acknowledged"), options())
    playing = Playing(wire.theirs, server)
    with connect(wire) as connection:
        assert sha256(receive_all(connection)) == sha256(data)
    (flow,) = playing.finished().flows
    assert (flow.state, flow.error, flow.end_of_stream) == ("TIMEWAIT", "", True)


def test_a_program_serves_a_prototype(wire: Wire) -> None:
    data = random_data(300_000)
    with wire.ours.call(sockets.create_server, str(NATIVE_SERVICE)) as server:
        server.settimeout(20)
        client = PrototypeClient(NATIVE_SERVICE, OURS, Behaviour(data, close_when="received", expected_bytes=len(data)), options())
        playing = Playing(wire.theirs, client)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(20)
            received = bytearray()
            while len(received) < len(data):
                received += connection.recv(1 << 16)
            connection.sendall(received)
            connection.shutdown(1)
            assert receive_all(connection) == b""
        (flow,) = playing.finished().flows
    assert (flow.received_sha256, flow.error, flow.end_of_stream) == (sha256(data), "", True)


def test_a_prototype_that_closes_with_unread_data_resets_the_program(wire: Wire) -> None:
    playing = Playing(wire.theirs, PrototypeServer(THEIR_SERVICE, Behaviour(stop_reading_at=1000), options()))

    def send_for_ever() -> None:
        while True:
            connection.sendall(bytes(10_000))

    with connect(wire) as connection, pytest.raises((ConnectionResetError, BrokenPipeError)):
        send_for_ever()
    assert playing.finished().flows[0].counters["resets_sent"] == 1
