"""The stack socket for real. Abstract names are per network namespace, so every test has one of its own."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from typing import Any

import pytest

from lab.hosts import Host, Lab
from serval_core import stack_socket
from serval_core.errors import OurMistake
from serval_core.stack_socket import (
    CLIENT_LIMIT,
    REQUEST_LIMIT_BYTES,
    STACK_SOCKET_ADDRESS,
    RequestFailed,
    StackBusy,
    StackNotRunning,
    StackSocketClient,
    StackSocketServer,
)

NOBODY = 65534
SOMEBODY = 65533

SERVER_PROGRAM = """
import asyncio, os, sys
from serval_core.stack_socket import StackSocketServer
os.setuid(int(sys.argv[1]))
async def main():
    server = StackSocketServer()
    server.register("pid", lambda arguments: os.getpid())
    server.open()
    print("ready", flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""

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


@pytest.fixture
def host(lab: Lab) -> Host:
    return lab.host("stack")


def echo(arguments: dict[str, Any]) -> object:
    return arguments


def mistake(arguments: dict[str, Any]) -> object:
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
    server = host.popen([sys.executable, "-c", SERVER_PROGRAM, uid], stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    return server


# Requests and replies


def test_a_request_reaches_its_handler_and_the_result_comes_back(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        assert await ask("echo", service="76568", numbers=[1, 2.5, None]) == {
            "service": "76568",
            "numbers": [1, 2.5, None],
        }
        assert await ask("echo") == {}

    assert in_host(host, scenario).counters["requests"] == 2


def test_one_connection_may_ask_many_times(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        lines = b"".join(b'{"request":"echo","arguments":{"n":%d}}\n' % number for number in range(100))
        replies = (await talk(lines)).splitlines()
        assert [json.loads(reply)["result"]["n"] for reply in replies] == list(range(100))

    in_host(host, scenario)


def test_a_result_of_megabytes_arrives_whole(host: Host) -> None:
    flows = [{"flow_id": number, "state": "CONNECTED"} for number in range(60_000)]

    async def scenario(server: StackSocketServer) -> None:
        server.register("flows", lambda arguments: flows)
        assert await ask("flows") == flows

    in_host(host, scenario)


def test_a_mistake_comes_back_as_its_sentence(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        with pytest.raises(RequestFailed) as caught:
            await ask("mistake")
        assert str(caught.value) == "there is no rule for exactly 76568"
        assert await ask("echo", still="serving") == {"still": "serving"}

    assert in_host(host, scenario).counters["failed_requests"] == 1


@pytest.mark.parametrize(
    "defect", [lambda arguments: arguments["absent"], lambda arguments: object()], ids=["raises", "no JSON"]
)
def test_a_defective_handler_is_reported_and_does_not_end_the_server(
    host: Host, defect: stack_socket.Handler
) -> None:
    seen: list[dict[str, Any]] = []

    async def scenario(server: StackSocketServer) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))
        server.register("defect", defect)
        with pytest.raises(RequestFailed, match="which is a defect of it"):
            await ask("defect")
        assert await ask("echo", still="serving") == {"still": "serving"}

    in_host(host, scenario)
    assert [context["message"] for context in seen] == ["stack socket request defect failed"]


def test_an_unknown_request_is_answered_with_the_nearest(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        with pytest.raises(RequestFailed, match=r'^the stack knows no request "ecko": did you mean echo\?$'):
            await ask("ecko")
        with pytest.raises(RequestFailed, match=r'no request "zzz": it knows echo, mistake$'):
            await ask("zzz")

    in_host(host, scenario)


def test_a_name_is_registered_once() -> None:
    server = StackSocketServer()
    server.register("flows", echo)
    with pytest.raises(OurMistake, match="already has a handler for flows"):
        server.register("flows", echo)


# What is no request


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"GET / HTTP/1.1\n",
        b"[]\n",
        b"{}\n",
        b'{"request": 5}\n',
        b'{"request": "echo", "arguments": []}\n',
        b'{"request": "echo", "argument": {}}\n',
        b'{"request": "echo"} trailing\n',
        b'{"request": "\xff\xfe"}\n',
        b'{"request": "echo", "arguments": {"a": ' + b"[" * 20_000 + b"}}\n",
        b'{"request": "echo"}',
        b"\0" * 100,
    ],
)
def test_malformed_requests_get_an_error_and_are_counted(host: Host, line: bytes) -> None:
    async def scenario(server: StackSocketServer) -> None:
        (reply,) = (await talk(line)).splitlines()
        assert json.loads(reply)["error"].startswith("this is no request to the stack: ")
        assert server.counters["malformed_requests"] == 1
        assert server.counters["requests"] == 0
        assert await ask("echo", still="serving") == {"still": "serving"}

    in_host(host, scenario)


def test_requests_after_a_malformed_one_are_still_answered(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        first, second = (await talk(b'nonsense\n{"request": "echo"}\n')).splitlines()
        assert "error" in json.loads(first)
        assert json.loads(second) == {"result": {}}

    in_host(host, scenario)


def test_an_oversize_request_is_refused_without_being_stored(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        with pytest.raises(RequestFailed, match=f"longer than {REQUEST_LIMIT_BYTES} bytes"):
            await ask("echo", text="x" * 5_000_000)
        assert server.counters["malformed_requests"] == 1
        assert await ask("echo", still="serving") == {"still": "serving"}

    in_host(host, scenario)


def test_a_request_just_below_the_limit_is_served(host: Host) -> None:
    async def scenario(server: StackSocketServer) -> None:
        text = "x" * (REQUEST_LIMIT_BYTES - 100)
        assert await ask("echo", text=text) == {"text": text}

    in_host(host, scenario)


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
    monkeypatch.setattr(stack_socket, "CLIENT_TIMEOUT_S", 0.05)

    async def scenario(server: StackSocketServer) -> None:
        reader, writer = await connect()
        assert await reader.read() == b""
        writer.close()

    in_host(host, scenario)


def test_a_client_that_does_not_read_does_not_hold_its_place(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_socket, "CLIENT_TIMEOUT_S", 0.05)

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


def test_running_out_of_descriptors_only_delays_clients(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack_socket, "ACCEPT_PAUSE_S", 0.01)

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


# One stack per network namespace


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


# What the client says when the stack does not answer


def listening() -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(STACK_SOCKET_ADDRESS)
    listener.listen()
    return listener


def test_a_stack_that_hangs_is_given_up_with_its_pid(host: Host) -> None:
    def ask_in_vain() -> None:
        with listening(), pytest.raises(RequestFailed) as caught:
            StackSocketClient(timeout_s=0.02).request("echo")
        assert f"the stack (pid {os.getpid()}, " in str(caught.value)
        assert str(caught.value).endswith(" did not answer within 0.02 s")

    host.call(ask_in_vain)


def test_a_stack_that_ends_before_it_has_answered_is_noticed(host: Host) -> None:
    def ask_in_vain() -> None:
        with listening() as listener:

            def accept_and_close() -> None:
                connection, _ = listener.accept()
                connection.close()

            thread = threading.Thread(target=accept_and_close)
            thread.start()
            with pytest.raises(RequestFailed, match="went away before it had answered"):
                StackSocketClient().request("echo")
            thread.join()

    host.call(ask_in_vain)


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
