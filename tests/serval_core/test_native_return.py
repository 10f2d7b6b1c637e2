"""Sockets that serve something outlive the stack: whoever waits with them waits for the next one, and then they serve as before."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import socket as system
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core import aio, sockets
from serval_core.datagram_sockets import ServalDatagramSocket
from serval_core.names import parse_service
from serval_core.sockets import ServalSocket
from tests.serval_core.native_hosts import SERVICE, in_thread
from tests.serval_core.stack_thread import StackThread

T = TypeVar("T")


class Alone:
    """A host whose stack can be replaced, and programs on it."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.stack = StackThread(host).__enter__()

    def end(self) -> None:
        self.stack.__exit__(None, None, None)

    def begin(self) -> None:
        self.stack = StackThread(self.host).__enter__()

    def serves(self, service: str = SERVICE) -> bool:
        return parse_service(service) in self.stack.call(self.stack.stack.table.bound)

    def in_thread(self, use: Callable[[], T]) -> Callable[[], T]:
        return in_thread(lambda: self.host.call(use))

    def reaches(self, listener: ServalSocket) -> None:
        """A client's connection is the next that the listener accepts."""
        accepting = self.in_thread(listener.accept)
        with self.host.call(lambda: sockets.create_connection(SERVICE, 20)) as client, accepting()[0] as server:
            client.sendall(b"hello")
            assert server.recv(5) == b"hello"


@pytest.fixture
def alone(lab: Lab) -> Iterator[Alone]:
    host = lab.host("alone")
    lab.connect(host, "10.1.0.1/24", lab.host("other"), "10.1.0.2/24")
    made = Alone(host)
    yield made
    made.end()


def test_accept_waits_for_the_next_stack(alone: Alone) -> None:
    with alone.host.call(lambda: sockets.create_server(SERVICE)) as listener:
        listener.settimeout(20)
        alone.reaches(listener)
        accepting = alone.in_thread(listener.accept)
        alone.end()
        alone.begin()
        wait_for(alone.serves, "the listener is back")
        with alone.host.call(lambda: sockets.create_connection(SERVICE, 20)), accepting()[0]:
            pass
        alone.end()
        alone.begin()
        alone.reaches(listener)
        assert listener.getsockname().service == parse_service(SERVICE)
    wait_for(lambda: not alone.serves(), "it is closed")


def test_select_says_when_to_try_again(alone: Alone) -> None:
    """With one registration in epoll for all the time, as event loops have it."""
    poller = select.epoll()
    with alone.host.call(lambda: sockets.create_server(SERVICE)) as listener, poller:
        listener.setblocking(False)
        poller.register(listener, select.EPOLLIN)
        assert poller.poll(0) == []
        alone.end()

        def try_again() -> bool:
            assert poller.poll(10), "there is a next attempt"
            with pytest.raises(BlockingIOError):
                alone.host.call(listener.accept)
            return True

        for _ in range(3):
            try_again()
        alone.begin()
        wait_for(lambda: try_again() and alone.serves(), "it serves again")
        with alone.host.call(lambda: sockets.create_connection(SERVICE, 20)) as client:

            def accepted() -> ServalSocket | None:
                try:
                    return listener.accept()[0] if poller.poll(1) else None
                except BlockingIOError:
                    return None

            with wait_for(accepted, "the connection") as server:
                server.sendall(b"x")
                assert client.recv(1) == b"x"
        assert poller.poll(0) == []


def test_asyncio_server_goes_on(alone: Alone) -> None:
    async def serve() -> None:
        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(await reader.readexactly(1))
            writer.close()

        loop = asyncio.get_running_loop()
        async with await aio.start_server(echo, SERVICE):
            for _ in range(2):
                reader, writer = await aio.open_connection(SERVICE)
                writer.write(b"x")
                assert await reader.readexactly(1) == b"x"
                writer.close()
                await loop.run_in_executor(None, alone.end)
                await loop.run_in_executor(None, alone.begin)
                while not await loop.run_in_executor(None, alone.serves):
                    await asyncio.sleep(0.01)

    alone.host.call(lambda: asyncio.run(asyncio.wait_for(serve(), 60)))


def test_patience_and_timeout_bound_the_wait(alone: Alone) -> None:
    with alone.host.call(lambda: sockets.create_server(SERVICE)) as listener:
        alone.end()
        listener.settimeout(0.05)
        with pytest.raises(TimeoutError):
            alone.host.call(listener.accept)
        listener.settimeout(20)
        listener.close()
    alone.begin()
    with alone.host.call(lambda: sockets.create_server(SERVICE)) as listener:
        alone.end()
        listener.return_patience_s = 0.1
        with pytest.raises(OSError, match="start servald") as caught:
            alone.host.call(listener.accept)
        assert caught.value.errno == errno.ENETDOWN
        assert select.select([listener], [], [], 0)[0] == []
    alone.begin()


def test_service_that_somebody_else_has_taken_meanwhile(alone: Alone) -> None:
    with alone.host.call(lambda: sockets.create_server(SERVICE)) as listener:
        alone.end()
        alone.begin()
        with alone.host.call(lambda: sockets.create_server(SERVICE)):
            with pytest.raises(OSError, match="after the stack came back") as caught:
                alone.host.call(listener.accept)
            assert caught.value.errno == errno.EADDRINUSE
            assert select.select([listener], [], [], 0)[0] == []


def test_server_that_is_ending_does_not_come_back(alone: Alone) -> None:
    with alone.host.call(lambda: sockets.create_server(SERVICE)) as listener:
        listener.listen(0)
        alone.end()
        alone.begin()
        with pytest.raises(OSError, match="has ended"):
            alone.host.call(listener.accept)
        assert not alone.serves()


def test_datagrams_go_on(alone: Alone) -> None:
    with alone.host.call(ServalDatagramSocket) as server, alone.host.call(ServalDatagramSocket) as client:
        server.settimeout(20)
        client.settimeout(20)
        alone.host.call(lambda: server.bind(SERVICE))
        alone.host.call(lambda: client.sendto(b"first", SERVICE))
        assert server.recvfrom(100)[0] == b"first"
        name = client.getsockname()
        receiving = alone.in_thread(lambda: server.recvfrom(100))
        alone.end()
        client.setblocking(False)
        for _ in range(2):
            with pytest.raises(OSError, match="away") as caught:
                alone.host.call(lambda: client.sendto(b"lost", SERVICE))
            assert caught.value.errno == errno.ENETDOWN
        assert select.select([client], [], [], 10)[0] == [client], "there is a next attempt"
        client.settimeout(20)
        alone.begin()
        wait_for(alone.serves, "the endpoint is back")
        alone.host.call(lambda: client.sendto(b"second", SERVICE))
        payload, source = receiving()
        assert payload == b"second"
        alone.host.call(lambda: server.sendto(b"answer", source))
        assert client.recvfrom(100)[0] == b"answer"
        assert source.service == client.getsockname().service != name.service, "a random serviceID is another one now"


def test_asyncio_receives_over_the_end_of_a_stack(alone: Alone) -> None:
    async def receive() -> bytes:
        loop = asyncio.get_running_loop()
        with ServalDatagramSocket() as server:
            server.bind(SERVICE)
            server.setblocking(False)
            receiving = asyncio.create_task(aio.receive(server))
            await loop.run_in_executor(None, alone.end)
            await loop.run_in_executor(None, alone.begin)
            while not await loop.run_in_executor(None, alone.serves):
                await asyncio.sleep(0.01)
            with ServalDatagramSocket() as client:
                client.sendto(b"x", SERVICE)
                return (await receiving).payload

    assert alone.host.call(lambda: asyncio.run(asyncio.wait_for(receive(), 60))) == b"x"


def test_listener_and_flows_of_datagrams(alone: Alone) -> None:
    """Flows end with an error, as their state was the stack's; the listener goes on."""
    with alone.host.call(ServalDatagramSocket) as listener:
        listener.settimeout(20)
        alone.host.call(lambda: listener.bind(SERVICE))
        alone.host.call(listener.listen)
        for _ in range(2):
            accepting = alone.in_thread(listener.accept)
            with alone.host.call(ServalDatagramSocket) as client:
                client.settimeout(20)
                wait_for(alone.serves, "the listener is there")
                alone.host.call(lambda client=client: client.connect(SERVICE))
                with accepting()[0] as server:
                    server.settimeout(20)
                    client.send(b"x")
                    assert server.recv(1) == b"x"
                    alone.end()
                    for end in (client, server):
                        with pytest.raises(ConnectionResetError):
                            end.recv(1)
                    alone.begin()


def test_descriptors_of_a_listener_are_closed(alone: Alone) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    listener = alone.host.call(lambda: sockets.create_server(SERVICE))
    listener.setsockopt(system.SOL_SOCKET, system.SO_RCVBUF, 4096)
    assert listener.getsockopt(system.SOL_SOCKET, system.SO_TYPE) == system.SOCK_SEQPACKET
    listener.close()
    listener.close()
    wait_for(lambda: count() == before, "the stack has closed its end, too")
