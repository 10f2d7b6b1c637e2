"""What does a native Serval program look like that only receives? The sink of `bench.stream` on a serviceID.

Run as `python -m bench.serval_sink ID [--framing NAME]`. It embeds a stack of its own, as any native program may.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import threading

from bench.stream import drain
from serval_core.connection import Connection
from serval_core.framing import Framing
from serval_core.names import parse_service
from serval_core.sal_settings import SalSettings
from serval_core.stack import ServalStack, StackSettings


def receive(connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
    """Drain one flow in this thread, then hand it back to the stack on the loop's."""
    # The stack owns the descriptor and keeps it nonblocking, which the timeout that `drain` sets does not change.
    borrowed = socket.socket(fileno=os.dup(connection.fd))
    try:
        drain(borrowed)
    except OSError:
        loop.call_soon_threadsafe(connection.abort)
    else:
        loop.call_soon_threadsafe(connection.release)


async def serve(service: str, framing: Framing) -> None:
    """Listen until SIGTERM or SIGINT."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    stack = await ServalStack.start(StackSettings(sal=SalSettings(framing=framing)))
    try:
        stack.listen(
            parse_service(service),
            lambda connection: threading.Thread(target=receive, args=(connection, loop), daemon=True).start(),
        )
        await stop.wait()
    finally:
        await stack.stop()


def main() -> None:
    """Parse the serviceID and serve it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("service")
    parser.add_argument("--framing", type=Framing, default=Framing.AUTO)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.service, arguments.framing))


if __name__ == "__main__":
    main()
