"""Paths that carry less than the interfaces at their ends say, before and after a move, with and without ICMP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from lab.hosts import Lab
from lab.waiting import wait_for
from serval_core.effects import LimitSegments
from serval_core.framing import Framing
from serval_core.names import FlowID
from serval_core.path_mtu import MTU_MIN_BYTES
from tests.serval_core.exchanges import SERVER_ADDRESS, Exchange, two_hosts
from tests.serval_core.stack_thread import StackThread
from tests.serval_core.test_mobility_kernel import QUICK, Ends, ip
from tests.serval_core.two_paths import Transfer, two_paths


class Uploading(Ends):
    """The client sends to the server."""

    def begin(self) -> Transfer:
        return Transfer(self.near, self.far)

    def learns(self, mtu_bytes: int) -> None:
        """Return once the sender knows the path's MTU, and data arrives."""
        wait_for(lambda: self.client.flows()[0]["mtu_bytes"] == mtu_bytes, f"an MTU of {mtu_bytes}", 30.0)
        self.goes_on()


@pytest.fixture(params=[Framing.SAL, Framing.NATIVE])
def ends(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Uploading]:
    hosts = two_paths(lab)
    sal = replace(QUICK, framing=request.param)
    with StackThread(hosts[0], sal=sal) as client, StackThread(hosts[1], sal=sal) as server:
        yield Uploading(hosts, client, server)


def test_a_link_behind_the_router_shrinks(ends: Uploading) -> None:
    ip(ends.router, "link", "set", "eth2", "mtu", 1300)
    ends.learns(1300)
    assert ends.client.counters()["path_mtu_lowered"] == 1
    ends.finish()


def test_the_peer_moves_behind_a_smaller_link(ends: Uploading) -> None:
    ip(ends.router, "link", "set", "eth3", "mtu", 1280)
    ends.far_moves.move(ends.far_id, "eth1")
    ends.learns(1280)
    ends.finish()


def test_a_path_that_swallows_large_packets_without_a_word(ends: Uploading) -> None:
    for host in (ends.client_host, ends.server_host):
        ip(host, "link", "set", "eth1", "down")
    ends.router.run(["nft", "add table ip f; add chain ip f c { type filter hook output priority 0; }"])
    ends.router.run(["nft", "add rule ip f c ip protocol icmp drop"])
    ip(ends.router, "link", "set", "eth2", "mtu", 1350)
    ends.learns(1280)
    ends.finish()


def test_an_outage_does_not_make_packets_small(ends: Uploading) -> None:
    """Nothing gets through for a while on the only path, which is no matter of size."""
    for host in (ends.client_host, ends.server_host):
        ip(host, "link", "set", "eth1", "down")
    ends.router.run(["nft", "add table ip f; add chain ip f c { type filter hook forward priority 0; policy drop; }"])
    wait_for(lambda: ends.client.flows()[0]["migration"] == "SENT", "the peer to be asked for a sign of life")
    ends.router.run(["nft", "delete table ip f"])
    ends.learns(1500)
    assert ends.client.counters().get("path_mtu_tried", 0) == 0
    ends.finish()


class Sender:
    """A host with an open flow in the memory network, about which ICMP errors come."""

    def __init__(self) -> None:
        network, self.host, server = two_hosts()
        exchange = Exchange(network, self.host, server, server_waits=True, client_waits=True)
        exchange.start()
        network.run(network.now + 1.0)
        self.flow = self.host.sal._core.flows.by_id[exchange.flow_id]

    def quoted(self, sent_bytes: int = 1500, peer_flow_id: int = 0, destination: int = SERVER_ADDRESS) -> bytes:
        """The beginning of a data packet of the flow."""
        flow_id, peer = self.flow.flow_id, peer_flow_id or self.flow.peer_flow_id
        header = bytes((0x45, 0)) + sent_bytes.to_bytes(2, "big") + bytes((0, 0, 64, 0, 64, 144, 0, 0))
        addresses = self.flow.local_address.to_bytes(4, "big") + destination.to_bytes(4, "big")
        return header + addresses + flow_id.to_bytes(4, "big") + peer.to_bytes(4, "big")

    def limits(self) -> list[int]:
        return [each.mtu_bytes for each in self.host.sal.take_effects() if isinstance(each, LimitSegments)]


def test_the_kernel_is_told_again_what_it_has_forgotten() -> None:
    """It sends large packets again after `net.ipv4.route.mtu_expires`, and a router complains again."""
    sender = Sender()
    for mtu_bytes in (1300, 1300, 1400):
        sender.host.sal.packet_too_big(sender.quoted(), mtu_bytes)
    assert sender.limits() == [1300] * 3
    assert sender.flow.mtu_bytes == 1300
    assert sender.host.sal.counters["path_mtu_lowered"] == 1


def test_an_error_without_a_size_means_the_next_plateau() -> None:
    sender = Sender()
    sender.host.sal.packet_too_big(sender.quoted(), 0)
    assert sender.limits() == [1492]


def test_no_error_makes_packets_tiny() -> None:
    sender = Sender()
    sender.host.sal.packet_too_big(sender.quoted(), 68)
    assert sender.limits() == [MTU_MIN_BYTES]


def test_an_error_about_the_path_that_a_flow_has_left_says_nothing_about_the_new_one() -> None:
    sender = Sender()
    late = sender.quoted()
    sender.flow.local_address += 1
    sender.host.sal.packet_too_big(late, 1300)
    assert sender.limits() == []
    assert sender.host.sal.counters["dropped_late_icmp_error"] == 1


def test_what_anybody_can_say_is_forgotten_and_what_was_found_out_is_not() -> None:
    sender = Sender()
    sender.host.sal.packet_too_big(sender.quoted(), 1300)
    sender.host.sal.try_smaller_packets(sender.flow.flow_id)
    limits = [each for each in sender.host.sal.take_effects() if isinstance(each, LimitSegments)]
    assert [(each.mtu_bytes, each.lasting) for each in limits] == [(1300, False), (1280, True)]


def test_forged_and_meaningless_errors_change_nothing() -> None:
    sender = Sender()
    sal = sender.host.sal
    sal.packet_too_big(sender.quoted(peer_flow_id=12345), 1300)
    sal.packet_too_big(sender.quoted(destination=SERVER_ADDRESS + 1), 1300)
    sal.packet_too_big(sender.quoted(sent_bytes=1300), 1300)
    sal.packet_too_big(sender.quoted()[:24], 1300)
    sal.packet_too_big(b"", 1300)
    assert sender.limits() == []
    assert sal.counters["dropped_spoofed_icmp_error"] == 2
    assert sal.counters["dropped_meaningless_icmp_error"] == 1


def test_sizes_that_are_tried_become_smaller_and_stay_at_the_least() -> None:
    """Once nothing smaller is left, the kernel may still have forgotten what it was told."""
    sender = Sender()
    for _ in range(4):
        sender.host.sal.try_smaller_packets(sender.flow.flow_id)
    assert sender.limits() == [1280] + 3 * [MTU_MIN_BYTES]
    assert sender.host.sal.counters["path_mtu_tried"] == 2


class Ports:
    """Of framing `native`: one, which belongs to one flow."""

    def __init__(self, flow_id: FlowID) -> None:
        self.flow_id = flow_id

    def take(self) -> int:
        return 50000

    def release(self, port: int) -> None:
        """Whatever it is."""

    def flow_of(self, port: int) -> FlowID | None:
        return self.flow_id if port == 50000 else None


@pytest.mark.parametrize(
    ("protocol", "start", "limits"),
    [
        (6, (50000).to_bytes(2, "big") + (50001).to_bytes(2, "big") + bytes(4), [1300]),
        (6, (50000).to_bytes(2, "big") + (50002).to_bytes(2, "big") + bytes(4), []),
        (6, (50003).to_bytes(2, "big") + (50001).to_bytes(2, "big") + bytes(4), []),
        (17, None, [1300]),
        (17, bytes(8), []),
        (1, bytes(8), []),
    ],
)
def test_packets_are_known_in_every_framing(protocol: int, start: bytes | None, limits: list[int]) -> None:
    sender = Sender()
    sender.host.sal._core.native_ports = Ports(sender.flow.flow_id)
    sender.flow.options = sender.flow.options._replace(native_port=50001)
    quoted = bytearray(sender.quoted()[:20])
    quoted[9] = protocol
    identifiers = sender.quoted()[20:]
    sender.host.sal.packet_too_big(bytes(quoted) + (bytes(8) + identifiers if start is None else start), 1300)
    assert sender.limits() == limits
