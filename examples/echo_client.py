"""Sends its standard input to an echo service and prints what comes back.

    echo hello | python examples/echo_client.py 76568
"""

import asyncio
import sys

from serval_core import aio


async def main() -> None:
    reader, writer = await aio.open_connection(sys.argv[1])
    writer.write(sys.stdin.buffer.read())
    writer.write_eof()
    sys.stdout.buffer.write(await reader.read())
    writer.close()


asyncio.run(main())
