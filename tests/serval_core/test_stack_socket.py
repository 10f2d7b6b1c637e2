"""Is every request answered, with a result or with one sentence?"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
from typing import Any

import pytest

from lab.hosts import Host
from serval_core import stack_socket
from serval_core.errors import OurMistake
from serval_core.stack_socket import (
    STACK_SOCKET_ADDRESS,
    RequestFailed,
    StackSocketClient,
)
from serval_core.stack_socket_server import REQUEST_LIMIT_BYTES, StackSocketServer
from tests.serval_core.stack_sockets import ask, echo, in_host, talk

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
