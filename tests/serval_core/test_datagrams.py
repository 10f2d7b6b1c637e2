"""Datagrams on the real kernel: two hosts and a wire, what programs see, and nothing left behind."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from errno import EADDRNOTAVAIL

import pytest

from lab.hosts import Host, Lab
from serval_core.datagrams import PAYLOAD_BYTES_MAX, Datagram, DatagramEndpoint
from serval_core.errors import OurMistake
from serval_core.names import ServiceID, parse_address, parse_service
from tests.serval_core.stack_thread import StackThread

SERVICE = parse_service("76568")
SERVICE_ID = SERVICE.service_id
CLIENT_ADDRESS, SERVER_ADDRESS = "10.1.0.1", "10.1.0.2"
SOON_S = 20.0


@pytest.fixture
def wire(lab: Lab) -> tuple[Host, Host]:
    client, server = lab.host("client"), lab.host("server")
    lab.connect(client, f"{CLIENT_ADDRESS}/24", server, f"{SERVER_ADDRESS}/24")
    return client, server


@pytest.fixture
def stacks(wire: tuple[Host, Host]) -> Iterator[tuple[StackThread, StackThread]]:
    with StackThread(wire[0]) as client, StackThread(wire[1]) as server:
        yield client, server


class Bound:
    """An endpoint whose datagrams are taken with `receive()`."""

    def __init__(self, owner: StackThread, service: str | None = None) -> None:
        self._owner = owner
        self.received: queue.Queue[Datagram] = queue.Queue()
        self.refused: queue.Queue[int] = queue.Queue()
        prefix = None if service is None else parse_service(service)
        self.endpoint: DatagramEndpoint = owner.call(
            lambda: owner.stack.datagrams.bind(prefix, self.received.put)
        )
        self.endpoint.on_refused = self.refused.put

    def send(self, payload: bytes, destination: ServiceID, address: str = "") -> int:
        number = parse_address(address) if address else 0
        return self._owner.call(lambda: self.endpoint.send(payload, destination, number))

    def receive(self) -> Datagram:
        return self.received.get(timeout=SOON_S)


def test_question_and_answer_with_nothing_configured(stacks: tuple[StackThread, StackThread]) -> None:
    """Both are broadcast: the answer is resolved by the asker's random serviceID."""
    client, server = stacks
    asker, answerer = Bound(client), Bound(server, "76568")
    assert asker.send(b"question", SERVICE_ID) == 0
    question = answerer.receive()
    assert question.payload == b"question"
    assert question.source_address == parse_address(CLIENT_ADDRESS)
    assert question.source_service == asker.endpoint.service_id
    assert answerer.send(b"answer", question.source_service) == 0
    answer = asker.receive()
    assert (answer.payload, answer.source_service) == (b"answer", SERVICE_ID)
    assert answer.source_address == parse_address(SERVER_ADDRESS)


@pytest.mark.parametrize("size", [1, 1388, 1389, 9000, PAYLOAD_BYTES_MAX])
def test_any_size_arrives_whole(stacks: tuple[StackThread, StackThread], size: int) -> None:
    """1388 bytes are the most for one packet of 1500. The kernel's IP puts fragments together."""
    client, server = stacks
    asker, answerer = Bound(client), Bound(server, "76568")
    payload = bytes(number % 251 for number in range(size))
    asker.send(payload, SERVICE_ID)
    assert answerer.receive().payload == payload


def test_both_ends_on_one_stack(stacks: tuple[StackThread, StackThread]) -> None:
    alone, _ = stacks
    asker, answerer = Bound(alone), Bound(alone, "76568")
    asker.send(bytes(40000), SERVICE_ID)
    question = answerer.receive()
    assert len(question.payload) == 40000
    answerer.send(b"answer", question.source_service)
    assert asker.receive().payload == b"answer"


def test_a_prefix_is_told_what_was_asked_for(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    asker, answerer = Bound(client), Bound(server, "0xabcd:16")
    member = parse_service("0xabcd0123").service_id
    asker.send(b"question", member)
    question = answerer.receive()
    assert question.destination_service == member
    server.call(lambda: answerer.endpoint.send(b"answer", question.source_service, source_service=member))
    assert asker.receive().source_service == member


def test_a_refusal_is_reported_and_the_endpoint_lives_on(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    asker = Bound(client)
    asker.send(b"is anybody there", SERVICE_ID, SERVER_ADDRESS)
    assert asker.refused.get(timeout=SOON_S) == parse_address(SERVER_ADDRESS)
    answerer = Bound(server, "76568")
    asker.send(b"question", SERVICE_ID, SERVER_ADDRESS)
    assert answerer.receive().payload == b"question"


def test_a_thousand_at_once_all_arrive_in_order(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    asker, answerer = Bound(client), Bound(server, "76568")

    def send_all() -> None:
        for number in range(1000):
            asker.endpoint.send(b"%d" % number, SERVICE_ID)

    client.call(send_all)
    assert [int(answerer.receive().payload) for _ in range(1000)] == list(range(1000))


def test_an_endpoint_may_close_itself_from_its_callback(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    asker = Bound(client)
    answerer = Bound(server, "76568")

    def take_one(datagram: Datagram) -> None:
        answerer.endpoint.close()
        answerer.received.put(datagram)

    answerer.endpoint.on_datagram = take_one
    asker.send(b"last words", SERVICE_ID, SERVER_ADDRESS)
    assert answerer.receive().payload == b"last words"
    asker.send(b"anybody", SERVICE_ID, SERVER_ADDRESS)
    asker.refused.get(timeout=SOON_S)
    server.call(answerer.endpoint.close)
    with pytest.raises(OurMistake, match="closed"):
        answerer.send(b"too late", SERVICE_ID)


def test_without_any_rule_the_caller_is_told(wire: tuple[Host, Host]) -> None:
    with StackThread(wire[0], broadcast=False) as client:
        assert Bound(client).send(b"question", SERVICE_ID) == EADDRNOTAVAIL
