"""How do other programs talk to the stack of this network namespace? Through the stack socket.

An AF_UNIX stream socket with the abstract name `serval-stack`. Abstract names belong to a network namespace,
may be bound once, and vanish with the process that bound them: so the name is also the lock that keeps a
second stack out. Requests and replies are lines of JSON: `{"request": "flows", "arguments": {}}` is answered
by `{"result": ...}` or `{"error": "one sentence"}`; some are answered by one line per news, until the client
goes. This file knows no requests; whoever runs the stack registers them.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import errno
import os
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from serval_core.errors import OurMistake, ServalError

STACK_SOCKET_ADDRESS = "\0serval-stack"
REQUEST_LIMIT_BYTES = 65536
CLIENT_LIMIT = 64
CLIENT_TIMEOUT_S = 60.0
LISTEN_BACKLOG = 64
ACCEPT_PAUSE_S = 1.0
BIND_ATTEMPTS = 3

Handler = Callable[[dict[str, Any]], object]
"""Takes the request's arguments, returns what msgspec can turn into JSON, or an asynchronous generator of such
things: one line each. OurMistake becomes the error reply.
"""

_CREDENTIALS = struct.Struct("iII")
_OUT_OF_RESOURCES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class StackBusy(ServalError):
    """Another stack runs in this network namespace. `pid` is its process, 0 if that is not visible from
    here.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(
            f"another Serval stack runs in this network namespace ({_describe_process(pid)}): stop it first, "
            "or start this one in a network namespace of its own"
        )
        self.pid = pid


class StackNotRunning(ServalError):
    """Nothing listens on the stack socket of this network namespace."""

    def __init__(self) -> None:
        super().__init__(
            "no Serval stack runs in this network namespace: start servald or serval-translator, or ask from the "
            "namespace that it runs in (ip netns exec NAME ...)"
        )


class RequestFailed(ServalError):
    """The stack answered with an error, or did not answer. The message is the sentence to show."""


class PeerCredentials(NamedTuple):
    """Who is at the other end of a Unix socket, as the kernel knows it."""

    pid: int
    uid: int
    gid: int


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    request: str
    arguments: dict[str, Any] = {}


class _Reply(msgspec.Struct):
    result: Any = None
    error: str | None = None


_decode_request = msgspec.json.Decoder(_Request).decode
_decode_reply = msgspec.json.Decoder(_Reply).decode


class StackSocketServer:
    """Serves the stack socket on the asyncio loop that `open` is called on.

    Only root and the server's own user are served. `counters` says what was served and what was refused and
    why.
    """

    def __init__(self) -> None:
        self.counters: dict[str, int] = {
            "requests": 0,
            "failed_requests": 0,
            "malformed_requests": 0,
            "refused_users": 0,
            "refused_clients": 0,
            "accept_failures": 0,
        }
        self._handlers: dict[str, Handler] = {}
        self._listener: socket.socket | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._user = os.geteuid()

    def register(self, name: str, handler: Handler) -> None:
        """Answer requests called `name` with `handler`. It runs on the loop's thread and must not block."""
        if name in self._handlers:
            raise OurMistake(f"the stack socket already has a handler for {name}")
        self._handlers[name] = handler

    def unregister(self, name: str) -> None:
        """Answer requests called `name` no more."""
        del self._handlers[name]

    def open(self) -> None:
        """Take the name and begin to serve. StackBusy if another process of this network namespace has it."""
        if self._listener is not None:
            raise OurMistake("the stack socket is already open")
        loop = asyncio.get_running_loop()
        self._listener = _bind()
        loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Give the name back and drop all clients. Closing twice is harmless."""
        if self._listener is None:
            return
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        self._listener = None
        for client in self._clients:
            client.cancel()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            # The connection stays queued, and the loop would call again at once: give others time to free
            # something.
            self.counters["accept_failures"] += 1
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(ACCEPT_PAUSE_S, self._resume_accepting, self._listener)
            return
        if sentence := self._refusal(client):
            with client, contextlib.suppress(OSError):
                client.setblocking(False)
                client.send(_error_line(sentence))
            return
        task = asyncio.get_running_loop().create_task(self._serve(client))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

    def _resume_accepting(self, listener: socket.socket) -> None:
        if listener is self._listener:
            asyncio.get_running_loop().add_reader(listener, self._accept)

    def _refusal(self, client: socket.socket) -> str | None:
        peer = peer_credentials(client)
        if peer.uid not in (0, self._user):
            self.counters["refused_users"] += 1
            return f"the stack socket serves root and uid {self._user} only, not uid {peer.uid}"
        if len(self._clients) >= CLIENT_LIMIT:
            self.counters["refused_clients"] += 1
            return f"the stack socket already has {CLIENT_LIMIT} clients, which is its limit: try again later"
        return None

    async def _serve(self, client: socket.socket) -> None:
        reader, writer = await asyncio.open_unix_connection(sock=client, limit=REQUEST_LIMIT_BYTES)
        try:
            while True:
                async with asyncio.timeout(CLIENT_TIMEOUT_S):
                    reply, more = await self._next_reply(reader)
                    if isinstance(reply, bytes):
                        writer.write(reply)
                        await writer.drain()
                if isinstance(reply, AsyncGenerator):
                    await self._stream(reply, reader, writer)
                    break
                if not more:
                    break
            writer.close()
            async with asyncio.timeout(CLIENT_TIMEOUT_S):
                await writer.wait_closed()
        except (TimeoutError, ConnectionError):
            return  # The client went away or stopped reading; it is its own loss.
        finally:
            writer.transport.abort()

    async def _stream(
        self,
        items: AsyncGenerator[object, None],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Send what comes until nothing more does, or the client closes its side or says anything more."""
        closed = asyncio.ensure_future(reader.read(1))
        try:
            while True:
                coming = asyncio.ensure_future(anext(items))
                try:
                    await asyncio.wait((closed, coming), return_when=asyncio.FIRST_COMPLETED)
                    if closed.done():
                        return
                    line = _result_line(coming.result())
                except StopAsyncIteration:
                    return
                except Exception as error:
                    writer.write(self._failed_by(error, "a streaming reply"))
                    return
                finally:
                    coming.cancel()
                    await asyncio.wait((coming,))
                    if not coming.cancelled():
                        coming.exception()  # looked at, so that the loop does not complain
                writer.write(line)
                async with asyncio.timeout(CLIENT_TIMEOUT_S):
                    await writer.drain()
        finally:
            closed.cancel()
            await items.aclose()

    async def _next_reply(
        self, reader: asyncio.StreamReader
    ) -> tuple[bytes | AsyncGenerator[object, None] | None, bool]:
        """The answer to the next request (None: there was none) and whether to go on after it."""
        try:
            line = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            return (self._malformed("it does not end with a newline") if error.partial else None), False
        except asyncio.LimitOverrunError:
            return self._malformed(f"it is longer than {REQUEST_LIMIT_BYTES} bytes"), False
        return self._answer(line), True

    def _malformed(self, what: str) -> bytes:
        self.counters["malformed_requests"] += 1
        return _error_line(f"this is no request to the stack: {what}")

    def _answer(self, line: bytes) -> bytes | AsyncGenerator[object, None]:
        try:
            request = _decode_request(line)
        except msgspec.DecodeError as error:
            return self._malformed(str(error))
        except (UnicodeDecodeError, RecursionError):
            return self._malformed("it is not JSON in UTF-8 of reasonable depth")
        self.counters["requests"] += 1
        handler = self._handlers.get(request.request)
        if handler is None:
            return self._failed(self._unknown(request.request))
        try:
            result = handler(request.arguments)
            return result if isinstance(result, AsyncGenerator) else _result_line(result)
        except Exception as error:
            return self._failed_by(error, f"stack socket request {request.request}")

    def _failed_by(self, error: Exception, what: str) -> bytes:
        if isinstance(error, ServalError):
            return self._failed(str(error))
        # A defect of the handler must neither end the stack nor stay hidden.
        asyncio.get_running_loop().call_exception_handler({"message": f"{what} failed", "exception": error})
        return self._failed(f"the stack failed at this request, which is a defect of it: {error!r}")

    def _failed(self, sentence: str) -> bytes:
        self.counters["failed_requests"] += 1
        return _error_line(sentence)

    def _unknown(self, name: str) -> str:
        nearest = difflib.get_close_matches(name, self._handlers, n=1)
        known = f"did you mean {nearest[0]}?" if nearest else f"it knows {', '.join(sorted(self._handlers))}"
        return f'the stack knows no request "{name[:64]}": {known}'


class StackSocketClient:
    """Asks the stack of this network namespace. Each request is a connection of its own: nothing to close."""

    def __init__(self, timeout_s: float = 10.0) -> None:
        self.timeout_s = timeout_s

    def request(self, name: str, /, **arguments: object) -> Any:
        """The stack's result for request `name`, as plain JSON data.

        StackNotRunning if there is no stack; RequestFailed with the stack's own sentence if it refused, with
        ours if it did not answer within `timeout_s`, or is run by a user who is neither root nor us.
        """
        with self._connect() as connection:
            try:
                reply = _exchange(connection, _request_line(name, arguments))
            except TimeoutError:
                whose = _describe_process(peer_credentials(connection).pid)
                limit = f"{self.timeout_s:g} s"
                raise RequestFailed(f"the stack ({whose}) did not answer within {limit}") from None
        if reply.error is not None:
            raise RequestFailed(reply.error)
        return reply.result

    def stream(self, name: str, /, **arguments: object) -> Iterator[Any]:
        """The results of a request that is answered by many lines, as they come, until the stack ends or the
        iterator is closed. Waits without limit; errors as in `request`.
        """
        with self._connect() as connection:
            connection.sendall(_request_line(name, arguments))
            connection.settimeout(None)
            with connection.makefile("rb") as lines:
                for line in lines:
                    reply = _decode_reply(line)
                    if reply.error is not None:
                        raise RequestFailed(reply.error)
                    yield reply.result

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(self.timeout_s)
            try:
                connection.connect(STACK_SOCKET_ADDRESS)
            except ConnectionRefusedError:
                raise StackNotRunning from None
            except (TimeoutError, BlockingIOError):
                raise RequestFailed("the stack has too many clients waiting: try again") from None
            server = peer_credentials(connection)
            # Anyone may take the name while no stack runs. Root trusts the user that it runs the stack as.
            if server.uid != 0 and os.geteuid() not in (0, server.uid):
                raise RequestFailed(
                    f"the stack socket is held by uid {server.uid} ({_describe_process(server.pid)}), "
                    "which is neither root nor you: not asking it"
                )
        except BaseException:
            connection.close()
            raise
        return connection


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Who is at the other end of a connected Unix socket; pid 0 if it is in another PID namespace."""
    option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return PeerCredentials(*_CREDENTIALS.unpack(option))


def _bind() -> socket.socket:
    """A listening socket with the stack's name."""
    for _ in range(BIND_ATTEMPTS):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listener.bind(STACK_SOCKET_ADDRESS)
            listener.listen(LISTEN_BACKLOG)
        except OSError as error:
            listener.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return listener
        holder = _holder()
        if holder is not None:
            raise StackBusy(holder.pid)
    raise StackBusy(0)


def _holder() -> PeerCredentials | None:
    """Who listens on the stack socket; None if nobody does any more (or not yet)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(STACK_SOCKET_ADDRESS)
        except ConnectionRefusedError:
            return None
        except BlockingIOError:  # There is a listener, with a full queue.
            return PeerCredentials(0, 0, 0)
        return peer_credentials(probe)


def _describe_process(pid: int) -> str:
    if pid == 0:
        return "its process is not visible from here"
    try:
        return f"pid {pid}, {Path(f'/proc/{pid}/comm').read_text().strip()}"
    except OSError:
        return f"pid {pid}"


def _error_line(sentence: str) -> bytes:
    return msgspec.json.encode({"error": sentence}) + b"\n"


def _result_line(result: object) -> bytes:
    return msgspec.json.encode({"result": result}) + b"\n"


def _request_line(name: str, arguments: dict[str, object]) -> bytes:
    return msgspec.json.encode(_Request(name, arguments)) + b"\n"


def _exchange(connection: socket.socket, line: bytes) -> _Reply:
    # A server that refuses us answers and closes before it has read the line: its sentence is still there to
    # be read.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(line)
    received = bytearray()
    while not received.endswith(b"\n"):
        try:
            chunk = connection.recv(1 << 18)
        except ConnectionResetError:
            chunk = b""
        if not chunk:
            raise RequestFailed("the stack went away before it had answered")
        received += chunk
    return _decode_reply(received)
