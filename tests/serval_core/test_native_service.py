"""The stack's side of the native socket: what a program may say, and what becomes of one that says something else."""

from __future__ import annotations

import errno
import json
import os
import socket as system
from collections.abc import Iterator

import pytest

from lab.hosts import Lab
from lab.waiting import wait_for
from serval_core import native_service
from serval_core.native_protocol import DATAGRAM, DATAGRAM_MARK, HOLD, NATIVE_SOCKET_ADDRESS
from serval_core.sockets import create_server
from tests.serval_core.stack_thread import StackThread

SERVICE = "00012b18" + "0" * 56


@pytest.fixture
def stack(lab: Lab) -> Iterator[StackThread]:
    with StackThread(lab.host("alone")) as made:
        yield made


@pytest.fixture
def raw(stack: StackThread) -> Iterator[system.socket]:
    """A connection to the native socket, of a program that speaks for itself."""

    def reach() -> system.socket:
        made = system.socket(system.AF_UNIX, system.SOCK_SEQPACKET)
        made.connect(NATIVE_SOCKET_ADDRESS)
        made.settimeout(10)
        return made

    with stack.host.call(reach) as made:
        yield made


def answer(raw: system.socket, message: bytes) -> int:
    """The errno of the answer."""
    raw.send(message)
    return int(json.loads(raw.recv(4096)).get("errno", 0))


def request(**fields: object) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize(
    "message",
    [
        b"x",
        b"{",
        b"\xff\xfe",
        b"[" * 60000,
        request(),
        request(request="fly"),
        request(request="bind", service="zz"),
        request(request="bind", service="00"),
        request(request="bind", service=SERVICE, bits=257),
        request(request="bind", service=SERVICE, bits=-1),
        request(request="bind", service="0" * 64),
        request(request="connect"),
        request(request="connect", service=SERVICE, destination="x"),
        request(request="bind", service=SERVICE, extra=1),
        request(request="bind", service="0" * 64, datagrams=True),
        os.urandom(65000),
    ],
    ids=lambda message: repr(message[:24]),
)
def test_nonsense_is_refused_and_nothing_else_happens(stack: StackThread, raw: system.socket, message: bytes) -> None:
    if message[:1] == DATAGRAM_MARK:
        message = b"x" + message
    assert answer(raw, message) == errno.EINVAL
    assert answer(raw, request(request="bind", service=SERVICE)) == 0
    assert stack.flows() == []


def test_wrong_order(raw: system.socket) -> None:
    assert answer(raw, request(request="listen", backlog=1)) == errno.EDESTADDRREQ
    assert answer(raw, request(request="listen", backlog=1, datagrams=True)) == errno.EDESTADDRREQ
    assert answer(raw, DATAGRAM.pack(DATAGRAM_MARK, 0, 0, bytes(32), bytes(32)) + b"x") == errno.ENOTCONN
    assert answer(raw, DATAGRAM.pack(DATAGRAM_MARK, 0, 0, bytes(32), bytes(32))) == errno.EINVAL
    raw.send(HOLD)
    assert answer(raw, request(request="bind", service=SERVICE)) == 0
    assert answer(raw, request(request="bind", service=SERVICE)) == errno.EINVAL
    assert answer(raw, request(request="listen", backlog=1)) == 0
    assert answer(raw, request(request="listen", backlog=1)) == errno.EINVAL


def test_program_that_takes_no_answers_is_dropped(stack: StackThread, raw: system.socket) -> None:
    def talk() -> None:
        while True:
            raw.send(b"x")

    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        talk()
    wait_for(lambda: stack.call(lambda: len(stack.stack.native._clients)) == 0, "it is gone")


def test_limit_of_sockets(stack: StackThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_service, "CLIENT_LIMIT", 2)
    held = [stack.host.call(create_server, str(number)) for number in (1, 2)]
    with pytest.raises(OSError, match="its limit is 2") as caught:
        stack.host.call(create_server, "3")
    assert caught.value.errno == errno.EMFILE
    held.pop().close()
    wait_for(lambda: stack.call(lambda: len(stack.stack.native._clients)) == 1, "one is gone")
    held.append(stack.host.call(create_server, "3"))
    for each in held:
        each.close()
    assert stack.counters()["native_refused_by_limit"] == 1
