"""Do clients get in, stay out at the limit without being refused, and find nobody after a failed start?"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest

from serval_core.config_file import Misconfigured
from translator.accounting import Admission
from translator.legacy_side import Address, LegacyAcceptor, MappedPort, SocketOptions, address_text, reset
from translator.port_map import ForwardMap, parse_map

TIMEOUT_S = 10.0


def free_port() -> int:
    """A port that nobody listens on, on any address."""
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::", 0))
        return int(probe.getsockname()[1])


def free_range(count: int) -> int:
    """The first of that many free ports in a row, below those the kernel gives to connecting sockets."""
    for first in range(20000, 30000, count):
        with contextlib.ExitStack() as probes:
            try:
                for port in range(first, first + count):
                    probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free range of ports on this machine")


def forward_map(listen: str) -> ForwardMap:
    return parse_map(f"{listen}=76568", {}, f"--map {listen}=76568")


class Door:
    """A LegacyAcceptor whose clients land in a list; a client counts until `leave`."""

    def __init__(self, limit: int = 100, options: SocketOptions | None = None) -> None:
        self.admission = Admission(limit)
        self.clients: list[tuple[socket.socket, Address, MappedPort]] = []
        self.total = 0
        self.acceptor = LegacyAcceptor(options or SocketOptions(), 128, self.admission, self._client)

    def _client(self, client: socket.socket, address: Address, port: MappedPort) -> None:
        self.admission.enter()
        self.total += 1
        self.clients.append((client, address, port))

    async def wait_for(self, count: int) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while self.total < count:
                await asyncio.sleep(0.001)

    def leave(self) -> None:
        self.clients.pop(0)[0].close()
        self.admission.leave()

    def close(self) -> None:
        self.acceptor.close()
        for client, _, _ in self.clients:
            client.close()


def with_door(
    test: Callable[[Door], Awaitable[None]], *, limit: int = 100, options: SocketOptions | None = None
) -> None:
    async def run() -> None:
        door = Door(limit, options)
        try:
            await test(door)
        finally:
            door.close()

    asyncio.run(run())


@pytest.fixture
def connections() -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    yield opened
    for each in opened:
        each.close()


@pytest.mark.parametrize(
    ("listen", "dial", "seen_as"),
    [
        ("{}", "127.0.0.1", "127.0.0.1"),
        ("{}", "::1", "[::1]"),
        ("127.0.0.1:{}", "127.0.0.1", "127.0.0.1"),
        ("0.0.0.0:{}", "127.0.0.1", "127.0.0.1"),
        ("[::1]:{}", "::1", "[::1]"),
    ],
)
def test_a_client_comes_in(listen: str, dial: str, seen_as: str, connections: list[socket.socket]) -> None:
    port = free_port()

    async def test(door: Door) -> None:
        door.acceptor.bind([forward_map(listen.format(port))])
        door.acceptor.listen()
        connections.append(socket.create_connection((dial, port), TIMEOUT_S))
        await door.wait_for(1)
        client, address, mapped = door.clients[0]
        assert address_text(address) == f"{seen_as}:{connections[0].getsockname()[1]}"
        assert mapped.map.service_text == "76568"
        assert client.gettimeout() == 0
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 600

    with_door(test)


@pytest.mark.parametrize(("listen", "dial"), [("0.0.0.0:{}", "::1"), ("[::]:{}", "127.0.0.1")])
def test_a_wildcard_of_one_family_leaves_the_other_alone(listen: str, dial: str) -> None:
    port = free_port()

    async def test(door: Door) -> None:
        door.acceptor.bind([forward_map(listen.format(port))])
        door.acceptor.listen()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((dial, port), TIMEOUT_S)

    with_door(test)


def test_options_can_be_switched_off(connections: list[socket.socket]) -> None:
    port = free_port()

    async def test(door: Door) -> None:
        door.acceptor.bind([forward_map(f"127.0.0.1:{port}")])
        door.acceptor.listen()
        connections.append(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
        await door.wait_for(1)
        client = door.clients[0][0]
        assert not client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not client.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

    with_door(test, options=SocketOptions(tcp_nodelay=False, keepalive_s=0))


def test_each_port_of_a_range_leads_in(connections: list[socket.socket]) -> None:
    first = free_range(5)

    async def test(door: Door) -> None:
        door.acceptor.bind([forward_map(f"127.0.0.1:{first}-{first + 4}")])
        door.acceptor.listen()
        for port in range(first, first + 5):
            connections.append(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
        await door.wait_for(5)
        assert len({id(mapped.traffic) for _, _, mapped in door.clients}) == 1

    with_door(test)


def test_at_the_limit_clients_wait_instead_of_being_refused(connections: list[socket.socket]) -> None:
    port = free_port()

    async def test(door: Door) -> None:
        door.acceptor.bind([forward_map(f"127.0.0.1:{port}")])
        door.acceptor.listen()
        for _ in range(5):
            connections.append(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
        await door.wait_for(2)
        # Each turn of the loop would take more clients if it still listened.
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(door.clients) == 2
        assert door.admission.times_full == 1
        for total in (3, 4, 5, 5, 5):
            door.leave()
            await door.wait_for(total)
        assert (door.clients, door.admission.active) == ([], 0)

    with_door(test, limit=2)


def test_pausing_leaves_clients_in_the_queue(connections: list[socket.socket]) -> None:
    port = free_port()

    async def test(door: Door) -> None:
        door.acceptor.bind([forward_map(f"127.0.0.1:{port}")])
        door.acceptor.listen()
        door.acceptor.pause()
        connections.append(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
        for _ in range(20):
            await asyncio.sleep(0)
        assert door.clients == []
        door.acceptor.resume()
        await door.wait_for(1)

    with_door(test)


def test_who_waits_in_the_queue_is_taken_before_closing(connections: list[socket.socket]) -> None:
    port = free_port()

    async def test(door: Door) -> None:
        door.acceptor.bind([forward_map(f"127.0.0.1:{port}")])
        door.acceptor.listen()
        door.acceptor.pause()
        for _ in range(3):
            connections.append(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
        door.acceptor.take_waiting()
        assert len(door.clients) == 3
        door.acceptor.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), TIMEOUT_S)

    with_door(test)


def test_a_port_of_another_program_is_refused_with_its_address_and_nothing_stays_bound() -> None:
    ours = free_port()

    async def test(door: Door) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            theirs = taken.getsockname()[1]
            with pytest.raises(Misconfigured) as refusal:
                door.acceptor.bind([forward_map(f"127.0.0.1:{ours}"), forward_map(f"127.0.0.1:{theirs}")])
            assert f"--map 127.0.0.1:{theirs}=76568: cannot listen on 127.0.0.1:{theirs}: another" in str(
                refusal.value
            )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", ours))  # without SO_REUSEADDR: would fail were it still bound

    with_door(test)


def test_a_port_that_is_taken_between_bind_and_listen() -> None:
    port = free_port()

    async def test(door: Door) -> None:
        door.acceptor.bind([forward_map(f"127.0.0.1:{port}")])
        with socket.create_server(("127.0.0.1", port)), pytest.raises(Misconfigured, match="another program"):
            door.acceptor.listen()
        assert door.acceptor.addresses() == []

    with_door(test)


def test_an_address_of_another_host() -> None:
    async def test(door: Door) -> None:
        with pytest.raises(Misconfigured, match=r"192\.0\.2\.1:80: that address belongs to no interface"):
            door.acceptor.bind([forward_map("192.0.2.1:80")])

    with_door(test)


def test_no_client_before_listen() -> None:
    port = free_port()

    async def test(door: Door) -> None:
        door.acceptor.bind([forward_map(f"127.0.0.1:{port}")])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), TIMEOUT_S)

    with_door(test)


@contextlib.contextmanager
def no_descriptors_left() -> Iterator[None]:
    """Every descriptor that the process may have is taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open("/dev/null", os.O_RDONLY)]
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (max(taken[0], *map(int, os.listdir("/proc/self/fd"))) + 1, hard)
    )
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(taken[0]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)


def test_out_of_descriptors_pauses_instead_of_spinning(connections: list[socket.socket]) -> None:
    port = free_port()

    async def test(door: Door) -> None:
        door.acceptor.bind([forward_map(f"127.0.0.1:{port}")])
        door.acceptor.listen()
        connections.append(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
        with no_descriptors_left():
            for _ in range(20):
                await asyncio.sleep(0)
        assert door.acceptor.counters["accept_shortages"] == 1
        assert door.clients == []
        await door.wait_for(1)  # it goes on by itself

    with_door(test)


def test_reset_is_seen_as_a_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname(), TIMEOUT_S)
        server, _ = listener.accept()
    reset(server)
    with client, pytest.raises(ConnectionResetError):
        client.recv(1)


def test_other_maps_are_prepared_and_then_replace_the_present_ones(connections: list[socket.socket]) -> None:
    """Who waits at a port that stays goes by the new map; who waits at one that is given up is still let in."""
    first = free_range(4)

    async def test(door: Door) -> None:
        door.acceptor.bind([forward_map(f"127.0.0.1:{first}-{first + 1}")])
        door.acceptor.listen()
        door.acceptor.pause()
        change = door.acceptor.prepare([forward_map(f"127.0.0.1:{first + 1}-{first + 2}")])
        for port in (first, first + 1, first + 2):
            connections.append(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
        (before,) = door.acceptor.traffic
        assert door.acceptor.replace(change) == [before]
        await door.wait_for(3)
        ports = {
            client.getsockname()[1] - first: port.map.first_port - first for client, _, port in door.clients
        }
        assert ports == {0: 0, 1: 1, 2: 1}
        assert sorted(address[1] - first for address in door.acceptor.addresses()) == [1, 2]
        assert [each.listen for each in door.acceptor.traffic] == [f"127.0.0.1:{first + 1}-{first + 2}"]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", first), TIMEOUT_S)

    with_door(test)


@pytest.mark.parametrize("listen", ["{taken}", "0.0.0.0:{present}"])
def test_maps_that_cannot_be_had_change_nothing(listen: str, connections: list[socket.socket]) -> None:
    first = free_range(3)
    present, taken, free = first, first + 1, first + 2

    async def test(door: Door) -> None:
        door.acceptor.bind([forward_map(f"127.0.0.1:{present}")])
        door.acceptor.listen()
        wrong = forward_map(listen.format(taken=taken, present=present))
        with pytest.raises(Misconfigured, match="cannot listen on"):
            door.acceptor.prepare([forward_map(f"127.0.0.1:{free}"), wrong])
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", free), TIMEOUT_S)
        connections.append(socket.create_connection(("127.0.0.1", present), TIMEOUT_S))
        await door.wait_for(1)

    with socket.create_server(("127.0.0.1", taken)):
        with_door(test)


def test_maps_come_after_a_start_without_any(connections: list[socket.socket]) -> None:
    port = free_port()

    async def test(door: Door) -> None:
        door.acceptor.bind([])
        door.acceptor.listen()
        assert door.acceptor.replace(door.acceptor.prepare([forward_map(f"127.0.0.1:{port}")])) == []
        connections.append(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
        await door.wait_for(1)
        door.acceptor.replace(door.acceptor.prepare([]))
        assert door.acceptor.addresses() == []

    with_door(test)
