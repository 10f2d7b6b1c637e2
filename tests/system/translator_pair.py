"""Two hosts for tests of the translator's own behaviour: clients beside the forward side, services beside the other.

near: legacy clients and `serval-translator --map`      far: `serval-translator --reverse` and legacy services
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
from collections.abc import Iterator, Sequence
from typing import Any

from lab.chain import TranslatorProcess, kernel_traces
from lab.hosts import Argument, Host, Lab
from lab.waiting import wait_for

TIMEOUT_S = 10.0
PORT = 8080
SERVICE = "76568"


class Pair:
    """The hosts, and the translators that a test has started on them."""

    def __init__(self, lab: Lab) -> None:
        self.directory = lab.directory
        self.near, self.far = lab.host("near"), lab.host("far")
        lab.connect(self.near, "10.9.0.1/24", self.far, "10.9.0.2/24")
        self.running: list[TranslatorProcess] = []
        self._sockets = contextlib.ExitStack()
        self._logs = 0

    # -- translators ----------------------------------------------------------------------------------------------

    def start(
        self, host: Host, *options: Argument, ports: Sequence[int] = (), services: int = 0
    ) -> TranslatorProcess:
        """Start one and wait until it serves."""
        process = self.launch(host, *options)
        process.wait_ready(ports=ports, demux_services=services)
        return process

    def launch(self, host: Host, *options: Argument) -> TranslatorProcess:
        """Start one without waiting."""
        self._logs += 1
        process = TranslatorProcess(host, options, self.directory / f"{host.name}.{self._logs}.log")
        self.running.append(process)
        return process

    def forward(self, *options: Argument) -> TranslatorProcess:
        """The forward side: PORT leads to SERVICE, which the far host may have."""
        rule = ("--service", f"{SERVICE}=10.9.0.2")
        return self.start(self.near, "--map", f"{PORT}={SERVICE}", *rule, *options, ports=[PORT])

    def reverse(self, targets: str = "127.0.0.1:80", *options: Argument) -> TranslatorProcess:
        """The reverse side: SERVICE leads to `targets` on the far host."""
        return self.start(self.far, "--reverse", f"{SERVICE}={targets}", *options, services=1)

    def end(self) -> None:
        """End what the test left: sockets, then translators. Whatever ran must have removed all its traces."""
        self._sockets.close()
        logs = []
        for process in self.running:
            if process.process.poll() is None:
                process.process.send_signal(2)
                process.process.wait(TIMEOUT_S)
            logs.append(process.log())
        self.running.clear()
        for host in (self.near, self.far):
            assert kernel_traces(host) == [], "\n".join(logs)
        for log in logs:
            assert "Traceback" not in log, log
            assert "Exception" not in log, log

    # -- sockets --------------------------------------------------------------------------------------------------

    def keep(self, opened: socket.socket) -> socket.socket:
        """Close it when the test ends, if the test has not."""
        return self._sockets.enter_context(opened)

    def listen(self, port: int = 80, host: Host | None = None) -> socket.socket:
        """A legacy service on the far host."""
        listener = (host or self.far).call(socket.create_server, ("127.0.0.1", port))
        listener.settimeout(TIMEOUT_S)
        return self.keep(listener)

    def accept(self, listener: socket.socket) -> socket.socket:
        """The service's end of the next connection."""
        connection, _ = listener.accept()
        connection.settimeout(TIMEOUT_S)
        return self.keep(connection)

    def dial(self, port: int = PORT, address: str = "127.0.0.1") -> socket.socket:
        """A legacy client on the near host."""
        return self.keep(self.near.call(socket.create_connection, (address, port), TIMEOUT_S))

    def talk(self, listener: socket.socket, port: int = PORT) -> tuple[socket.socket, socket.socket]:
        """A client's connection through both translators and the service's end of it; bytes have gone both ways."""
        client = self.dial(port)
        server = self.accept(listener)
        exchange(client, server)
        return client, server

    def dial_in_vain(self, port: int = PORT) -> str:
        """What a client sees that cannot be served: "reset" or "close". The reset may come while it still connects."""
        try:
            return ending(self.dial(port))
        except ConnectionResetError:
            return "reset"


def ending(connection: socket.socket) -> str:
    """Read to the end: "reset" or "close"."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        return "reset"
    return "close"


def exchange(client: socket.socket, server: socket.socket, rounds: int = 1) -> None:
    """Bytes go both ways."""
    for number in range(rounds):
        request, answer = b"request %d" % number, b"answer %d" % number
        client.sendall(request)
        assert server.recv(len(request), socket.MSG_WAITALL) == request
        server.sendall(answer)
        assert client.recv(len(answer), socket.MSG_WAITALL) == answer


def is_silent(connection: socket.socket) -> bool:
    """Nothing, no end and no reset either, is there to be read now."""
    return not select.select([connection], [], [], 0)[0]


def wait_counter(side: TranslatorProcess, name: str, value: int) -> None:
    """Until the translator's counter has this value."""
    wait_for(lambda: side.ask("translator_counters")[name] == value, f"{name} to be {value}")


def only_map(side: TranslatorProcess) -> dict[str, Any]:
    """The one map of a translator, as `show maps --json` has it."""
    (found,) = side.ask("maps")
    assert isinstance(found, dict)
    return found


@contextlib.contextmanager
def silent_service(pair: Pair, port: int) -> Iterator[None]:
    """A legacy service on the far host that answers no connection attempt: its accept queue is full."""

    def occupy() -> list[socket.socket]:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        fillers = [socket.socket(), socket.socket()]
        for filler in fillers:
            filler.setblocking(False)
            assert filler.connect_ex(("127.0.0.1", port)) in (0, errno.EINPROGRESS)
        return [listener, *fillers]

    opened = pair.far.call(occupy)
    yield
    for each in opened:
        each.close()
