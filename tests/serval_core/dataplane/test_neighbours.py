"""Next hops come and go in a real neighbour table."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import TypeVar

import pytest

from lab.hosts import Host, Lab
from serval_core.dataplane.neighbours import Neighbours
from serval_core.names import parse_address

T = TypeVar("T")

MAC, OTHER_MAC = "02:00:00:00:00:07", "02:00:00:00:00:08"
FLOW, OTHER_FLOW = 1, 2
# Of notifications nobody reads, more than a socket's buffer holds.
MORE_THAN_FITS = 2000


@pytest.fixture
def host(lab: Lab) -> Host:
    host, peer = lab.host("host"), lab.host("peer")
    lab.connect(host, "10.1.0.1/16", peer, "10.1.0.2/16")
    return host


def with_neighbours(host: Host, work: Callable[[Neighbours, int], T]) -> T:
    index = host.call(socket.if_nametoindex, "eth0")

    def inside() -> T:
        neighbours = Neighbours()
        try:
            return work(neighbours, index)
        finally:
            neighbours.close()

    return host.call(inside)


def changes(neighbours: Neighbours) -> list[tuple[int, bytes | None]]:
    """What has changed once the kernel said that something did."""
    assert select.select([neighbours], [], [], 10)[0]
    return neighbours.changes()


def octets(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def test_a_next_hop_is_known_unknown_and_known_again(host: Host) -> None:
    host.run(["ip", "neigh", "add", "10.1.0.7", "lladdr", MAC, "nud", "permanent", "dev", "eth0"])

    def watch(neighbours: Neighbours, index: int) -> list[object]:
        seen: list[object] = [neighbours.use(FLOW, (index, parse_address("10.1.0.7")))]
        for change in (["del"], ["add", "lladdr", OTHER_MAC, "nud", "permanent"]):
            host.run(["ip", "neigh", change[0], "10.1.0.7", "dev", "eth0", *change[1:]])
            seen.append(changes(neighbours))
        return seen

    assert with_neighbours(host, watch) == [octets(MAC), [(FLOW, None)], [(FLOW, octets(OTHER_MAC))]]


def test_only_flows_of_the_next_hop_that_changed_are_told(host: Host) -> None:
    def watch(neighbours: Neighbours, index: int) -> list[object]:
        seen: list[object] = [
            neighbours.use(FLOW, (index, parse_address("10.1.0.7"))),
            neighbours.use(OTHER_FLOW, (index, parse_address("10.1.0.8"))),
        ]
        host.run(["ip", "neigh", "add", "10.1.0.8", "lladdr", MAC, "nud", "permanent", "dev", "eth0"])
        return [*seen, changes(neighbours)]

    assert with_neighbours(host, watch) == [None, None, [(OTHER_FLOW, octets(MAC))]]


def test_a_stale_entry_is_left_to_the_kernel(host: Host) -> None:
    host.run(["ip", "neigh", "add", "10.1.0.7", "lladdr", MAC, "nud", "stale", "dev", "eth0"])
    assert (
        with_neighbours(host, lambda known, index: known.use(FLOW, (index, parse_address("10.1.0.7"))))
        is None
    )


def test_an_interface_that_does_not_exist_has_no_neighbours(host: Host) -> None:
    assert with_neighbours(host, lambda known, _: known.use(FLOW, (4711, parse_address("10.1.0.7")))) is None


def test_lost_notifications_are_asked_for(host: Host) -> None:
    others = [f"10.1.{number // 250 + 1}.{number % 250 + 1}" for number in range(MORE_THAN_FITS)]
    lines = [f"neigh add {each} lladdr {MAC} nud permanent dev eth0\n" for each in (*others, "10.1.0.7")]

    def watch(neighbours: Neighbours, index: int) -> list[tuple[int, bytes | None]]:
        assert neighbours.use(FLOW, (index, parse_address("10.1.0.7"))) is None
        host.run(["ip", "-batch", "-"], input="".join(lines))
        return changes(neighbours)

    assert with_neighbours(host, watch) == [(FLOW, octets(MAC))]


def test_packets_that_wait_for_a_next_hop_are_dropped_when_it_is_given_up(host: Host) -> None:
    """They would hold up a flow that has gone elsewhere. A next hop that others may use is left alone."""
    host.run(["ip", "neigh", "add", "10.1.0.7", "lladdr", MAC, "nud", "stale", "dev", "eth0"])

    def entries() -> dict[str, str]:
        shown = host.run(["ip", "neigh", "show", "dev", "eth0"]).stdout.splitlines()
        return {line.split()[0]: line.split()[-1] for line in shown}

    def give_up(neighbours: Neighbours, index: int) -> tuple[dict[str, str], dict[str, str]]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"waits", ("10.1.0.9", 9))
        before = entries()
        for address in ("10.1.0.7", "10.1.0.8", "10.1.0.9"):
            neighbours.give_up((index, parse_address(address)))
        return before, entries()

    before, after = with_neighbours(host, give_up)
    assert before == {"10.1.0.7": "STALE", "10.1.0.9": "INCOMPLETE"}
    assert after == {"10.1.0.7": "STALE"}
