"""Two hosts with a stack each, and native programs on them: in this process (`Host.call`) or of their own (`run_program`)."""

from __future__ import annotations

import socket as system
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from subprocess import PIPE, Popen
from typing import Any, TypeVar

from lab.hosts import Host
from lab.waiting import wait_for
from serval_core import sockets
from serval_core.sockets import ServalSocket
from tests.serval_core.stack_thread import StackThread

S = TypeVar("S", bound=system.socket)
T = TypeVar("T")
SERVICE = "76568"
TIMEOUT_S = 20.0


class NativeHosts:
    """A client and a server host with a wire between them. Sockets made through this class are closed with it."""

    def __init__(self, near: StackThread, far: StackThread) -> None:
        self.near = near
        self.far = far
        self._sockets: list[system.socket] = []

    def on(self, stack: StackThread, make: Callable[[], S]) -> S:
        """Make a socket on a host; it may be used from anywhere."""
        made = stack.host.call(make)
        made.settimeout(TIMEOUT_S)
        self._sockets.append(made)
        return made

    def socket(self) -> ServalSocket:
        """An unconnected socket of the client's."""
        return self.on(self.near, ServalSocket)

    def server(self, service: str = SERVICE, backlog: int = 128) -> ServalSocket:
        """A listening socket of the server's."""
        return self.on(self.far, lambda: sockets.create_server(service, backlog))

    def connect(self, address: Any = SERVICE) -> ServalSocket:
        """A connected socket of the client's."""
        return self.on(self.near, lambda: sockets.create_connection(address, TIMEOUT_S))

    def pair(self) -> tuple[ServalSocket, ServalSocket]:
        """Both ends of a connection."""
        server = self.server()
        near = self.connect()
        far, _ = server.accept()
        far.settimeout(TIMEOUT_S)
        self._sockets.append(far)
        server.close()
        return near, far

    def close(self) -> None:
        for each in self._sockets:
            each.close()

    def assert_idle(self) -> None:
        """No flow, no transport, no map entry, no client of the native socket is left on either host."""
        for stack in (self.near, self.far):
            wait_for(lambda stack=stack: stack.counters()["open_transports"] == 0, "all transports are closed")
            assert stack.counters()["flow_map_entries"] == 0
            assert stack.counters()["unattended_flows"] == 0
            assert stack.flows() == []


def receive_all(connection: system.socket) -> bytes:
    """Read to the end."""
    received = bytearray()
    while data := connection.recv(1 << 16):
        received += data
    return bytes(received)


@contextmanager
def program(host: Host, source: str, *arguments: object, **options: Any) -> Iterator[Popen[str]]:
    """A Python program on a host, killed at the end if it still runs; its standard output can be read."""
    running = host.popen([sys.executable, "-c", source, *map(str, arguments)], stdout=PIPE, **options)
    try:
        yield running
    finally:
        running.kill()
        running.wait()
        assert running.stdout is not None
        running.stdout.close()


def in_thread(function: Callable[[], T]) -> Callable[[], T]:
    """Run it beside the test; the returned function waits for its result."""
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> T:
        thread.join(60)
        if failure:
            raise failure[0]
        return outcome[0]

    return result
