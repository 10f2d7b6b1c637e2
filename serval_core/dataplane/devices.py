"""Which devices, addresses, routes and filters do we leave in the kernel, and how do they go away again?

`serval0`/`serval1` anchor the kernel sockets of all flows. `seg0` cuts superpackets into segments, `sum0` also
finishes their checksums; both lead to `sum1`, where headers are inserted. Everything carries a fixed name,
priority or handle, so that the next start finds and removes what a crash left (`remove_leftovers`).
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Set
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from serval_core.dataplane.filters import Filters, Place
from serval_core.dataplane.netfilter import NetfilterRules
from serval_core.dataplane.netlink import Netlink
from serval_core.errors import KernelRefused
from serval_core.names import format_address

ANCHOR, ANCHOR_OUTER, SEGMENTER, CHECKSUM, CHECKSUM_OUTER = "serval0", "serval1", "seg0", "sum0", "sum1"
OWN_DEVICES = frozenset({ANCHOR, ANCHOR_OUTER, SEGMENTER, CHECKSUM, CHECKSUM_OUTER})
# serval.bpf.c writes the anchor's address into each delivered frame.
ANCHOR_MAC, OUTER_MAC = "02:53:41:4c:00:00", "02:53:41:4c:00:01"
# Each flow has its MSS from the handshake, so the device never limits it.
ANCHOR_MTU = 65000
QUEUE_PACKETS = 4096
# TCP remembers round trips and disorder by destination, and a virtual address stands for another peer each time: what one flow
# measured must not become the first timeout of another. Locked, the round trip makes that timeout 1 s (RFC 6298, 2.1).
RTAX_RTT, RTAX_RTTVAR, RTAX_SSTHRESH, RTAX_REORDERING = 4, 5, 6, 9
ROUTE_METRICS = {
    "lock": 1 << RTAX_RTT | 1 << RTAX_RTTVAR | 1 << RTAX_SSTHRESH | 1 << RTAX_REORDERING,
    "rtt": 8 * 333,  # in 1/8 ms; the timeout is three times this
}
FILTER_PRIORITY = 0x5341
# Asked after serval_in, which takes the data of this host's flows.
ROUTER_FILTER_PRIORITY = 0x5342

SEGMENTATION_OFF = dict.fromkeys(
    (
        "tx-tcp-segmentation",
        "tx-tcp-ecn-segmentation",
        "tx-tcp-mangleid-segmentation",
        "tx-tcp6-segmentation",
    ),
    False,
)


def write_sysctl(path: str, value: str) -> None:
    """Set /proc/sys/`path`."""
    try:
        FilePath("/proc/sys", path).write_text(value)
    except OSError as error:
        raise KernelRefused(f"write /proc/sys/{path}", error.errno or 0, "Needs CAP_NET_ADMIN.") from error


def _set_up(index: int, ip: Any) -> None:
    ip.link("set", index=index, state="up")


class Devices:
    """Our devices in this namespace. `create()` once, `remove()` at the end; both leave nothing half-done behind."""

    def __init__(self, netlink: Netlink, local_address: int, remote_network: int) -> None:
        self._netlink = netlink
        self._local_address = format_address(local_address)
        self._remote_network = format_address(remote_network) + "/16"
        self._gateway = format_address(remote_network + 1)
        self.netfilter = NetfilterRules(ANCHOR, ANCHOR_OUTER, self._local_address)
        self._own_filters = Filters(netlink)
        self._filters = Filters(netlink)  # on the interfaces of others

    def remove_leftovers(self) -> list[str]:
        """Remove what a crashed predecessor left; returns what was found, for the log."""
        found = []
        for link in self._netlink.run("list links", lambda ip: list(ip.get_links())):
            name, index = link.get("IFLA_IFNAME"), link["index"]
            if name in (ANCHOR, CHECKSUM):
                found.append(name)
                self._delete_link(name)
            elif name not in OWN_DEVICES and self._filters.remove_left(
                index, (FILTER_PRIORITY, ROUTER_FILTER_PRIORITY)
            ):
                found.append(f"filter on {name}")
        return found + self.netfilter.remove()

    def create(self) -> dict[str, int]:
        """Create devices, address and route; returns name -> interface index."""
        netlink = self._netlink

        def add_pair(ip: Any, name: str, mac: str, peer: str, peer_mac: str) -> None:
            ip.link(
                "add",
                ifname=name,
                kind="veth",
                address=mac,
                mtu=ANCHOR_MTU,
                peer={"ifname": peer, "address": peer_mac, "mtu": ANCHOR_MTU, "txqlen": QUEUE_PACKETS},
            )

        netlink.run("create serval0", lambda ip: add_pair(ip, ANCHOR, ANCHOR_MAC, ANCHOR_OUTER, OUTER_MAC))
        netlink.run(
            "create sum0",
            lambda ip: add_pair(ip, CHECKSUM, "02:53:41:4c:00:02", CHECKSUM_OUTER, "02:53:41:4c:00:03"),
        )
        # A macvlan transmits through the device below it in the same call, with no queue between. One that takes a single
        # segment makes the kernel cut superpackets on the way in, whatever the sockets' own device can do.
        lower = socket.if_nametoindex(CHECKSUM_OUTER)
        netlink.run(
            "create seg0",
            lambda ip: ip.link(
                "add",
                ifname=SEGMENTER,
                kind="macvlan",
                link=lower,
                macvlan_mode="private",
                mtu=ANCHOR_MTU,
                gso_max_segs=1,
            ),
        )
        indexes = {name: socket.if_nametoindex(name) for name in OWN_DEVICES}
        for name in OWN_DEVICES:
            if FilePath(f"/proc/sys/net/ipv6/conf/{name}").exists():
                write_sysctl(f"net/ipv6/conf/{name}/disable_ipv6", "1")
        # The effective rp_filter is the maximum of `all` and the device's; 2 (loose) is satisfied by our route.
        write_sysctl(f"net/ipv4/conf/{ANCHOR}/rp_filter", "2")
        # Without TSO on serval1 the kernel runs GRO on what arrives at serval0.
        netlink.set_features(ANCHOR, {"rx-gro": True})
        netlink.set_features(ANCHOR_OUTER, SEGMENTATION_OFF | {"rx-gro": False})
        netlink.set_features(CHECKSUM, SEGMENTATION_OFF | {"tx-checksum-ip-generic": False})
        # GRO reads from a ring of 256 packets. With a queue before it a full ring makes packets wait (Linux 6.16) instead of
        # being dropped. This one takes no lock for a packet that need not wait; its limit is the device's queue length.
        netlink.run("add queue", lambda ip: ip.tc("add", "pfifo_fast", indexes[ANCHOR_OUTER]))
        for index in indexes.values():
            netlink.run("set link up", partial(_set_up, index))
        anchor = indexes[ANCHOR]
        netlink.run(
            "add address", lambda ip: ip.addr("add", index=anchor, address=self._local_address, prefixlen=32)
        )
        netlink.run(
            "add neighbour",
            lambda ip: ip.neigh(
                "add", dst=self._gateway, lladdr=OUTER_MAC, ifindex=anchor, state=0x80
            ),  # NUD_PERMANENT
        )
        netlink.run(
            "add route",
            lambda ip: ip.route(
                "add",
                dst=self._remote_network,
                oif=anchor,
                gateway=self._gateway,
                flags=["onlink"],
                metrics=ROUTE_METRICS,
            ),
        )
        self.netfilter.create()
        return indexes

    def attach_own(self, indexes: dict[str, int], out_fd: int, insert_fd: int) -> None:
        """Put `serval_out` and `serval_insert` on our own devices; `indexes` is what `create` returned."""
        self._own_filters.add(Place(indexes[ANCHOR], FILTER_PRIORITY, egress=True), out_fd)
        for egress in (False, True):  # from sum0, from seg0
            self._own_filters.add(Place(indexes[CHECKSUM_OUTER], FILTER_PRIORITY, egress), insert_fd)

    def attach(self, interface_indexes: Set[int], program_fd: int) -> None:
        """Have `serval_in` on the ingress of exactly these interfaces."""
        for index in self._filters.interfaces(FILTER_PRIORITY) - interface_indexes:
            self._filters.remove(Place(index, ROUTER_FILTER_PRIORITY))
            self._filters.remove(Place(index, FILTER_PRIORITY))
        for index in interface_indexes:
            self._filters.add(Place(index, FILTER_PRIORITY), program_fd)

    def attach_router(self, interface_indexes: Set[int], program_fd: int) -> None:
        """Have `serval_route` behind `serval_in` on exactly these interfaces, of those that have that."""
        wanted = interface_indexes & self._filters.interfaces(FILTER_PRIORITY)
        for index in self._filters.interfaces(ROUTER_FILTER_PRIORITY) - wanted:
            self._filters.remove(Place(index, ROUTER_FILTER_PRIORITY))
        for index in wanted:
            self._filters.add(Place(index, ROUTER_FILTER_PRIORITY), program_fd)

    def remove(self) -> None:
        """Remove everything. Safe to call when `create` failed half-way."""
        self._filters.close()
        self._own_filters.close()
        for name in (ANCHOR, CHECKSUM):
            self._delete_link(name)
        self.netfilter.remove()

    def _delete_link(self, name: str) -> None:
        with contextlib.suppress(OSError):  # not there: nothing to delete
            index = socket.if_nametoindex(name)
            self._netlink.run(f"delete {name}", lambda ip: ip.link("del", index=index))
