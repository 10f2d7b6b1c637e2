"""A real stack on a lab host, driven from a test: its loop runs in a thread that lives in the host's namespace."""

from __future__ import annotations

import asyncio
import hashlib
import os
import queue
import socket
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self, TypeVar

from lab.hosts import Host
from lab.waiting import wait_for
from serval_core.connection import Connection, Listener
from serval_core.dataplane.kernel import DataPlaneSettings
from serval_core.mobility_settings import MobilitySettings
from serval_core.names import parse_address, parse_service
from serval_core.rules import Rule
from serval_core.sal_settings import SalSettings
from serval_core.stack import ServalStack, StackSettings

T = TypeVar("T")
TIMEOUT_S = 20.0


class StackThread:
    """`ServalStack` on `host`; a context manager. Methods may be called from the test's thread."""

    def __init__(
        self,
        host: Host,
        *,
        sal: SalSettings | None = None,
        broadcast: bool = True,
        dataplane: DataPlaneSettings | None = None,
        mobility: MobilitySettings | None = None,
    ) -> None:
        self.host = host
        self.settings = StackSettings(
            sal or SalSettings(),
            dataplane or DataPlaneSettings(),
            broadcast,
            mobility=mobility or MobilitySettings(),
        )
        self._ready: queue.Queue[BaseException | None] = queue.Queue()
        self._stop: asyncio.Event
        self._loop: asyncio.AbstractEventLoop
        self.stack: ServalStack

    def __enter__(self) -> Self:
        def start() -> None:
            # Children of a thread inherit its namespace, so the stack's thread is started from inside.
            self._thread = threading.Thread(
                target=lambda: asyncio.run(self._run()), name=f"stack-{self.host.name}"
            )
            self._thread.start()

        self.host.call(start)
        failure = self._ready.get(timeout=TIMEOUT_S)
        if failure is not None:
            self._thread.join(TIMEOUT_S)
            raise failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()

    async def _run(self) -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        try:
            self.stack = await ServalStack.start(self.settings)
        except BaseException as error:
            self._ready.put(error)
            return
        self._ready.put(None)
        await self._stop.wait()
        await self.stack.stop()

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` on the stack's loop."""

        async def wrapped() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(wrapped(), self._loop).result(TIMEOUT_S)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the stack's loop, to its end."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT_S)

    def forward(self, service: str, address: str) -> None:
        """Add a FORWARD rule."""
        self.call(lambda: self.stack.table.add(Rule.forward(parse_service(service), parse_address(address))))

    def listen(self, service: str, backlog: int = 1024) -> Accepting:
        """Accept flows into a queue."""
        return Accepting(self, service, backlog)

    def begin_connect(self, service: str, destination: str = "") -> queue.Queue[Stream | OSError]:
        """Start to connect; the outcome will be in the queue."""
        outcome: queue.Queue[Stream | OSError] = queue.Queue()

        def connect() -> None:
            self.stack.connect(
                parse_service(service).service_id,
                lambda connection: outcome.put(Stream(self, connection)),
                lambda code, why: outcome.put(OSError(code, why)),
                parse_address(destination) if destination else 0,
            )

        self.call(connect)
        return outcome

    def connect(self, service: str, destination: str = "") -> Stream:
        """Connect; raises OSError with the errno and the reason when that fails."""
        outcome = self.begin_connect(service, destination).get(timeout=TIMEOUT_S)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    def counters(self) -> dict[str, int]:
        return self.call(self.stack.counters)

    def flows(self) -> list[dict[str, object]]:
        return self.call(self.stack.flows)


class Accepting:
    """A listener whose accepted flows are taken with `accept()`."""

    def __init__(self, owner: StackThread, service: str, backlog: int) -> None:
        self._accepted: queue.Queue[Stream] = queue.Queue()
        self._owner = owner
        self.listener: Listener = owner.call(
            lambda: owner.stack.listen(
                parse_service(service),
                lambda connection: self._accepted.put(Stream(owner, connection)),
                backlog,
            )
        )

    def accept(self, timeout_s: float = TIMEOUT_S) -> Stream:
        return self._accepted.get(timeout=timeout_s)

    def waiting(self) -> int:
        return self._accepted.qsize()

    def close(self) -> None:
        self._owner.call(self.listener.close)


class Stream:
    """One end of a flow as a blocking socket (a duplicate of the stack's fd)."""

    def __init__(self, owner: StackThread, connection: Connection) -> None:
        self._owner = owner
        self.connection = connection
        self.ended: queue.Queue[int] = queue.Queue()
        connection.on_ended = self.ended.put
        self.socket = socket.socket(fileno=os.dup(connection.fd))
        self.socket.settimeout(TIMEOUT_S)

    def send_random(self, size_bytes: int, seed: int = 0) -> str:
        """Send that many bytes and end the direction; returns their hash."""
        data = hashlib.shake_128(f"{seed}".encode()).digest(min(size_bytes, 1 << 20))
        data = (data * (size_bytes // max(1, len(data)) + 1))[:size_bytes]
        self.socket.sendall(data)
        self.socket.shutdown(socket.SHUT_WR)
        return hashlib.sha256(data).hexdigest()

    def receive_all(self) -> str:
        """Read to the end; returns the hash of what came."""
        digest = hashlib.sha256()
        while data := self.socket.recv(1 << 18):
            digest.update(data)
        return digest.hexdigest()

    def release(self) -> None:
        self.socket.close()
        self._owner.call(self.connection.release)

    def abort(self) -> None:
        self.socket.close()
        self._owner.call(self.connection.abort)


def send_in_background(stream: Stream, size_bytes: int, seed: int = 0) -> Callable[[], str]:
    """Start sending; the returned function waits for the end and gives the hash."""
    result: queue.Queue[str | BaseException] = queue.Queue()

    def send() -> None:
        try:
            result.put(stream.send_random(size_bytes, seed))
        except BaseException as error:
            result.put(error)

    threading.Thread(target=send, daemon=True).start()

    def wait() -> str:
        outcome = result.get(timeout=60)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return wait


def exchange(client: Stream, server: Stream, up_bytes: int, down_bytes: int) -> None:
    """Both directions at once, compared by hash, then closed."""
    up, down = send_in_background(client, up_bytes, 1), send_in_background(server, down_bytes, 2)
    received_up: list[str] = []
    reader = threading.Thread(target=lambda: received_up.append(server.receive_all()))
    reader.start()
    received_down = client.receive_all()
    reader.join()
    assert received_up == [up()]
    assert received_down == down()
    client.release()
    server.release()


def assert_idle(*stacks: StackThread) -> None:
    """No transport, no map entry, no flow: waits, because the last packets of a close are under way."""
    for stack in stacks:
        wait_for(lambda stack=stack: stack.counters()["open_transports"] == 0, "all transports are closed")
        assert stack.counters()["flow_map_entries"] == 0
        assert stack.flows() == []
