"""How does an asyncio program use Serval? With streams, as `asyncio.open_connection` and `asyncio.start_server` give them.

    reader, writer = await aio.open_connection("76568")
    server = await aio.start_server(handle, "76568")

The streams are those of asyncio: once connected, a Serval socket is a kernel TCP socket. TLS needs `server_hostname` on the
client's side, since there is no host name to take it from.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket as system
from collections.abc import Awaitable, Callable
from typing import Any

from serval_core import sockets
from serval_core.datagram_sockets import Received, ServalDatagramSocket
from serval_core.sockets import ServalSocket

OnClient = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]


async def connect(address: Any) -> ServalSocket:
    """A connected socket that does not block. OSError as `ServalSocket.connect`; cancelling gives up."""
    connection = ServalSocket()
    try:
        connection.setblocking(False)
        code = connection.connect_ex(address)
        if code == errno.EINPROGRESS:
            await _writable(connection)
            code = connection.getsockopt(system.SOL_SOCKET, system.SO_ERROR)
        if code:
            raise OSError(code, connection.failure or os.strerror(code))
    except BaseException:
        connection.close()
        raise
    return connection


async def open_connection(address: Any, **options: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Streams to an instance of a service. `options` are those of `asyncio.open_connection` (`ssl`, `limit` ...)."""
    connection = await connect(address)
    try:
        return await asyncio.open_connection(sock=connection, **options)
    except BaseException:
        connection.close()
        raise


async def start_server(
    on_client: OnClient, address: Any, *, backlog: int = sockets.DEFAULT_BACKLOG, **options: Any
) -> asyncio.Server:
    """Serve a serviceID or prefix. `options` are those of `asyncio.start_server` (`ssl`, `limit`, `start_serving` ...)."""
    listener = sockets.create_server(address, backlog)
    try:
        return await asyncio.start_server(on_client, sock=listener, backlog=backlog, **options)
    except BaseException:
        listener.close()
        raise


async def receive(endpoint: ServalDatagramSocket) -> Received:
    """The next datagram of a socket that does not block; goes on waiting when the stack ends and another one comes.

    A reader that a program adds to the loop itself knows the descriptor of one stack only.
    """
    loop = asyncio.get_running_loop()
    while True:
        try:
            return endpoint.receive()
        except BlockingIOError:
            readable, fd = asyncio.Event(), endpoint.fileno()
            loop.add_reader(fd, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(fd)


async def _writable(connection: ServalSocket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    fd = connection.fileno()
    loop.add_writer(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(fd)
