"""How does the stack answer other programs? `StackSocketServer` serves the stack socket (`stack_socket`).

Abstract names belong to a network namespace, may be bound once, and vanish with the process that bound them: so
the name is also the lock that keeps a second stack out. This file knows no requests; whoever runs the stack
registers them.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import errno
import os
import socket
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from serval_core.errors import OurMistake, ServalError
from serval_core.stack_socket import STACK_SOCKET_ADDRESS, Request, describe_process
from serval_core.unix_socket import PeerCredentials, UnixListener, peer_credentials

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

_decode_request = msgspec.json.Decoder(Request).decode


class StackBusy(ServalError):
    """Another stack runs in this network namespace. `pid` is its process, 0 if that is not visible from
    here.
    """

    def __init__(self, pid: int) -> None:
        super().__init__(
            f"another Serval stack runs in this network namespace ({describe_process(pid)}): stop it first, "
            "or start this one in a network namespace of its own"
        )
        self.pid = pid


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
        self._listener: UnixListener | None = None
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
        self._listener = UnixListener(_bind(), self._accepted, self.counters, ACCEPT_PAUSE_S)

    def close(self) -> None:
        """Give the name back and drop all clients. Closing twice is harmless."""
        if self._listener is None:
            return
        self._listener.close()
        self._listener = None
        for client in self._clients:
            client.cancel()

    def _accepted(self, client: socket.socket) -> None:
        if sentence := self._refusal(client):
            with client, contextlib.suppress(OSError):
                client.setblocking(False)
                client.send(_error_line(sentence))
            return
        task = asyncio.get_running_loop().create_task(self._serve(client))
        self._clients.add(task)
        task.add_done_callback(self._clients.discard)

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


def _error_line(sentence: str) -> bytes:
    return msgspec.json.encode({"error": sentence}) + b"\n"


def _result_line(result: object) -> bytes:
    return msgspec.json.encode({"result": result}) + b"\n"
