"""What a hostile program gains from the native socket: nothing, and nobody else loses anything."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import socket as system
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from random import Random

import pytest

from lab.hosts import Lab
from lab.waiting import wait_for
from serval_core import native_service
from serval_core.access_policy import AccessPolicy, AccessRule, Principals
from serval_core.names import parse_service
from serval_core.native_protocol import DATAGRAM, DATAGRAM_MARK, HOLD, NATIVE_SOCKET_ADDRESS
from serval_core.rules import Rule
from serval_core.sal_settings import SalSettings
from serval_core.sockets import ServalSocket, create_connection, create_server
from tests.serval_core.stack_thread import StackThread

SERVICE = "00012b18" + "0" * 56
OTHER = "00000005" + "0" * 56
Reach = Callable[[], system.socket]


@pytest.fixture
def stack(lab: Lab) -> Iterator[StackThread]:
    settings = SalSettings(connect_timeout_s=2.0, time_wait_s=0.2, fin_wait2_s=0.5)
    with StackThread(lab.host("alone"), sal=settings) as made:
        yield made


@pytest.fixture
def reach(stack: StackThread) -> Iterator[Reach]:
    """Makes connections to the native socket, of a program that speaks for itself."""
    with ExitStack() as open_sockets:

        def connect() -> system.socket:
            made = open_sockets.enter_context(system.socket(system.AF_UNIX, system.SOCK_SEQPACKET))
            made.connect(NATIVE_SOCKET_ADDRESS)
            made.settimeout(10)
            return made

        yield lambda: stack.host.call(connect)


def trust_nobody(stack: StackThread, *rules: AccessRule) -> None:
    """Take this program, which is root's, for one of any user."""
    policy = AccessPolicy(rules)
    policy._trusted = frozenset()
    stack.stack.native.policy = policy


def ask(raw: system.socket, **fields: object) -> int:
    """The errno of the answer."""
    raw.send(json.dumps(fields).encode())
    return answer(raw)


def answer(raw: system.socket) -> int:
    return int(json.loads(raw.recv(4096)).get("errno", 0))


def datagram(service: str, payload: bytes = b"x", source: str = "0" * 64) -> bytes:
    return DATAGRAM.pack(DATAGRAM_MARK, 0, 0, bytes.fromhex(service), bytes.fromhex(source)) + payload


@pytest.mark.parametrize("datagrams", [False, True])
def test_rule_for_one_service_holds_whatever_number_of_bits_is_claimed(
    stack: StackThread, reach: Reach, datagrams: bool
) -> None:
    """A connect is to one service: who claims a prefix must not pass beside the rule for the service itself."""
    trust_nobody(stack, AccessRule(parse_service("76568"), connect=Principals()))
    raw = reach()
    assert ask(raw, request="connect", service=SERVICE, datagrams=datagrams) == errno.EACCES
    for bits in (0, 1, 32, 255):
        assert ask(raw, request="connect", service=SERVICE, bits=bits, datagrams=datagrams) == errno.EINVAL
    assert stack.flows() == []


def test_connected_datagram_socket_stays_with_its_flow(stack: StackThread, reach: Reach) -> None:
    """A second connect would leave the first flow to nobody."""
    listener, raw = reach(), reach()
    assert ask(listener, request="bind", service=SERVICE, datagrams=True) == 0
    assert ask(listener, request="listen", backlog=5, datagrams=True) == 0
    assert ask(listener, request="connect", service=OTHER, datagrams=True) == errno.EINVAL
    assert ask(raw, request="connect", service=SERVICE, datagrams=True) == 0
    for kind in (True, False):
        assert ask(raw, request="connect", service=SERVICE, datagrams=kind) == errno.EISCONN
        assert ask(raw, request="bind", service=OTHER, datagrams=kind) == errno.EINVAL
    raw.close()
    listener.close()
    wait_for(lambda: stack.flows() == [], "no flow is left")
    assert stack.call(lambda: len(stack.stack.native._clients)) == 0
    assert not stack.call(lambda: set(stack.stack.table.bound()))


def test_connected_stream_socket_connects_no_more(stack: StackThread, reach: Reach) -> None:
    """The program has its descriptor; more of them would wait in a socket that nobody reads."""
    server = stack.host.call(create_server, "76568")
    raw = reach()
    assert ask(raw, request="connect", service=SERVICE) == 0
    assert ask(raw, request="connect", service=SERVICE) == errno.EISCONN
    server.close()


@pytest.mark.parametrize("destination", [-1, 1 << 32, 1 << 62, 255 << 24 | 1, 224 << 24, 0xFFFFFFFF])
@pytest.mark.parametrize("datagrams", [False, True])
def test_destination_that_is_no_host(stack: StackThread, reach: Reach, destination: int, datagrams: bool) -> None:
    raw = reach()
    code = ask(raw, request="connect", service=SERVICE, destination=destination, datagrams=datagrams)
    assert code == errno.EINVAL
    assert stack.flows() == []


def test_limit_of_accepted_datagram_flows(
    stack: StackThread, reach: Reach, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flows that are accepted count as sockets of the user, too."""
    trust_nobody(stack, AccessRule(parse_service("76568"), bind=Principals(everybody=True)))
    monkeypatch.setattr(native_service, "USER_SOCKET_LIMIT", 5)
    listener = reach()
    assert ask(listener, request="bind", service=SERVICE, datagrams=True) == 0
    assert ask(listener, request="listen", backlog=50, datagrams=True) == 0
    clients = [reach() for _ in range(3)]
    for client in clients:
        assert ask(client, request="connect", service=SERVICE, datagrams=True) == 0
    wait_for(lambda: stack.counters()["native_refused_by_limit"] >= 2, "those beyond the limit are refused")
    assert stack.call(lambda: len(stack.stack.native._clients)) <= 5


def test_users_together_leave_room_for_the_trusted_one(
    stack: StackThread, reach: Reach, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_service, "CLIENT_LIMIT", 4)
    monkeypatch.setattr(native_service, "TRUSTED_RESERVE", 2)
    trusted = stack.stack.native.policy
    trust_nobody(stack)
    users = [reach() for _ in range(3)]
    assert answer(users[2]) == errno.EMFILE
    stack.stack.native.policy = trusted
    assert ask(reach(), request="bind", service=SERVICE) == 0


def test_limit_of_services_of_a_user(
    stack: StackThread, reach: Reach, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is registered, and routers take only so many from one host."""
    trust_nobody(stack, AccessRule(parse_service("76568"), bind=Principals(everybody=True)))
    monkeypatch.setattr(native_service, "USER_BOUND_LIMIT", 3)
    sockets = [reach() for _ in range(4)]
    for raw in sockets[:2]:
        assert ask(raw, request="bind", datagrams=True) == 0
    assert ask(sockets[2], request="bind") == 0
    assert ask(sockets[2], request="listen", backlog=1) == 0
    assert ask(sockets[3], request="bind", datagrams=True) == errno.ENOBUFS
    assert ask(sockets[3], request="bind") == errno.ENOBUFS
    sockets[0].close()
    wait_for(lambda: stack.call(lambda: len(stack.stack.native._clients)) == 3, "one is gone")
    assert ask(sockets[3], request="bind", service=SERVICE, datagrams=True) == 0


def test_program_that_reads_no_refusals_keeps_its_datagram_socket(stack: StackThread, reach: Reach) -> None:
    """Who makes a host refuse datagrams must not be able to close a busy program's socket."""
    raw = reach()
    stack.call(lambda: stack.stack.table.add(Rule.drop(parse_service("5"))))
    assert ask(raw, request="bind", service=SERVICE, datagrams=True) == 0
    for _ in range(3000):
        raw.send(datagram(OTHER))
    wait_for(lambda: stack.counters()["native_datagrams_not_read"] > 0, "its queue is full")
    assert answer(raw) == errno.EHOSTUNREACH
    assert stack.call(lambda: len(stack.stack.native._clients)) == 1


def test_limit_of_accepted_connections(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those beyond it are refused to the client, who hears of it, and room comes back with each that ends."""
    monkeypatch.setattr(native_service, "USER_FLOW_LIMIT", 2)
    client, server = lab.host("client"), lab.host("server")
    lab.connect(client, "10.1.0.1/24", server, "10.1.0.2/24")
    with StackThread(client) as near, StackThread(server) as far, ExitStack() as open_sockets:
        trust_nobody(far, AccessRule(parse_service("76568"), bind=Principals(everybody=True)))
        listener = open_sockets.enter_context(far.host.call(lambda: create_server("76568", 50)))
        listener.settimeout(10)

        def connection() -> ServalSocket:
            return open_sockets.enter_context(near.host.call(lambda: create_connection("76568", 10)))

        first, _ = connection(), connection()
        with pytest.raises(ConnectionResetError):
            connection().recv(1)
        assert far.counters()["native_refused_by_limit"] == 1
        first.close()
        for _ in range(2):
            accepted, _ = listener.accept()
            accepted.close()
        wait_for(lambda: far.counters()["unattended_flows"] < 2, "one has ended")
        connection().sendall(b"x")
        accepted, _ = listener.accept()
        with accepted:
            accepted.settimeout(10)
            assert accepted.recv(1) == b"x"
        wait_for(lambda: far.call(lambda: far.stack.half_open) == 0, "nothing counts as not accepted")


class _Capabilities(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


def without_admin() -> None:
    """Take CAP_SYS_ADMIN and CAP_SYS_RESOURCE from the calling thread: the service manager gives the stack neither."""
    libc, header, sets = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0), (_Capabilities * 2)()
    assert libc.capget(header, sets) == 0
    sets[0].effective &= ~(1 << 21 | 1 << 24)
    assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())


def test_too_many_descriptors_in_flight_are_waited_for(stack: StackThread, reach: Reach) -> None:
    """The kernel lets a user have only so many descriptors on their way; the listener's socket is writable meanwhile."""
    listener, raw = reach(), reach()
    assert ask(listener, request="bind", service=SERVICE) == 0
    assert ask(listener, request="listen", backlog=5) == 0
    stack.call(without_admin)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ours, theirs = system.socketpair(system.AF_UNIX, system.SOCK_SEQPACKET)
    with ours, theirs:
        system.send_fds(ours, [b"x"], [ours.fileno()] * 250)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
        try:
            raw.send(json.dumps({"request": "connect", "service": SERVICE}).encode())
            assert answer(raw) == errno.EMFILE
            wait_for(lambda: stack.counters()["native_in_flight_pauses"] > 3, "it is tried again and again")
            pushes = stack.call(lambda: sum("push" in repr(timer) for timer in stack._loop._scheduled))  # type: ignore[attr-defined]
            assert pushes <= 1
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert json.loads(listener.recv(4096))["service"] == SERVICE


@pytest.mark.parametrize("seed", range(3))
def test_whatever_programs_say_in_whatever_order(
    stack: StackThread, reach: Reach, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Many valid and odd requests on some sockets: no defect shows, and nothing is left when they are closed."""
    trust_nobody(stack, AccessRule(parse_service("76568"), bind=Principals(everybody=True)))
    random = Random(seed)
    services = [SERVICE] * 6 + [OTHER, "0" * 64]

    def words(datagrams: bool) -> bytes:
        kind = random.choice(["bind", "listen", "connect", "datagram", "hold"])
        if kind == "hold":
            return HOLD
        if kind == "datagram":
            payload = bytes(random.choice([1, 1400, 60000]))
            return datagram(random.choice(services), payload, random.choice(["0" * 64, SERVICE]))
        fields = {
            "request": kind,
            "service": random.choice([*services, ""]),
            "bits": random.choice([256] * 8 + [0, 32]),
            "backlog": random.choice([0, 1, 5]),
            "destination": random.choice([0] * 6 + [0x7F000001, 1 << 40, 0x0A090909]),
            "datagrams": datagrams if random.random() < 0.9 else not datagrams,
            "hold": random.random() < 0.1,
        }
        return json.dumps(fields).encode()

    sockets = [reach() for _ in range(10)]
    received: list[bytes] = []
    for _ in range(1500):
        at = random.randrange(len(sockets))
        raw = sockets[at]
        raw.setblocking(False)
        try:
            raw.send(words(at % 2 == 0))
            message, descriptors, _, _ = system.recv_fds(raw, 70000, 4)
            received.append(message)
            for descriptor in descriptors:
                os.close(descriptor)
        except BlockingIOError:
            pass
        except OSError:  # it was dropped, as it does not read its answers
            raw.close()
        if raw.fileno() < 0 or random.random() < 0.05:
            raw.close()
            sockets[at] = reach()
    for raw in sockets:
        raw.close()
    native = stack.stack.native
    wait_for(lambda: stack.call(lambda: len(native._clients)) == 0, "the sockets are gone")
    wait_for(lambda: stack.counters()["open_transports"] == 0, "no transport is left", 20)
    wait_for(lambda: stack.flows() == [], "no flow is left", 20)
    counters = stack.counters()
    assert counters["flow_map_entries"] == 0
    assert not stack.call(lambda: set(stack.stack.table.bound()))
    assert stack.call(lambda: (len(native._sockets_of_user), len(native._bound_of_user))) == (0, 0)
    for counted in ("connected", "datagrams_in", "refused_by_policy", "malformed"):
        assert counters[f"native_{counted}"] > 0
    assert not [message for message in received if b"defect" in message]
    assert caplog.records == []
