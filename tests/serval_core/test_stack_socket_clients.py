"""Who is served by a stack socket, and what can clients that misbehave do to the others?"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import sys

import pytest

from lab.hosts import Host
from serval_core import stack_socket_server
from serval_core.stack_socket import (
    STACK_SOCKET_ADDRESS,
    RequestFailed,
)
from serval_core.stack_socket_server import CLIENT_LIMIT, StackSocketServer
from tests.serval_core.stack_sockets import ask, connect, in_host, start_server

NOBODY = 65534
SOMEBODY = 65533

CLIENT_PROGRAM = """
import os, sys
from serval_core.errors import ServalError
from serval_core.stack_socket import StackSocketClient
os.setuid(int(sys.argv[1]))
try:
    print(StackSocketClient().request("pid"))
except ServalError as error:
    print(type(error).__name__, error)
"""


# Many clients, and clients that misbehave


def test_many_clients_at_once_get_their_own_answers(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        connections = [await connect() for _ in range(CLIENT_LIMIT)]
        for number, (_, writer) in enumerate(connections):
            writer.write(b'{"request": "echo", "arguments": {"n": %d}}\n' % number)
        for number, (reader, _) in enumerate(connections):
            assert json.loads(await reader.readline()) == {"result": {"n": number}}
        for _, writer in connections:
            writer.close()

    in_host(host, scenario)


def test_clients_beyond_the_limit_are_told_so_and_leaving_makes_room(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        connections = [await connect() for _ in range(CLIENT_LIMIT)]
        for reader, writer in connections:
            writer.write(b'{"request": "echo"}\n')
            await reader.readline()
        with pytest.raises(RequestFailed, match=f"already has {CLIENT_LIMIT} clients"):
            await ask("echo")
        assert server.counters["refused_clients"] == 1
        reader, writer = connections[0]
        writer.write_eof()
        assert await reader.read() == b""
        assert await ask("echo") == {}
        for _, writer in connections:
            writer.close()

    in_host(host, scenario)


def test_a_silent_client_is_dropped_after_its_time(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_socket_server, "CLIENT_TIMEOUT_S", 0.05)

    async def scenario(server: StackSocketServer) -> None:
        reader, writer = await connect()
        assert await reader.read() == b""
        writer.close()

    in_host(host, scenario)


def test_a_client_that_does_not_read_does_not_hold_its_place(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_socket_server, "CLIENT_TIMEOUT_S", 0.05)

    async def scenario(server: StackSocketServer) -> None:
        server.register("big", lambda arguments: "x" * 20_000_000)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(STACK_SOCKET_ADDRESS)
            client.sendall(b'{"request": "big"}\n')
            while server.counters["requests"] == 0:
                await asyncio.sleep(0)
            (task,) = server._clients
            await asyncio.wait([task])
            assert task.exception() is None
        monkeypatch.undo()
        assert await ask("echo") == {}

    in_host(host, scenario)


def test_clients_that_vanish_leave_nothing_behind(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        open_before = len(os.listdir("/proc/self/fd"))
        for number in range(1, 201):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(STACK_SOCKET_ADDRESS)
                client.sendall(b'{"request": "echo"}\n{"request": "ec')
            while server.counters["requests"] < number:
                await asyncio.sleep(0)
        while server._clients:
            await asyncio.sleep(0)
        assert len(os.listdir("/proc/self/fd")) == open_before

    in_host(host, scenario)


def test_running_out_of_descriptors_only_delays_clients(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack_socket_server, "ACCEPT_PAUSE_S", 0.01)

    async def scenario(server: StackSocketServer) -> None:
        client = socket.socket(socket.AF_UNIX)
        client.setblocking(False)
        held: list[socket.socket] = []
        with client:
            try:
                while True:
                    held.append(socket.socket(socket.AF_UNIX))
            except OSError:
                client.connect(STACK_SOCKET_ADDRESS)
                client.send(b'{"request": "echo"}\n')
                while server.counters["accept_failures"] < 2:
                    await asyncio.sleep(0.001)
            finally:
                for each in held:
                    each.close()
            loop = asyncio.get_running_loop()
            assert await loop.sock_recv(client, 100) == b'{"result":{}}\n'

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        in_host(host, scenario)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# Who is served


def ask_as(host: Host, uid: int) -> str:
    return str(host.run([sys.executable, "-c", CLIENT_PROGRAM, uid]).stdout).strip()


def test_an_unprivileged_user_is_refused_by_a_stack_of_root(host: Host) -> None:
    server = start_server(host)
    assert ask_as(host, NOBODY) == (
        f"RequestFailed the stack socket serves root and uid 0 only, not uid {NOBODY}"
    )
    assert ask_as(host, 0) == str(server.pid)


def test_a_stack_of_a_user_serves_that_user_and_root(host: Host) -> None:
    server = start_server(host, NOBODY)
    assert ask_as(host, NOBODY) == str(server.pid)
    assert ask_as(host, 0) == str(server.pid)


def test_a_name_held_by_a_stranger_is_not_asked(host: Host) -> None:
    server = start_server(host, NOBODY)
    answer = ask_as(host, SOMEBODY)
    assert answer.startswith(f"RequestFailed the stack socket is held by uid {NOBODY} (pid {server.pid}")
    assert answer.endswith("which is neither root nor you: not asking it")
