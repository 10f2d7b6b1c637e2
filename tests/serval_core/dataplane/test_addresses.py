"""Interfaces and paths, as a real namespace has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest

from lab.hosts import Host, Lab
from lab.waiting import wait_for
from serval_core.dataplane.addresses import PACKET_BYTES_MAX, KernelPaths
from serval_core.dataplane.netlink import ChangeMonitor, Netlink
from serval_core.names import format_address, parse_address
from serval_core.paths import Path

T = TypeVar("T")


@pytest.fixture
def host(lab: Lab) -> Host:
    """Two interfaces, a gateway on the second, one device to be ignored."""
    host, left, right = lab.host("host"), lab.host("left"), lab.host("right")
    lab.connect(host, "10.1.0.1/24", left, "10.1.0.2/24")
    lab.connect(host, "10.2.0.1/16", right, "10.2.0.254/16", mtu=1400)
    host.run(["ip", "route", "add", "192.0.2.0/24", "via", "10.2.0.254"])
    host.run(["ip", "route", "add", "198.51.100.0/24", "via", "10.2.0.254", "mtu", "1300"])
    host.run(["ip", "route", "add", "prohibit", "203.0.113.0/24"])
    return host


def with_paths(host: Host, work: Callable[[KernelPaths], T], only: list[str] | None = None) -> T:
    def inside() -> T:
        netlink = Netlink()
        paths = KernelPaths(netlink, frozenset({"ignored0"}), only)
        try:
            return work(paths)
        finally:
            paths.close()
            netlink.close()

    return host.call(inside)


def described(path: Path | None) -> tuple[str, str, str, int] | None:
    if path is None:
        return None
    return (
        path.interface_name,
        format_address(path.source_address),
        format_address(path.next_hop),
        path.mtu_bytes,
    )


@pytest.mark.parametrize(
    ("destination", "expected"),
    [
        ("10.1.0.2", ("eth0", "10.1.0.1", "10.1.0.2", 1500)),
        ("192.0.2.9", ("eth1", "10.2.0.1", "10.2.0.254", 1400)),
        ("198.51.100.1", ("eth1", "10.2.0.1", "10.2.0.254", 1300)),
        ("127.0.0.1", ("lo", "127.0.0.1", "127.0.0.1", PACKET_BYTES_MAX)),
        ("10.1.0.1", ("lo", "10.1.0.1", "10.1.0.1", PACKET_BYTES_MAX)),
        ("203.0.113.1", None),
        ("8.8.8.8", None),
    ],
)
def test_path(host: Host, destination: str, expected: tuple[str, str, str, int] | None) -> None:
    assert with_paths(host, lambda paths: described(paths.path_to(parse_address(destination)))) == expected


def test_path_through_a_given_interface(host: Host) -> None:
    """There must be a route: the kernel would take any address for one on the link when asked about an interface."""
    host.run(["ip", "route", "add", "198.51.100.0/24", "via", "10.1.0.2", "metric", "99"])

    def ask(paths: KernelPaths) -> dict[tuple[str, str], tuple[str, str, str, int] | None]:
        indexes = {interface.name: interface.index for interface in paths.interfaces()}
        return {
            (destination, name): described(paths.path_to(parse_address(destination), indexes[name]))
            for destination in ("192.0.2.9", "198.51.100.1", "203.0.113.1", "8.8.8.8")
            for name in ("eth0", "eth1")
        }

    assert with_paths(host, ask) == {
        ("192.0.2.9", "eth0"): None,
        ("192.0.2.9", "eth1"): ("eth1", "10.2.0.1", "10.2.0.254", 1400),
        ("198.51.100.1", "eth0"): ("eth0", "10.1.0.1", "10.1.0.2", 1500),
        ("198.51.100.1", "eth1"): ("eth1", "10.2.0.1", "10.2.0.254", 1300),
        ("203.0.113.1", "eth0"): None,
        ("203.0.113.1", "eth1"): None,
        ("8.8.8.8", "eth0"): None,
        ("8.8.8.8", "eth1"): None,
    }


def test_interfaces_with_broadcast_addresses(host: Host) -> None:
    found = with_paths(
        host,
        lambda paths: {
            interface.name: (
                format_address(interface.broadcast_address),
                interface.prefix_length,
                interface.mtu_bytes,
            )
            for interface in paths.interfaces()
        },
    )
    assert found["eth0"] == ("10.1.0.255", 24, 1500)
    assert found["eth1"] == ("10.2.255.255", 16, 1400)
    assert found["lo"][0] == "0.0.0.0"


def test_only_listed_interfaces_are_used(host: Host) -> None:
    def ask(paths: KernelPaths) -> tuple[set[str], Path | None]:
        return {interface.name for interface in paths.interfaces()}, paths.path_to(parse_address("10.1.0.2"))

    assert with_paths(host, ask, only=["eth1"]) == ({"lo", "eth1"}, None)


def test_change_is_noticed_and_paths_are_asked_again(host: Host) -> None:
    def ask(paths: KernelPaths) -> list[Path | None]:
        monitor = ChangeMonitor()
        before = paths.path_to(parse_address("8.8.8.8"))
        host.run(["ip", "route", "add", "default", "via", "10.2.0.254"])

        def noticed() -> bool:
            monitor.drain()
            paths.refresh()
            return paths.path_to(parse_address("8.8.8.8")) is not None

        wait_for(noticed, "the new route is used")
        monitor.close()
        return [before, paths.path_to(parse_address("8.8.8.8"))]

    before, after = with_paths(host, ask)
    assert before is None
    assert described(after) == ("eth1", "10.2.0.1", "10.2.0.254", 1400)
