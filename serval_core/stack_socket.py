"""How do other programs ask the stack of this network namespace? Through the stack socket.

An AF_UNIX stream socket with the abstract name `serval-stack`. Requests and replies are lines of JSON:
`{"request": "flows", "arguments": {}}` is answered by `{"result": ...}` or `{"error": "one sentence"}`; some are
answered by one line per news, until the client goes. This file knows no requests; `stack_socket_server` is the
other end.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from serval_core.errors import ServalError
from serval_core.unix_socket import peer_credentials

STACK_SOCKET_ADDRESS = "\0serval-stack"


class StackNotRunning(ServalError):
    """Nothing listens on the stack socket of this network namespace."""

    def __init__(self) -> None:
        super().__init__(
            "no Serval stack runs in this network namespace: start servald or serval-translator, or ask from the "
            "namespace that it runs in (ip netns exec NAME ...)"
        )


class RequestFailed(ServalError):
    """The stack answered with an error, or did not answer. The message is the sentence to show."""


class Request(msgspec.Struct, forbid_unknown_fields=True):
    """One line of a client."""

    request: str
    arguments: dict[str, Any] = {}


class Reply(msgspec.Struct):
    """One line of the stack."""

    result: Any = None
    error: str | None = None


_decode_reply = msgspec.json.Decoder(Reply).decode


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
                whose = describe_process(peer_credentials(connection).pid)
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
                    f"the stack socket is held by uid {server.uid} ({describe_process(server.pid)}), "
                    "which is neither root nor you: not asking it"
                )
        except BaseException:
            connection.close()
            raise
        return connection


def describe_process(pid: int) -> str:
    """Which process that is, for people; `pid` 0: one of another PID namespace."""
    if pid == 0:
        return "its process is not visible from here"
    try:
        return f"pid {pid}, {Path(f'/proc/{pid}/comm').read_text().strip()}"
    except OSError:
        return f"pid {pid}"


def _request_line(name: str, arguments: dict[str, object]) -> bytes:
    return msgspec.json.encode(Request(name, arguments)) + b"\n"


def _exchange(connection: socket.socket, line: bytes) -> Reply:
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
