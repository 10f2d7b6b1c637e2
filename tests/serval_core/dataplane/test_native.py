"""Framing `native` on the real kernel: plain TCP on the wire, and what happens where the path does not pass it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from lab.wire_counter import WireCounter
from serval_core.dataplane.kernel import DataPlaneSettings
from serval_core.dataplane.native_ports import PortRange
from serval_core.framing import Framing
from serval_core.sal_settings import SalSettings
from tests.serval_core.stack_thread import StackThread, Stream, assert_idle, exchange
from tests.serval_core.test_stack import assert_no_traces

SERVICE = "76568"
AUTO = SalSettings(time_wait_s=0.2, fin_wait2_s=0.5)
IPPROTO_SAL = 144


@pytest.fixture
def path(lab: Lab) -> tuple[Host, Host, Host]:
    """Client, router, server."""
    client, router, server = lab.host("client"), lab.host("router"), lab.host("server")
    lab.connect(client, "10.1.0.1/24", router, "10.1.0.254/24")
    lab.connect(router, "10.2.0.254/24", server, "10.2.0.1/24")
    client.add_route("default", "10.1.0.254")
    server.add_route("default", "10.2.0.254")
    router.forward()
    return client, router, server


@pytest.fixture
def stacks(path: tuple[Host, Host, Host]) -> Iterator[tuple[StackThread, StackThread]]:
    with StackThread(path[0], sal=AUTO) as client, StackThread(path[2], sal=AUTO) as server:
        client.forward(SERVICE, "10.2.0.1")
        yield client, server
        assert_idle(client, server)
    for host in (path[0], path[2]):
        assert_no_traces(host)


def connected(client: StackThread, server: StackThread) -> tuple[Stream, Stream]:
    """Both ends of a new flow that has carried a byte each way."""
    listener = server.listen(SERVICE)
    near = client.connect(SERVICE)
    far = listener.accept()
    listener.close()
    for one, other in ((near, far), (far, near)):
        one.socket.sendall(b"?")
        assert other.socket.recv(1) == b"?"
    return near, far


def framings(*stacks: StackThread) -> list[object]:
    return [flow["framing"] for stack in stacks for flow in stack.flows()]


def block(router: Host, rule: str) -> None:
    """Have the router drop what matches `rule`."""
    table = f"table ip middlebox {{ chain forward {{ type filter hook forward priority 0; {rule} drop; }}; }};"
    router.run(["nft", "-f", "-"], input=table)


def test_data_is_plain_tcp_both_ways(
    path: tuple[Host, Host, Host], stacks: tuple[StackThread, StackThread]
) -> None:
    near, far = connected(*stacks)
    assert framings(*stacks) == ["native", "native"]
    with (
        WireCounter(path[1], "eth0", IPPROTO_SAL, 200) as with_header,
        WireCounter(path[1], "eth0", socket.IPPROTO_TCP, 200) as plain,
    ):
        exchange(near, far, 8_000_000, 3_000_000)
        assert with_header.count() == 0
        assert plain.count() > 0


@pytest.mark.parametrize("pinned", ["client", "server"])
def test_one_end_that_wants_sal_has_its_way(path: tuple[Host, Host, Host], pinned: str) -> None:
    settings = {"client": AUTO, "server": AUTO} | {pinned: SalSettings(framing=Framing.SAL, time_wait_s=0.2)}
    with (
        StackThread(path[0], sal=settings["client"]) as client,
        StackThread(path[2], sal=settings["server"]) as server,
    ):
        client.forward(SERVICE, "10.2.0.1")
        near, far = connected(client, server)
        assert framings(client, server) == ["sal", "sal"]
        exchange(near, far, 300_000, 300_000)


def test_a_path_without_unsolicited_tcp_carries_the_flow_all_the_same(
    path: tuple[Host, Host, Host], stacks: tuple[StackThread, StackThread]
) -> None:
    """A stateful firewall knows nothing of the handshake. The next flow to the same peer does not even try."""
    block(path[1], "meta l4proto tcp ct state new")
    client, server = stacks
    near, far = connected(client, server)
    exchange(near, far, 2_000_000, 2_000_000)
    assert server.counters()["framing_native_doubted"] == 1
    near, far = connected(client, server)
    assert framings(server) == ["sal"]
    exchange(near, far, 300_000, 300_000)
    assert server.counters()["framing_native_doubted"] == 1


def test_a_flow_goes_native_when_the_path_lets_it(
    path: tuple[Host, Host, Host], stacks: tuple[StackThread, StackThread]
) -> None:
    """Both ends send all the time, so each has seen the other in framing sal."""
    block(path[1], "meta l4proto tcp")
    near, far = connected(*stacks)
    for _ in range(4):
        swap(near, far)
    assert framings(*stacks) == ["sal", "sal"]
    path[1].run(["nft", "delete", "table", "ip", "middlebox"])

    def both_native() -> bool:
        swap(near, far)
        return framings(*stacks) == ["native", "native"]

    wait_for(both_native, "both ends send natively", 30)
    exchange(near, far, 300_000, 300_000)


def swap(one: Stream, other: Stream) -> None:
    """Both send, then both receive."""
    for each in (one, other):
        each.socket.sendall(b"!")
    for each in (one, other):
        assert each.socket.recv(1) == b"!"


@pytest.mark.parametrize("direction", ["eth0", "eth1"])
def test_a_path_that_passes_plain_tcp_one_way_only(
    path: tuple[Host, Host, Host], stacks: tuple[StackThread, StackThread], direction: str
) -> None:
    """One end's acknowledgements would get lost for ever if it did not notice that the other end has changed."""
    block(path[1], f'iifname "{direction}" meta l4proto tcp')
    near, far = connected(*stacks)
    exchange(near, far, 1_000_000, 1_000_000)


def test_a_path_that_stops_passing_plain_tcp(
    path: tuple[Host, Host, Host], stacks: tuple[StackThread, StackThread]
) -> None:
    near, far = connected(*stacks)
    assert framings(*stacks) == ["native", "native"]
    block(path[1], "meta l4proto tcp")
    far.socket.sendall(b"late")
    assert near.socket.recv(4) == b"late"
    exchange(near, far, 100, 100)


def bound(host: Host, port: int) -> socket.socket:
    """A socket of another program with that port."""

    def bind() -> socket.socket:
        return socket.create_server(("", port))

    return host.call(bind)


def test_ports_are_shared_with_the_host_and_given_back(path: tuple[Host, Host, Host]) -> None:
    """The range is three ports, one of which another program has; a third flow does without."""
    three = DataPlaneSettings(native_ports=PortRange(61000, 61002))
    with (
        bound(path[0], 61001),
        StackThread(path[0], sal=AUTO, dataplane=three) as client,
        StackThread(path[2], sal=AUTO) as server,
    ):
        client.forward(SERVICE, "10.2.0.1")
        flows = [connected(client, server) for _ in range(3)]
        assert sorted(map(str, framings(client))) == ["native", "native", "sal"]
        with pytest.raises(OSError, match="in use"):
            bound(path[0], 61000)
        for near, far in flows:
            exchange(near, far, 1000, 1000)
        assert_idle(client, server)
        again = connected(client, server)
        assert framings(client) == ["native"]
        exchange(*again, 1000, 1000)
        assert_idle(client, server)
        assert client.counters()["framing_native_ports"] == 0
    bound(path[0], 61000).close()


def test_what_has_a_flows_port_and_is_not_the_flows_is_left_to_the_host(
    path: tuple[Host, Host, Host], stacks: tuple[StackThread, StackThread]
) -> None:
    """It may be forwarded by this host, or the answer to a connection for which its NAT has chosen that port."""
    near, far = connected(*stacks)
    stranger = path[0].call(socket.socket, socket.AF_INET, socket.SOCK_STREAM)
    with stranger:
        stranger.settimeout(10)
        with pytest.raises(ConnectionRefusedError):
            stranger.connect(("10.2.0.1", 61000))
    exchange(near, far, 1000, 1000)
