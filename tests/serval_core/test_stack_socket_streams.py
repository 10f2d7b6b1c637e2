"""Do replies of many items come item by item, and end with either side?"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Iterator
from typing import Any

import pytest

from lab.hosts import Host
from serval_core.errors import OurMistake
from serval_core.stack_socket import (
    RequestFailed,
    StackSocketClient,
)
from serval_core.stack_socket_server import StackSocketServer
from tests.serval_core.stack_sockets import in_host


async def numbers(count: int, done: list[str]) -> AsyncGenerator[object, None]:
    try:
        for number in range(count):
            yield number
        if count == 2:
            raise OurMistake("there are no more than two")
        if count == 3:
            raise ValueError("not a number")
        if count > 3:
            await asyncio.Event().wait()
    finally:
        done.append("closed")


async def next_of(stream: Iterator[Any], count: int) -> list[Any]:
    """What comes next; where the stream ends, None."""
    return await asyncio.to_thread(lambda: [next(stream, None) for _ in range(count)])


def test_a_streaming_reply_has_a_line_for_each_item_until_it_ends(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        done: list[str] = []
        server.register("numbers", lambda arguments: numbers(int(arguments["count"]), done))
        assert await next_of(StackSocketClient().stream("numbers", count=1), 2) == [0, None]
        assert done == ["closed"]
        stream = StackSocketClient().stream("numbers", count=2)
        assert await next_of(stream, 2) == [0, 1]
        with pytest.raises(RequestFailed, match=r"^there are no more than two$"):
            await next_of(stream, 1)

    in_host(host, scenario)


def test_a_defect_in_the_middle_of_a_stream_is_reported_to_both_sides(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        seen: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: seen.append(context))
        server.register("numbers", lambda _: numbers(3, []))
        stream = StackSocketClient().stream("numbers")
        assert await next_of(stream, 3) == [0, 1, 2]
        with pytest.raises(RequestFailed, match="which is a defect of it"):
            await next_of(stream, 1)
        assert [context["message"] for context in seen] == ["a streaming reply failed"]

    in_host(host, scenario)


def test_a_stream_ends_when_its_client_goes(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        done: list[str] = []
        ended = asyncio.Event()

        async def watched() -> AsyncGenerator[object, None]:
            try:
                async for number in numbers(4, done):
                    yield number
            finally:
                ended.set()

        server.register("numbers", lambda _: watched())
        stream = StackSocketClient().stream("numbers")
        assert await next_of(stream, 4) == [0, 1, 2, 3]
        assert isinstance(stream, Generator)
        await asyncio.to_thread(stream.close)
        await asyncio.wait_for(ended.wait(), 10)

    in_host(host, scenario)


def test_a_server_that_closes_ends_its_streams(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        server.register("numbers", lambda _: numbers(4, []))
        stream = StackSocketClient().stream("numbers")
        assert await next_of(stream, 4) == [0, 1, 2, 3]
        server.close()
        assert await next_of(stream, 1) == [None]

    in_host(host, scenario)
