"""Do datagrams of our stack on the real kernel and of a prototype understand each other, in every role?"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core.datagrams import DatagramFlow
from serval_core.names import parse_address, parse_service
from serval_core.sal_settings import SalSettings
from tests.peers.prototype import lose_handshake_ack
from tests.peers.prototype_udp import PrototypeDatagramSocket, UdpResult, UdpSocket, service_number
from tests.peers.prototype_udp_flow import QUIT, PrototypeUdpClient, PrototypeUdpServer
from tests.serval_core.datagram_ends import Bound, connect
from tests.serval_core.stack_thread import StackThread

OURS, THEIRS, EVERYBODY = "10.1.0.1", "10.1.0.2", "10.1.0.255"
OUR_SERVICE, THEIR_SERVICE = 600, 700
QUICK = SalSettings(connect_timeout_s=8.0, time_wait_s=0.2, fin_wait2_s=0.5)
SOON_S = 30.0
MESSAGES = [b"hello udp", b"second message", b"x" * 1388]


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    with Lab() as lab:
        ours, theirs = lab.host("ours"), lab.host("theirs")
        lab.connect(ours, f"{OURS}/24", theirs, f"{THEIRS}/24")
        yield ours, theirs


@pytest.fixture(scope="module")
def stack(root: None, hosts: tuple[Host, Host]) -> Iterator[StackThread]:
    with StackThread(hosts[0], sal=QUICK) as stack:
        yield stack


class Playing:
    """A peer that plays in a thread of its own, on the prototype's host."""

    def __init__(self, host: Host, peer: UdpSocket) -> None:
        self._peer = peer
        self._thread = threading.Thread(target=lambda: host.call(peer.run), daemon=True)
        self._thread.start()
        assert peer.ready.wait(SOON_S)

    def finished(self) -> UdpResult:
        """What it saw; it must have had no cause for complaint."""
        self._thread.join(SOON_S)
        result = self._peer.result
        assert not self._thread.is_alive()
        assert not result.timed_out, result.log
        assert result.complaints == {}, result.log
        return result


@pytest.fixture
def theirs(hosts: tuple[Host, Host]) -> Host:
    return hosts[1]


@pytest.fixture
def bound(stack: StackThread) -> Iterator[Bound]:
    """Our endpoint."""
    bound = Bound(stack, str(OUR_SERVICE))
    yield bound
    stack.call(bound.endpoint.close)


def assert_idle(stack: StackThread) -> None:
    wait_for(lambda: not stack.flows(), "all flows are gone")
    assert stack.counters()["flow_map_entries"] == 0


@pytest.mark.parametrize("destination", [OURS, EVERYBODY])
def test_a_prototype_asks_without_a_connection(bound: Bound, theirs: Host, destination: str) -> None:
    socket = PrototypeDatagramSocket(THEIR_SERVICE, OUR_SERVICE, destination, MESSAGES, expected=3)
    playing = Playing(theirs, socket)
    for message in MESSAGES:
        question = bound.receive()
        assert (question.payload, question.source_address) == (message, parse_address(THEIRS))
        assert bound.send(question.payload.upper(), question.source_service) == 0
    result = playing.finished()
    assert result.received == [message.upper() for message in MESSAGES]
    assert set(result.sources) == {service_number(OUR_SERVICE)}


@pytest.mark.parametrize("destination", [THEIRS, ""])
def test_a_prototype_answers_without_a_connection(bound: Bound, theirs: Host, destination: str) -> None:
    """Without a destination ours is broadcast."""
    playing = Playing(theirs, PrototypeDatagramSocket(THEIR_SERVICE, expected=3))
    for message in MESSAGES:
        bound.send(message, parse_service(str(THEIR_SERVICE)).service_id, destination)
        answer = bound.receive()
        assert answer.payload == message.upper()
        assert answer.source_service == service_number(THEIR_SERVICE)
    assert playing.finished().received == MESSAGES


def test_a_prototype_refuses_and_our_endpoint_lives_on(bound: Bound, theirs: Host) -> None:
    playing = Playing(theirs, PrototypeDatagramSocket(THEIR_SERVICE))
    bound.send(b"anybody", parse_service("701").service_id, THEIRS)
    assert bound.refused.get(timeout=SOON_S) == parse_address(THEIRS)
    bound.send(b"question", parse_service(str(THEIR_SERVICE)).service_id, THEIRS)
    assert bound.receive().payload == b"QUESTION"
    assert playing.finished().counters["reply_resets"] == 1


def test_we_refuse_what_came_to_us_alone(stack: StackThread, theirs: Host) -> None:
    """A prototype's socket does not survive that."""
    result = Playing(theirs, PrototypeDatagramSocket(THEIR_SERVICE, 701, OURS, [b"anybody"])).finished()
    assert result.error == "ECONNRESET"


def echo(flow: DatagramFlow) -> None:
    """The program on our side: answers in upper case, closes when told to or when the peer does."""

    def answer(payload: bytes) -> None:
        flow.send(payload.upper())
        if payload == QUIT:
            flow.close()

    flow.on_datagram = answer
    flow.on_ended = lambda _errno: flow.close()


@pytest.fixture
def echoing(stack: StackThread) -> Iterator[None]:
    listener = stack.call(lambda: stack.stack.datagrams.listen(parse_service(str(OUR_SERVICE)), echo))
    yield
    stack.call(listener.close)


@pytest.mark.parametrize("destination", [OURS, EVERYBODY])
@pytest.mark.parametrize("closes_first", ["client", "both"])
def test_a_prototype_client(
    stack: StackThread, theirs: Host, echoing: None, destination: str, closes_first: str
) -> None:
    messages = MESSAGES if closes_first == "client" else [*MESSAGES, QUIT]
    result = Playing(theirs, PrototypeUdpClient(OUR_SERVICE, destination, messages)).finished()
    assert result.received == [message.upper() for message in messages]
    assert (result.error, result.end_of_stream) == ("", True)
    assert_idle(stack)


def test_a_prototype_client_whose_handshake_ack_is_lost(
    stack: StackThread, theirs: Host, echoing: None
) -> None:
    """Its first datagram takes the place of the ACK; between two prototypes the connection would hang."""
    client = PrototypeUdpClient(OUR_SERVICE, OURS, MESSAGES, lose=lose_handshake_ack())  # type: ignore[arg-type]
    assert Playing(theirs, client).finished().received == [message.upper() for message in MESSAGES]
    assert_idle(stack)


@pytest.mark.parametrize("destination", [THEIRS, ""])
@pytest.mark.parametrize("closes_first", ["ours", "theirs"])
def test_a_prototype_server(stack: StackThread, theirs: Host, destination: str, closes_first: str) -> None:
    playing = Playing(theirs, PrototypeUdpServer(THEIR_SERVICE))
    end = connect(stack, str(THEIR_SERVICE), destination)
    for message in MESSAGES:
        end.send(message)
        assert end.receive() == message.upper()
    if closes_first == "theirs":
        end.send(QUIT)
        assert end.ending() == 0
    end.close()
    result = playing.finished()
    assert result.received[:3] == MESSAGES
    assert (result.error, result.end_of_stream) == ("", True)
    assert_idle(stack)


def test_our_abort_resets_a_prototype(stack: StackThread, theirs: Host) -> None:
    playing = Playing(theirs, PrototypeUdpServer(THEIR_SERVICE))
    end = connect(stack, str(THEIR_SERVICE), THEIRS)
    end.send(b"hello")
    end.receive()
    end.abort()
    assert playing.finished().error == "ECONNRESET"
    assert_idle(stack)
