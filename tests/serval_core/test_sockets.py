"""Native stream sockets on real stacks: what a program sees is what it would see of TCP, and the stack keeps nothing."""

from __future__ import annotations

import errno
import os
import select
import signal
import socket as system
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from lab.hosts import Lab
from lab.waiting import wait_for
from serval_core import sockets, unattended
from serval_core.dataplane.flow_sockets import SocketState
from serval_core.errors import KernelRefused
from serval_core.names import FlowID, parse_service
from serval_core.sal_settings import SalSettings
from tests.serval_core.native_hosts import SERVICE, NativeHosts, in_thread, program, receive_all
from tests.serval_core.stack_thread import StackThread

ENDED = SalSettings(time_wait_s=0.2, fin_wait2_s=0.5)
IMPATIENT = SalSettings(connect_timeout_s=0.5)
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER


@pytest.fixture
def hosts(lab: Lab) -> Iterator[NativeHosts]:
    with two_hosts(lab, ENDED) as made:
        yield made


@pytest.fixture
def impatient_hosts(lab: Lab) -> Iterator[NativeHosts]:
    """For tests in which connecting has to fail."""
    with two_hosts(lab, IMPATIENT) as made:
        yield made


@contextmanager
def two_hosts(lab: Lab, settings: SalSettings) -> Iterator[NativeHosts]:
    client, server = lab.host("client"), lab.host("server")
    lab.connect(client, "10.1.0.1/24", server, "10.1.0.2/24")
    with StackThread(client, sal=settings) as near, StackThread(server, sal=settings) as far:
        made = NativeHosts(near, far)
        yield made
        made.close()


def errno_of(use: Callable[[], object]) -> int | None:
    """The errno with which this fails; every OSError of ours has a sentence, too."""
    with pytest.raises(OSError, match=r"\w") as caught:
        use()
    return caught.value.errno


def test_data_both_ways_and_names(hosts: NativeHosts) -> None:
    server = hosts.server("0xabcd:16")
    near = hosts.connect("0xabcd0123")
    far, peer = server.accept()
    service = parse_service("0xabcd0123")
    assert near.getpeername() == (service, "10.1.0.2")
    assert near.getsockname().address == "10.1.0.1"
    assert far.getsockname() == (service, "10.1.0.2")
    assert peer == far.getpeername() == (parse_service("default"), "10.1.0.1")
    assert hosts.near.flows()[0]["flow_id"] == near.flow_id
    assert hosts.near.flows()[0]["pid"] == os.getpid()
    near.sendall(b"question")
    near.shutdown(system.SHUT_WR)
    assert receive_all(far) == b"question"
    answer = os.urandom(2_000_000)
    sent = in_thread(lambda: far.sendall(answer) or far.close())
    assert receive_all(near) == answer
    sent()
    near.close()
    server.close()
    hosts.assert_idle()
    assert hosts.far.call(lambda: len(hosts.far.stack.table.bound())) == 0


def test_advisory_address_skips_resolution(hosts: NativeHosts) -> None:
    hosts.server()
    assert hosts.connect((SERVICE, "10.1.0.2")).getpeername().address == "10.1.0.2"


def test_nobody_at_the_advisory_address_is_a_timeout(impatient_hosts: NativeHosts) -> None:
    impatient_hosts.server()
    with pytest.raises(TimeoutError):
        impatient_hosts.connect((SERVICE, "10.1.0.99"))


def test_listener_is_readable_when_a_connection_waits(hosts: NativeHosts) -> None:
    server = hosts.server()
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()
    assert select.select([server], [], [], 0) == ([], [], [])
    hosts.connect()
    assert select.select([server], [], [], 10)[0] == [server]
    server.accept()[0].close()
    assert select.select([server], [], [], 0)[0] == []


def test_backlog_waits_until_the_program_accepts(hosts: NativeHosts) -> None:
    """Far more connections than the program's queue in the kernel holds: none is lost, and each has its data."""
    server = hosts.server(backlog=4)
    clients = [hosts.socket() for _ in range(16)]
    for client in clients:
        client.setblocking(False)
        assert client.connect_ex(SERVICE) == errno.EINPROGRESS
    waiting, accepted = set(clients), []
    while waiting or len(accepted) < len(clients):
        readable, writable, _ = select.select([server], waiting, [], 10)
        assert readable or writable
        for client in writable:
            assert client.getsockopt(system.SOL_SOCKET, system.SO_ERROR) == 0
            client.sendall(client.flow_id.to_bytes(4, "big"))
            waiting.remove(client)
        if readable:
            accepted.append(server.accept()[0])
    received = []
    for connection in accepted:
        with connection:
            connection.settimeout(10)
            received.append(connection.recv(4))
    assert sorted(received) == sorted(client.flow_id.to_bytes(4, "big") for client in clients)


def test_server_that_ends_accepts_what_is_under_way_and_sends_others_away(hosts: NativeHosts) -> None:
    server = hosts.server()
    waiting = hosts.connect()
    server.listen(0)
    hosts.near.forward(SERVICE, "10.1.0.2")  # who asks everybody gets no refusal
    wait_for(lambda: hosts.far.call(hosts.far.stack.bound_services) == [], "the service to be elsewhere")
    assert errno_of(hosts.connect) == errno.ECONNREFUSED
    accepted, _ = server.accept()
    with accepted:
        waiting.sendall(b"still")
        assert accepted.recv(5, system.MSG_WAITALL) == b"still"
    server.close()
    hosts.pair()


def test_connect_that_does_not_block(hosts: NativeHosts) -> None:
    near = hosts.socket()
    near.setblocking(False)
    with pytest.raises(BlockingIOError) as caught:
        near.connect(SERVICE)
    assert caught.value.errno == errno.EINPROGRESS
    assert near.connect_ex(SERVICE) == errno.EALREADY
    assert near.getsockopt(system.SOL_SOCKET, system.SO_ERROR) == 0
    descriptor = near.fileno()
    assert select.select([], [near], [], 0)[1] == [], "writable means that the outcome is there"
    server = hosts.server()
    assert select.select([], [near], [], 10)[1] == [near]
    assert near.getsockopt(system.SOL_SOCKET, system.SO_ERROR) == 0
    assert near.fileno() == descriptor
    assert near.connect_ex(SERVICE) == errno.EISCONN
    far, _ = server.accept()
    near.sendall(b"x")
    assert far.recv(1) == b"x"


def test_connect_that_does_not_block_and_fails(impatient_hosts: NativeHosts) -> None:
    near = impatient_hosts.socket()
    near.setblocking(False)
    assert near.connect_ex("99") == errno.EINPROGRESS
    assert select.select([], [near], [], 10)[1] == [near]
    assert near.getsockopt(system.SOL_SOCKET, system.SO_ERROR) == errno.ETIMEDOUT


def test_connect_whose_program_goes_away_is_cancelled(hosts: NativeHosts) -> None:
    near = hosts.socket()
    near.setblocking(False)
    assert near.connect_ex("99") == errno.EINPROGRESS
    wait_for(lambda: [flow["state"] for flow in hosts.near.flows()] == ["REQUEST"], "the stack connects")
    near.close()
    wait_for(lambda: hosts.near.flows() == [], "the flow is forgotten", ENDED.connect_timeout_s / 2)


def test_timeout_of_the_socket_bounds_connect_and_accept(hosts: NativeHosts) -> None:
    near, server = hosts.socket(), hosts.server()
    near.settimeout(0.05)
    with pytest.raises(TimeoutError):
        near.connect("99")
    server.settimeout(0.05)
    with pytest.raises(TimeoutError):
        server.accept()


@pytest.mark.parametrize("unread", [b"", b"unread"])
def test_reset_of_one_program_reaches_the_other(hosts: NativeHosts, unread: bytes) -> None:
    """SO_LINGER 0, and a close with unread data: the kernel sends the RST, the SAL follows, the peer's program sees it."""
    near, far = hosts.pair()
    far.sendall(unread)
    if unread:
        assert near.recv(1, system.MSG_PEEK) == b"u"
    else:
        near.setsockopt(system.SOL_SOCKET, system.SO_LINGER, RESET_ON_CLOSE)
    near.close()
    with pytest.raises(ConnectionResetError):
        far.recv(1)
    far.close()
    hosts.assert_idle()


def test_reset_of_the_peer_reaches_the_program(hosts: NativeHosts) -> None:
    """The peer's stack resets at the SAL; no descriptor of the socket is left on this side but the program's."""
    listener = hosts.far.listen(SERVICE)
    near = hosts.connect()
    listener.accept().abort()
    with pytest.raises(ConnectionResetError):
        near.recv(1)
    near.close()
    hosts.assert_idle()


def test_reset_while_the_connection_waits_to_be_accepted(hosts: NativeHosts) -> None:
    server = hosts.server()
    near = hosts.connect()
    near.setsockopt(system.SOL_SOCKET, system.SO_LINGER, RESET_ON_CLOSE)
    near.close()
    wait_for(lambda: hosts.far.flows() == [], "the reset has arrived")
    far, _ = server.accept()
    with pytest.raises(ConnectionResetError):
        far.recv(1)


KILLED = """
import signal, sys
from serval_core import sockets
connection = sockets.create_connection(sys.argv[1])
connection.sendall(b"alive")
print("connected", flush=True)
signal.pause()
"""


@pytest.mark.parametrize("unread", [False, True])
def test_killed_program_ends_the_connection(hosts: NativeHosts, unread: bool) -> None:
    """kill -9: the kernel closes its sockets, and the peer's program sees the end, or a reset if something was not read."""
    server = hosts.server()
    with program(hosts.near.host, KILLED, SERVICE) as killed:
        far, _ = server.accept()
        assert far.recv(5) == b"alive"
        if unread:
            far.sendall(b"never read")
            wait_for(lambda: int(str(hosts.near.flows()[0]["packets_in"])) > 1, "the data arrived")
        os.kill(killed.pid, signal.SIGKILL)
        if unread:
            with pytest.raises(ConnectionResetError):
                far.recv(1)
        else:
            assert far.recv(1) == b""
        far.close()
        server.close()
    hosts.assert_idle()


def test_half_closed_flow_of_a_dead_program_does_not_stay(hosts: NativeHosts) -> None:
    """The program is gone and its peer never closes: when the kernel has no socket any more, neither has the SAL a flow."""
    hosts.near.host.sysctl("net.ipv4.tcp_fin_timeout", 1)
    near, far = hosts.pair()
    near.close()
    assert far.recv(1) == b""
    wait_for(lambda: hosts.near.flows() == [], "the flow is gone", 20)
    far.close()


def test_one_failure_does_not_end_the_looking_at_sockets(
    hosts: NativeHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sockets that the kernel gives up on are found by looking only."""
    monkeypatch.setattr(unattended, "LOOK_INTERVAL_S", 0.02)
    sockets = hosts.near.stack._dataplane.sockets
    look, looks = sockets.look, []

    def fail_once(flow_id: FlowID) -> SocketState | None:
        looks.append(flow_id)
        if len(looks) == 1:
            raise KernelRefused("BPF_PROG_TEST_RUN", errno.ENOMEM, "")
        return look(flow_id)

    monkeypatch.setattr(sockets, "look", fail_once)
    near, far = hosts.pair()
    wait_for(lambda: len(looks) > 3, "it is looked at again")
    near.sendall(b"x")
    assert far.recv(1) == b"x"


def test_stack_that_stops_resets_its_programs_and_their_peers(lab: Lab) -> None:
    client, server = lab.host("client"), lab.host("server")
    lab.connect(client, "10.1.0.1/24", server, "10.1.0.2/24")
    with StackThread(server) as far:
        with StackThread(client) as near:
            hosts = NativeHosts(near, far)
            local, remote = hosts.pair()
            listener = hosts.on(near, lambda: sockets.create_server("5"))
        for connection in (local, remote):
            with pytest.raises(ConnectionResetError):
                connection.recv(1)
        listener.return_patience_s = 0
        with pytest.raises(OSError, match="start servald") as caught:
            client.call(listener.accept)
        assert caught.value.errno == errno.ENETDOWN
        assert select.select([listener], [], [], 0)[0] == []
        with pytest.raises(OSError, match="start servald"):
            client.call(sockets.socket)
        hosts.close()
        hosts.near = far
        hosts.assert_idle()


def test_mistakes_have_errno_and_sentence(hosts: NativeHosts) -> None:
    first = hosts.server()
    for service, code in ((SERVICE, errno.EADDRINUSE), ("default", errno.EINVAL), ("no such name", errno.EINVAL)):
        assert errno_of(lambda service=service: hosts.server(service)) == code
    first.close()
    hosts.server()
    near = hosts.socket()
    for use in (near.getpeername, lambda: near.send(b"x"), lambda: near.recv(1), lambda: near.shutdown(2)):
        assert errno_of(use) == errno.ENOTCONN
    assert errno_of(near.accept) == errno.EINVAL
    for arguments, code in (
        ((system.AF_INET,), errno.EAFNOSUPPORT),
        ((sockets.AF_SERVAL, system.SOCK_RAW), errno.ESOCKTNOSUPPORT),
        ((sockets.AF_SERVAL, system.SOCK_STREAM, 99), errno.EPROTONOSUPPORT),
    ):
        assert errno_of(lambda arguments=arguments: sockets.socket(*arguments)) == code


def test_sendfile(hosts: NativeHosts, tmp_path: object) -> None:
    near, far = hosts.pair()
    content = os.urandom(3_000_000)
    path = f"{tmp_path}/file"
    with open(path, "wb") as file:
        file.write(content)
    with open(path, "rb") as file:
        sent = in_thread(lambda: near.sendfile(file) and near.shutdown(system.SHUT_WR))
        assert receive_all(far) == content
        sent()
