"""Datagrams on the real kernel: two hosts and a wire, what programs see, and nothing left behind."""

from __future__ import annotations

import functools
import queue
from collections.abc import Iterator
from errno import EADDRNOTAVAIL, ECONNABORTED, ECONNRESET, EPIPE, ETIMEDOUT

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core.datagrams import FLOW_PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX, Datagram, DatagramFlow
from serval_core.errors import OurMistake
from serval_core.names import parse_address, parse_service
from serval_core.sal_settings import SalSettings
from serval_core.stack_socket import StackSocketClient
from tests.serval_core.datagram_ends import SOON_S, AcceptingEnds, Bound, connect
from tests.serval_core.stack_thread import StackThread

SERVICE = parse_service("76568")
SERVICE_ID = SERVICE.service_id
CLIENT_ADDRESS, SERVER_ADDRESS = "10.1.0.1", "10.1.0.2"
QUICK = SalSettings(connect_timeout_s=1.0, time_wait_s=0.2, fin_wait2_s=0.5)


@pytest.fixture
def wire(lab: Lab) -> tuple[Host, Host]:
    client, server = lab.host("client"), lab.host("server")
    lab.connect(client, f"{CLIENT_ADDRESS}/24", server, f"{SERVER_ADDRESS}/24")
    return client, server


@pytest.fixture
def stacks(wire: tuple[Host, Host]) -> Iterator[tuple[StackThread, StackThread]]:
    with StackThread(wire[0], sal=QUICK) as client, StackThread(wire[1], sal=QUICK) as server:
        yield client, server


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


def discard(_outcome: int) -> None:
    """For callbacks that are to return nothing."""


def has_no_flows(stack: StackThread) -> bool:
    return not stack.flows()


def assert_idle(*stacks: StackThread) -> None:
    """No flow and no map entry: waits, because the last packets of a close are under way."""
    for stack in stacks:
        wait_for(functools.partial(has_no_flows, stack), "all flows are gone")
        assert stack.counters()["flow_map_entries"] == 0


def test_a_flow_carries_datagrams_both_ways_and_closes(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    listener = AcceptingEnds(server, "0x0001:16")
    near = connect(client, "76568")
    far = listener.accept()
    assert far.flow.service_id == SERVICE_ID
    assert near.flow.peer_address == far.flow.local_address == parse_address(SERVER_ADDRESS)
    for size in (1, 1460, 1461, 20000, FLOW_PAYLOAD_BYTES_MAX):
        payload = bytes(number % 251 for number in range(size))
        assert near.send(payload) == 0
        assert far.receive() == payload
        assert far.send(payload[::-1]) == 0
        assert near.receive() == payload[::-1]
    (listed,) = client.flows()
    assert (listed["protocol"], listed["packets_out"], listed["packets_in"]) == ("UDP", 5, 5)
    near.close()
    assert far.ending() == 0
    assert far.send(b"the client does not listen any more") == 0
    far.close()
    assert near.send(b"x") == EPIPE
    assert_idle(client, server)


def test_flows_of_one_stack_with_itself(stacks: tuple[StackThread, StackThread]) -> None:
    alone, _ = stacks
    listener = AcceptingEnds(alone, "76568")
    near = connect(alone, "76568")
    far = listener.accept()
    near.send(bytes(30000))
    assert far.receive() == bytes(30000)
    far.send(b"answer")
    assert near.receive() == b"answer"
    near.close()
    assert far.ending() == 0
    far.close()
    assert_idle(alone)


def test_an_abort_is_a_reset_for_the_peer(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    listener = AcceptingEnds(server, "76568")
    near = connect(client, "76568")
    far = listener.accept()
    near.abort()
    assert far.ending() == ECONNRESET
    far.close()
    assert_idle(client, server)


def test_many_flows_at_once_do_not_mix(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks

    def echo(flow: DatagramFlow) -> None:
        flow.on_datagram = lambda payload: discard(flow.send(payload))
        flow.on_ended = lambda _errno: flow.close()

    listener = server.call(lambda: server.stack.datagrams.listen(SERVICE, echo))
    ends = [connect(client, "76568") for _ in range(50)]
    for number, end in enumerate(ends):
        end.send(b"%d" % number)
    assert [int(end.receive()) for end in ends] == list(range(50))
    for end in ends:
        end.close()
    assert_idle(client, server)
    server.call(listener.close)


def test_nobody_answers(stacks: tuple[StackThread, StackThread]) -> None:
    """Neither without a listener nor with one for streams."""
    client, server = stacks
    server.listen("76568")
    for service in ("76568", "600"):
        with pytest.raises(OSError, match="no answer") as failure:
            connect(client, service)
        assert failure.value.errno == ETIMEDOUT


def test_a_cancelled_connect_is_forgotten(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    told: queue.Queue[object] = queue.Queue()

    def begin_and_cancel() -> None:
        pending = client.stack.datagrams.connect(SERVICE_ID, told.put, lambda *failure: told.put(failure))
        pending.cancel()
        pending.cancel()

    client.call(begin_and_cancel)
    assert_idle(client, server)
    assert told.empty()


def test_stopping_the_stack_resets_its_flows(wire: tuple[Host, Host]) -> None:
    with StackThread(wire[1], sal=QUICK) as server:
        listener = AcceptingEnds(server, "76568")
        with StackThread(wire[0], sal=QUICK) as client:
            connect(client, "76568")
            far = listener.accept()
        assert far.ending() in (ECONNRESET, ECONNABORTED)
        far.close()
        assert_idle(server)


def test_flows_are_in_the_news(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    news: queue.Queue[dict[str, object]] = queue.Queue()
    kinds = ["flow_opened", "flow_ended"]
    client.call(lambda: client.stack.events.subscribe(lambda event: news.put(event.as_dict()), kinds))
    listener = AcceptingEnds(server, "76568")
    near = connect(client, "76568")
    far = listener.accept()
    near.close()
    far.ending()
    far.close()
    opened, ended = (news.get(timeout=SOON_S) for _ in range(2))
    assert (opened["event"], opened["role"], opened["service"]) == ("flow_opened", "active", "76568")
    assert (ended["event"], ended["flow_id"], ended["error"]) == ("flow_ended", opened["flow_id"], None)


def test_endpoints_are_listed_on_the_stack_socket(stacks: tuple[StackThread, StackThread]) -> None:
    client, server = stacks
    asker, answerer = Bound(client), Bound(server, "76568")
    asker.send(b"question", SERVICE_ID)
    answerer.receive()
    (listed,) = server.host.call(lambda: StackSocketClient().request("endpoints"))
    assert listed["service"] == "76568"
    assert [listed[f"datagrams_{what}"] for what in ("sent", "received", "refused")] == [0, 1, 0]
