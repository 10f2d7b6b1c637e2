"""Does a network namespace have one stack at a time, and is the name free when that has gone?"""

from __future__ import annotations

import asyncio
import socket

import pytest

from lab.hosts import Host, Lab
from serval_core.errors import OurMistake
from serval_core.stack_socket import (
    STACK_SOCKET_ADDRESS,
    StackNotRunning,
    StackSocketClient,
)
from serval_core.stack_socket_server import StackBusy, StackSocketServer
from tests.serval_core.stack_sockets import ask, connect, in_host, start_server


def test_a_second_stack_is_told_which_process_has_the_name(host: Host) -> None:
    holder = start_server(host)

    async def second() -> None:
        StackSocketServer().open()

    with pytest.raises(StackBusy) as caught:
        host.call(asyncio.run, second())
    assert caught.value.pid == holder.pid
    assert f"(pid {holder.pid}, python" in str(caught.value)
    assert host.call(StackSocketClient().request, "pid") == holder.pid


def test_another_namespace_is_free(host: Host, lab: Lab) -> None:
    holder = start_server(host)
    other = start_server(lab.host("other"))
    assert host.call(StackSocketClient().request, "pid") == holder.pid
    assert other.pid != holder.pid


def test_a_killed_stack_leaves_the_name_free(host: Host) -> None:
    holder = start_server(host)
    holder.kill()
    holder.wait()
    with pytest.raises(StackNotRunning, match="no Serval stack runs in this network namespace"):
        host.call(StackSocketClient().request, "pid")
    again = start_server(host)
    assert host.call(StackSocketClient().request, "pid") == again.pid


def test_a_name_bound_by_somebody_who_does_not_listen_is_busy(host: Host) -> None:
    def squat() -> None:
        with socket.socket(socket.AF_UNIX) as squatter:
            squatter.bind(STACK_SOCKET_ADDRESS)

            async def second() -> None:
                StackSocketServer().open()

            with pytest.raises(StackBusy, match="its process is not visible from here") as caught:
                asyncio.run(second())
            assert caught.value.pid == 0

    host.call(squat)


def test_a_closed_server_can_be_followed_at_once_while_clients_are_connected(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        reader, writer = await connect()
        writer.write(b'{"request": "echo"}\n')
        await reader.readline()
        server.close()
        successor = StackSocketServer()
        successor.register("who", lambda arguments: "successor")
        successor.open()
        assert await ask("who") == "successor"
        assert await reader.read() == b""
        writer.close()
        successor.close()
        successor.close()

    in_host(host, scenario)


def test_opening_twice_is_a_mistake(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        with pytest.raises(OurMistake, match="already open"):
            server.open()

    in_host(host, scenario)
