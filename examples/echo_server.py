"""An echo service for Serval in asyncio. Try it with examples/echo_client.py, on this host or another.

    python examples/echo_server.py 76568
"""

import asyncio
import sys

from serval_core import aio


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Send back whatever comes until the client has ended its direction."""
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()
    await writer.wait_closed()


async def main() -> None:
    server = await aio.start_server(echo, sys.argv[1])
    print("serving", sys.argv[1], flush=True)
    async with server:
        await server.serve_forever()


asyncio.run(main())
