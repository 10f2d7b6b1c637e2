"""Which addresses has this host, and which way out leads to a peer? `KernelPaths` answers both from what the kernel says.

Paths are asked per peer (RTM_GETROUTE, some 20 µs) and remembered until the kernel reports a change of links, addresses or routes.
It does not know the SAL; `paths.PathFinder` is the interface between them.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import Any

from serval_core.addresses import is_loopback
from serval_core.dataplane.netlink import Netlink, RouteQueries, attribute, walk_attributes
from serval_core.errors import KernelRefused
from serval_core.names import parse_address
from serval_core.paths import Interface, Path

RTM_GETROUTE = 26
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_METRICS, RTAX_MTU = 1, 4, 5, 7, 8, 2
RTN_UNICAST, RTN_LOCAL, RTN_BROADCAST = 1, 2, 3
RTM_F_FIB_MATCH = 0x2000
ROUTE_HEADER = struct.Struct("=BBBBBBBBI")
# What the kernel answers when there is no path; EACCES: a prohibit route.
NO_PATH = frozenset({errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.ENODEV, errno.EACCES})
CACHE_LIMIT = 65536
# bpf_skb_change_head refuses packets beyond what one allocation holds (16 KiB less overhead); only loopback has a larger MTU.
PACKET_BYTES_MAX = 15000
IFF_UP = 0x1
IFF_LOOPBACK = 0x8
IFF_LOWER_UP = 0x10000  # there is a carrier


class KernelPaths:
    """The host's interfaces and paths.

    `ignored` names our own devices; `only` restricts to the listed interfaces (and loopback).
    """

    def __init__(self, netlink: Netlink, ignored: frozenset[str], only: Sequence[str] | None) -> None:
        self._netlink = netlink
        self._ignored = ignored
        self._only = None if only is None else frozenset(only)
        self._queries = RouteQueries()
        self._cache: dict[tuple[int, int], Path | None] = {}
        self._interfaces: tuple[Interface, ...] = ()
        self._by_index: dict[int, Interface] = {}
        self._owners: dict[int, int] = {}  # address -> interface index
        self.refresh()

    def close(self) -> None:
        self._queries.close()

    def interfaces(self) -> Sequence[Interface]:
        return self._interfaces

    def has_address(self, address: int) -> bool:
        return self.interface_of(address) is not None

    def interface_of(self, address: int) -> Interface | None:
        """The interface that has this address, which need not be its first one."""
        return self._by_index.get(self._owners.get(address, 0))

    def refresh(self) -> None:
        """Ask the kernel again; forget all paths."""
        self._cache.clear()
        links = self._netlink.run("list links", lambda ip: list(ip.get_links()))
        addresses = self._netlink.run("list addresses", lambda ip: list(ip.get_addr(family=socket.AF_INET)))
        self._owners = {parse_address(each.get("IFA_LOCAL") or each.get("IFA_ADDRESS")): each["index"] for each in addresses}
        first_address: dict[int, Any] = {}
        for entry in addresses:
            first_address.setdefault(entry["index"], entry)
        found = []
        for link in links:
            name, index = link.get("IFLA_IFNAME"), link["index"]
            entry = first_address.get(index)
            if name in self._ignored or entry is None or not link["flags"] & IFF_UP:
                continue
            loopback = bool(link["flags"] & IFF_LOOPBACK)
            if not loopback and not link["flags"] & IFF_LOWER_UP:
                continue
            if self._only is not None and name not in self._only and not loopback:
                continue
            broadcast = entry.get("IFA_BROADCAST")
            local = entry.get("IFA_LOCAL") or entry.get("IFA_ADDRESS")
            found.append(
                Interface(
                    index,
                    name,
                    parse_address(local),
                    entry["prefixlen"],
                    parse_address(broadcast) if broadcast and not loopback else 0,
                    link.get("IFLA_MTU"),
                    b"" if loopback else bytes.fromhex((link.get("IFLA_ADDRESS") or "").replace(":", "")),
                )
            )
        self._interfaces = tuple(found)
        self._by_index = {interface.index: interface for interface in found}

    def path_to(self, address: int, interface_index: int = 0) -> Path | None:
        key = (address, interface_index)
        try:
            return self._cache[key]
        except KeyError:
            if len(self._cache) >= CACHE_LIMIT:
                self._cache.clear()
            path = self._cache[key] = self._query(address, interface_index)
            return path

    def _query(self, address: int, interface_index: int) -> Path | None:
        answer = self._answer(address, 0, 0)
        path = None if answer is None else self._decode(answer, address)
        if not interface_index:
            if answer is None or path is not None:
                return path
            # The kernel goes on to name interfaces without a carrier, and such as we are not to use.
            others = (self.path_to(address, each.index) for each in self._interfaces if not is_loopback(each.address))
            return next((each for each in others if each is not None), None)
        if path is not None and path.interface_index == interface_index:
            return path
        # Without a route through the given interface the kernel answers as if the address were on its link.
        if self._answer(address, interface_index, RTM_F_FIB_MATCH) is None:
            return None
        return self._ask(address, interface_index)

    def _ask(self, address: int, interface_index: int) -> Path | None:
        answer = self._answer(address, interface_index, 0)
        return None if answer is None else self._decode(answer, address)

    def _answer(self, address: int, interface_index: int, flags: int) -> bytes | None:
        """The body of the kernel's RTM_NEWROUTE message, None when there is no route."""
        body = ROUTE_HEADER.pack(socket.AF_INET, 32, 0, 0, 0, 0, 0, 0, flags)
        body += attribute(RTA_DST, address.to_bytes(4, "big"))
        if interface_index:
            body += attribute(RTA_OIF, struct.pack("=I", interface_index))
        try:
            return self._queries.ask("RTM_GETROUTE", RTM_GETROUTE, body).body
        except KernelRefused as refusal:
            if refusal.errno in NO_PATH:
                return None
            raise

    def _decode(self, answer: bytes, address: int) -> Path | None:
        route_type = answer[7]
        if route_type not in (RTN_UNICAST, RTN_LOCAL, RTN_BROADCAST):
            return None
        attributes = dict(walk_attributes(answer, ROUTE_HEADER.size))
        index = int.from_bytes(attributes.get(RTA_OIF, b""), "little")
        interface = self._by_index.get(index)
        if interface is None:
            return None
        metrics = dict(walk_attributes(attributes.get(RTA_METRICS, b""), 0))
        mtu = int.from_bytes(metrics.get(RTAX_MTU, b""), "little")
        source = attributes.get(RTA_PREFSRC)
        gateway = attributes.get(RTA_GATEWAY)
        return Path(
            index,
            interface.name,
            int.from_bytes(source, "big") if source else interface.address,
            int.from_bytes(gateway, "big") if gateway else address,
            min(PACKET_BYTES_MAX, mtu or interface.mtu_bytes),
        )
