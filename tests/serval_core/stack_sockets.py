"""How do the tests of the stack socket serve one, and talk to it?"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from typing import Any

from lab.hosts import Host
from serval_core.errors import OurMistake
from serval_core.stack_socket import (
    STACK_SOCKET_ADDRESS,
    StackSocketClient,
)
from serval_core.stack_socket_server import StackSocketServer

SERVER_PROGRAM = """
import asyncio, os, sys
from serval_core.stack_socket_server import StackSocketServer
os.setuid(int(sys.argv[1]))
async def main():
    server = StackSocketServer()
    server.register("pid", lambda arguments: os.getpid())
    server.open()
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


def echo(arguments: dict[str, Any]) -> object:
    """The handler of "echo"."""
    return arguments


def mistake(arguments: dict[str, Any]) -> object:
    """The handler of "mistake"."""
    raise OurMistake("there is no rule for exactly 76568")


def in_host(host: Host, scenario: Callable[[StackSocketServer], Awaitable[None]]) -> StackSocketServer:
    """Run a scenario beside an open server, on one loop in the host's namespace."""
    server = StackSocketServer()
    server.register("echo", echo)
    server.register("mistake", mistake)

    async def main() -> None:
        server.open()
        try:
            async with asyncio.timeout(20):
                await scenario(server)
        finally:
            server.close()

    host.call(asyncio.run, main())
    return server


async def ask(name: str, **arguments: object) -> Any:
    """The synchronous client in a thread; threads inherit the namespace of the thread that starts them."""
    return await asyncio.to_thread(StackSocketClient().request, name, **arguments)


async def connect() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A client of the stack socket of this namespace."""
    return await asyncio.open_unix_connection(STACK_SOCKET_ADDRESS)


async def talk(sent: bytes) -> bytes:
    """Send bytes, end our side, and read all that comes back. A server that closes early is no error here."""
    reader, writer = await connect()
    try:
        writer.write(sent)
        writer.write_eof()
        return await reader.read()
    finally:
        writer.close()


def start_server(host: Host, uid: int = 0) -> subprocess.Popen[str]:
    """A process with a stack socket, open when this returns."""
    server = host.popen([sys.executable, "-c", SERVER_PROGRAM, uid], stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    return server
