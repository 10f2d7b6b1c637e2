"""What does a native Serval program look like that only sends? `bench.stream send` to a serviceID.

Run as `python -m bench.serval_source ID ADDRESS SECONDS [--framing NAME]`. It embeds a stack of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket

from bench.stream import send
from serval_core.connection import Connection
from serval_core.framing import Framing
from serval_core.names import parse_address, parse_service
from serval_core.sal_settings import SalSettings
from serval_core.stack import ServalStack, StackSettings


async def run(service: str, address: str, duration_s: float, framing: Framing) -> dict[str, float]:
    """Connect, send, and tell what `bench.stream.send` tells."""
    stack = await ServalStack.start(StackSettings(sal=SalSettings(framing=framing)))
    try:
        connected: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        stack.connect(
            parse_service(service).service_id,
            connected.set_result,
            lambda code, why: connected.set_exception(OSError(code, why)),
            parse_address(address),
        )
        connection = await connected
        seen = await asyncio.to_thread(send, lambda: socket.socket(fileno=os.dup(connection.fd)), duration_s)
        connection.release()
        return seen
    finally:
        await stack.stop()


def main() -> None:
    """Parse the arguments, send, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("service")
    parser.add_argument("address")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--framing", type=Framing, default=Framing.AUTO)
    arguments = parser.parse_args()
    outcome = asyncio.run(run(arguments.service, arguments.address, arguments.seconds, arguments.framing))
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
