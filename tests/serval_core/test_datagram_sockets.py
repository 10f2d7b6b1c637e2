"""Native datagram sockets on real stacks: unconnected and connected Serval UDP as a program sees it."""

from __future__ import annotations

import errno
import os
import select
import socket as system
from collections.abc import Iterator

import pytest

from lab.hosts import Lab
from lab.waiting import wait_for
from serval_core.datagram_sockets import ServalDatagramSocket
from serval_core.names import parse_service
from serval_core.rules import Rule
from serval_core.sal_settings import SalSettings
from tests.serval_core.native_hosts import SERVICE, NativeHosts
from tests.serval_core.stack_thread import StackThread

QUICK = SalSettings(connect_timeout_s=1.0, time_wait_s=0.2, fin_wait2_s=0.5)


@pytest.fixture
def hosts(lab: Lab) -> Iterator[NativeHosts]:
    client, server = lab.host("client"), lab.host("server")
    lab.connect(client, "10.1.0.1/24", server, "10.1.0.2/24")
    with StackThread(client, sal=QUICK) as near, StackThread(server, sal=QUICK) as far:
        made = NativeHosts(near, far)
        yield made
        made.close()


def bound(hosts: NativeHosts, service: str = SERVICE) -> ServalDatagramSocket:
    made = hosts.on(hosts.far, ServalDatagramSocket)
    made.bind(service)
    return made


def test_question_and_answer(hosts: NativeHosts) -> None:
    """The client's random serviceID and its address come along, so the answer finds it."""
    server, client = bound(hosts), hosts.on(hosts.near, ServalDatagramSocket)
    assert client.sendto(b"question", SERVICE) == 8
    payload, source = server.recvfrom(100)
    assert payload == b"question"
    assert source == (client.getsockname().service, "10.1.0.1")
    server.sendto(b"answer", source)
    assert client.recvfrom(3) == (b"ans", (parse_service(SERVICE), "10.1.0.2"))


def test_prefix_learns_and_chooses_the_exact_service(hosts: NativeHosts) -> None:
    server, client = bound(hosts, "0xabcd:16"), hosts.on(hosts.near, ServalDatagramSocket)
    client.sendto(b"x", ("0xabcd77", "10.1.0.2"))
    received = server.receive()
    assert received.service == parse_service("0xabcd77").service_id
    server.send_as(received.service, b"y", received.source)
    assert client.recvfrom(1)[1].service == parse_service("0xabcd77")


def test_select_and_not_blocking(hosts: NativeHosts) -> None:
    server, client = bound(hosts), hosts.on(hosts.near, ServalDatagramSocket)
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recvfrom(1)
    assert select.select([server], [], [], 0)[0] == []
    client.sendto(os.urandom(60_000), SERVICE)
    assert select.select([server], [], [], 10)[0] == [server]
    assert len(server.recvfrom(65535)[0]) == 60_000


def test_datagram_of_wrong_size(hosts: NativeHosts) -> None:
    client = hosts.on(hosts.near, ServalDatagramSocket)
    for payload, code in ((b"", errno.EINVAL), (bytes(65_500), errno.EMSGSIZE)):
        with pytest.raises(OSError, match="datagram has") as caught:
            client.sendto(payload, SERVICE)
        assert caught.value.errno == code


def test_failure_of_a_datagram_is_told_at_the_next_one(hosts: NativeHosts) -> None:
    """A DROP rule refuses the first; receiving goes on, and the sender learns of it."""
    client = hosts.on(hosts.near, ServalDatagramSocket)
    hosts.near.call(lambda: hosts.near.stack.table.add(Rule.drop(parse_service("99"))))
    client.sendto(b"x", "99")
    assert select.select([client], [], [], 10)[0] == [client]
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.recvfrom(1)
    with pytest.raises(OSError, match="not sent") as caught:
        client.sendto(b"x", "99")
    assert caught.value.errno == errno.EHOSTUNREACH
    assert client.getsockopt(system.SOL_SOCKET, system.SO_ERROR) == 0


def test_program_that_does_not_read_loses_datagrams_alone(hosts: NativeHosts) -> None:
    deaf, other, client = bound(hosts), bound(hosts, "5"), hosts.on(hosts.near, ServalDatagramSocket)

    def flood() -> bool:
        for _ in range(20):
            client.sendto(bytes(30_000), (SERVICE, "10.1.0.2"))
        return hosts.far.counters()["native_datagrams_not_read"] > 0

    wait_for(flood, "the program's queue is full")
    client.sendto(b"x", "5")
    assert other.recvfrom(1)[0] == b"x"
    assert len(deaf.recvfrom(65535)[0]) == 30_000


def test_connected_flow(hosts: NativeHosts) -> None:
    listener = bound(hosts)
    listener.listen()
    client = hosts.on(hosts.near, ServalDatagramSocket)
    client.connect(SERVICE)
    server, peer = listener.accept()
    assert peer.address == "10.1.0.1"
    assert client.getpeername() == (parse_service(SERVICE), "10.1.0.2")
    assert server.getsockname().service == parse_service(SERVICE)
    client.send(b"one")
    client.send(b"two")
    assert [server.recv(10), server.recv(10)] == [b"one", b"two"]
    server.send(b"three")
    assert client.recv(10) == b"three"
    client.close()
    assert server.recv(10) == b""
    server.close()
    listener.close()
    wait_for(lambda: hosts.near.flows() == hosts.far.flows() == [], "both ends are closed")


def test_connect_that_does_not_block(hosts: NativeHosts) -> None:
    listener = bound(hosts)
    listener.listen()
    client = hosts.on(hosts.near, ServalDatagramSocket)
    client.setblocking(False)
    assert client.connect_ex(SERVICE) == errno.EINPROGRESS
    assert select.select([], [client], [], 10)[1] == [client]
    assert client.getsockopt(system.SOL_SOCKET, system.SO_ERROR) == 0
    client.send(b"x")
    assert listener.accept()[0].recv(1) == b"x"
    refused = hosts.on(hosts.near, ServalDatagramSocket)
    with pytest.raises(TimeoutError):
        refused.connect("99")


def test_closed_sockets_leave_nothing(hosts: NativeHosts) -> None:
    for _ in range(3):
        server, client = bound(hosts), hosts.on(hosts.near, ServalDatagramSocket)
        client.sendto(b"x", SERVICE)
        server.recvfrom(1)
        server.close()
        client.close()
        wait_for(lambda: hosts.far.call(hosts.far.stack.datagrams.snapshot) == [], "the endpoint is gone")
    wait_for(lambda: hosts.near.call(hosts.near.stack.datagrams.snapshot) == [], "the endpoint is gone")


def test_failed_datagram_is_no_answer_to_a_connect(hosts: NativeHosts) -> None:
    """What became of a datagram waits to be read when the stack answers something else."""
    listener, client = bound(hosts), hosts.on(hosts.near, ServalDatagramSocket)
    listener.listen()
    hosts.near.call(lambda: hosts.near.stack.table.add(Rule.drop(parse_service("99"))))
    client.sendto(b"x", "99")
    assert select.select([client], [], [], 10)[0] == [client]
    client.connect(SERVICE)
    flow, _ = listener.accept()
    with flow:
        client.send(b"question")
        assert flow.recv(100) == b"question"
        flow.send(b"answer")
        assert client.recv(100) == b"answer"


def test_failed_datagram_is_no_answer_to_a_bind(hosts: NativeHosts) -> None:
    client = bound(hosts)
    hosts.far.call(lambda: hosts.far.stack.table.add(Rule.drop(parse_service("99"))))
    client.sendto(b"x", "99")
    assert select.select([client], [], [], 10)[0] == [client]
    client.listen()
    assert client.getsockopt(system.SOL_SOCKET, system.SO_ERROR) == errno.EHOSTUNREACH
