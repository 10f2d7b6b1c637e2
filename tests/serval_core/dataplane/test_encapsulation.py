"""Framing `udp` on the real kernel: what SPEC 8 says is on the wire, paths that pass nothing else, NATs."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Iterator

import pytest

from lab.hosts import Host, Lab
from lab.timed_packets import SO_RCVBUFFORCE
from lab.waiting import wait_for
from lab.wire_counter import ETHERTYPE_IPV4, SOL_PACKET, WireCounter
from serval_core.framing import Framing
from serval_core.sal_settings import SalSettings
from tests.serval_core.dataplane.test_native import IPPROTO_SAL, block, connected, framings
from tests.serval_core.stack_thread import StackThread
from tests.serval_core.test_stack import assert_idle, assert_no_traces, exchange

SERVICE = "76568"
ANY = SalSettings(time_wait_s=0.2, fin_wait2_s=0.5, nat_keepalive_s=5)
UDP = SalSettings(time_wait_s=0.2, fin_wait2_s=0.5, framing=Framing.UDP)
PUBLIC = "10.2.0.254"
FEW_BYTES = 50_000  # fit into the first window

PACKET_AUXDATA = 8
TP_STATUS_CSUMNOTREADY = 8


@pytest.fixture
def path(lab: Lab) -> tuple[Host, Host, Host]:
    """Client, router, server. The server does not know the client's network."""
    client, router, server = lab.host("client"), lab.host("router"), lab.host("server")
    lab.connect(client, "192.168.7.2/24", router, "192.168.7.1/24")
    lab.connect(router, f"{PUBLIC}/24", server, "10.2.0.1/24")
    client.add_route("default", "192.168.7.1")
    router.forward()
    return client, router, server


def masquerade(router: Host, port: int) -> None:
    """Have the router translate what the client sends, UDP from port 54324 to that port."""
    rules = f"""
        table ip nat {{ }}
        delete table ip nat
        table ip nat {{
            chain out {{
                type nat hook postrouting priority srcnat;
                oifname "eth1" udp sport 54324 snat to {PUBLIC}:{port};
                oifname "eth1" masquerade;
            }}
        }}
    """
    router.run(["nft", "-f", "-"], input=rules)


@pytest.fixture
def open_path(path: tuple[Host, Host, Host]) -> tuple[Host, Host, Host]:
    path[2].add_route("default", PUBLIC)
    return path


def test_data_travels_inside_udp_both_ways(open_path: tuple[Host, Host, Host]) -> None:
    client_host, router, server_host = open_path
    with (
        StackThread(client_host, sal=UDP) as client,
        StackThread(server_host, sal=ANY) as server,
        WireCounter(router, "eth0", IPPROTO_SAL) as sal,
        WireCounter(router, "eth0", socket.IPPROTO_TCP) as native,
        WireCounter(router, "eth0", socket.IPPROTO_UDP, 1500) as too_long,
        WireCounter(router, "eth0", socket.IPPROTO_UDP, 1490) as full,
    ):
        client.forward(SERVICE, "10.2.0.1")
        near, far = connected(client, server)
        assert framings(client, server) == ["udp", "udp"]
        exchange(near, far, 8_000_000, 5_000_000)
        assert_idle(client, server)
        assert (sal.count(), native.count(), too_long.count()) == (0, 0, 0)
        assert full.count() > 13_000_000 // 1500
    for host in (client_host, server_host):
        assert_no_traces(host)


@contextlib.contextmanager
def unfinished_checksums(router: Host) -> Iterator[Callable[[], list[bool]]]:
    """Tells of each large packet from the client whether its inner checksum is still to be computed (packet(7), PACKET_AUXDATA)."""

    def listen() -> socket.socket:
        opened = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(ETHERTYPE_IPV4))
        opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
        opened.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        opened.bind(("eth0", ETHERTYPE_IPV4))
        return opened

    with router.call(listen) as watch:

        def seen() -> list[bool]:
            found = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet, notes, _, _ = watch.recvmsg(2000, 100, socket.MSG_DONTWAIT)
                    if len(packet) > 1000:
                        found.append(bool(int.from_bytes(notes[0][2][:4], sys.byteorder) & TP_STATUS_CSUMNOTREADY))
            return found

        yield seen


@pytest.mark.parametrize("translated", [False, True], ids=["no NAT", "NAT"])
def test_checksums_are_finished_as_long_as_there_may_be_a_nat(open_path: tuple[Host, Host, Host], translated: bool) -> None:
    """What is left to the hardware a NAT on the same machine would spoil."""
    client_host, router, server_host = open_path
    if translated:
        masquerade(router, 4000)
    with StackThread(client_host, sal=UDP) as client, StackThread(server_host, sal=ANY) as server:
        client.forward(SERVICE, "10.2.0.1")
        with unfinished_checksums(router) as seen:
            exchange(*connected(client, server), 500_000, 500_000)
            packets = seen()
        assert len(packets) > 300
        assert sum(packets) == 0 if translated else sum(packets) > 250
        assert_idle(client, server)


def test_a_nat_that_appears_later(open_path: tuple[Host, Host, Host]) -> None:
    """Until then checksums were left to the hardware. The router translates from one packet to the next."""
    with StackThread(open_path[0], sal=UDP) as client, StackThread(open_path[2], sal=ANY) as server:
        client.forward(SERVICE, "10.2.0.1")
        near, far = connected(client, server)
        near.socket.sendall(b"x" * FEW_BYTES)
        received = 0
        while received < FEW_BYTES:
            received += len(far.socket.recv(FEW_BYTES))
        masquerade(open_path[1], 4000)
        exchange(near, far, 2_000_000, 2_000_000)
        assert_idle(client, server)


def test_a_path_that_drops_protocol_144(open_path: tuple[Host, Host, Host]) -> None:
    """The first flow finds out; the next one does not even try."""
    block(open_path[1], "meta l4proto 144")
    with StackThread(open_path[0], sal=ANY) as client, StackThread(open_path[2], sal=ANY) as server:
        client.forward(SERVICE, "10.2.0.1")
        with WireCounter(open_path[1], "eth0", IPPROTO_SAL) as tries:
            near, far = connected(client, server)
            assert tries.count() > 0
            assert framings(client, server) == ["udp", "udp"]
            exchange(near, far, 1_000_000, 1_000_000)
            before = tries.count()
            exchange(*connected(client, server), 100_000, 100_000)
            assert tries.count() == before
        assert_idle(client, server)


def test_behind_a_nat(path: tuple[Host, Host, Host]) -> None:
    """Inner checksums are those of addresses that nobody outside has ever seen."""
    masquerade(path[1], 4000)
    with StackThread(path[0], sal=ANY) as client, StackThread(path[2], sal=ANY) as server:
        client.forward(SERVICE, "10.2.0.1")
        near, far = connected(client, server)
        assert framings(client, server) == ["udp", "udp"]
        assert [flow["peer_address"] for flow in server.flows()] == [PUBLIC]
        exchange(near, far, 3_000_000, 3_000_000)
        assert_idle(client, server)


def test_behind_a_nat_through_a_service_router(lab: Lab) -> None:
    """The server answers in the name of the service router, or the client's NAT would not let the answer in."""
    client_host, nat = lab.host("client"), lab.host("nat")
    router_host, server_host = lab.host("service-router"), lab.host("server")
    lab.connect(client_host, "192.168.7.2/24", nat, "192.168.7.1/24")
    lab.switch("network", {nat: f"{PUBLIC}/24", router_host: "10.2.0.2/24", server_host: "10.2.0.1/24"})
    client_host.add_route("default", "192.168.7.1")
    nat.forward()
    masquerade(nat, 4000)
    with (
        StackThread(client_host, sal=UDP) as client,
        StackThread(router_host, sal=SalSettings(forwarding=True)) as router,
        StackThread(server_host, sal=ANY) as server,
    ):
        client.forward(SERVICE, "10.2.0.2")
        router.forward(SERVICE, "10.2.0.1")
        near, far = connected(client, server)
        assert framings(client, server) == ["udp", "udp"]
        exchange(near, far, 500_000, 500_000)
        assert_idle(client, server)


def test_a_nat_that_forgets_and_chooses_another_port(path: tuple[Host, Host, Host]) -> None:
    """The server sees it by the client's keepalives, makes sure, and goes on."""
    masquerade(path[1], 4000)
    for key in ("nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"):
        path[1].sysctl(f"net.netfilter.{key}", 1)
    rarely = SalSettings(time_wait_s=0.2, fin_wait2_s=0.5, nat_keepalive_s=1.5)
    with StackThread(path[0], sal=rarely) as client, StackThread(path[2], sal=ANY) as server:
        client.forward(SERVICE, "10.2.0.1")
        near, far = connected(client, server)
        masquerade(path[1], 5000)
        wait_for(lambda: server.flows()[0]["migrations"] == 1, "the server knows the new port", 20)
        far.socket.sendall(b"still here")
        assert near.socket.recv(100) == b"still here"
        exchange(near, far, 1_000_000, 1_000_000)
        assert server.counters()["nat_rebindings"] == 1
        assert_idle(client, server)


def test_another_program_has_the_ports(open_path: tuple[Host, Host, Host]) -> None:
    """Then there is no encapsulation, and all else works."""

    def take() -> socket.socket:
        taken = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        taken.bind(("", 54325))
        return taken

    with (
        open_path[0].call(take),
        StackThread(open_path[0], sal=ANY) as client,
        StackThread(open_path[2], sal=ANY) as server,
    ):
        client.forward(SERVICE, "10.2.0.1")
        exchange(*connected(client, server), 1000, 1000)
