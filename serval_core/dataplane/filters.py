"""How do programs get onto interfaces, and off again?

By links of tcx where the kernel has them (Linux 6.6): they cost less per packet and vanish with the process. Else as
filters of clsact; those stay when the process dies, and the next start finds them by priority and handle.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from pyroute2.netlink.exceptions import NetlinkError

from serval_core.dataplane import bpf_loader
from serval_core.dataplane.netlink import Netlink
from serval_core.errors import KernelRefused

INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3  # the parents of clsact's filters


class Place(NamedTuple):
    """Where a program runs. Of those on one side of an interface the one with the lower priority must be added first."""

    interface_index: int
    priority: int
    egress: bool = False


class Filters:
    """Programs on interfaces. Owns what holds them there until `remove` or `close`.

    Without `use_links` clsact is used whatever the kernel has.
    """

    def __init__(self, netlink: Netlink, use_links: bool = True) -> None:
        self._netlink = netlink
        self._use_links = use_links
        self._links: dict[Place, int | None] = {}  # the link's fd; None: a filter of clsact
        self._own_clsact: set[int] = set()

    def add(self, place: Place, program_fd: int) -> None:
        """Have the program run there; does nothing if one of ours does already."""
        if place in self._links:
            return
        index, priority, egress = place
        link = bpf_loader.link_tcx(index, egress, program_fd) if self._use_links else None
        if link is None and bpf_loader.attach_tc(index, egress, program_fd, priority, priority):
            self._own_clsact.add(index)
        self._links[place] = link

    def remove(self, place: Place) -> None:
        """Take it off again, and clsact with it if it was ours and nobody else uses it now. The interface may be gone."""
        if place not in self._links:
            return
        index, priority, egress = place
        link = self._links.pop(place)
        if link is not None:
            os.close(link)
        else:
            bpf_loader.detach_tc(index, egress, priority, priority)
            self._remove_own_clsact(index)

    def close(self) -> None:
        """Take all off."""
        for place in list(self._links):
            self.remove(place)

    def interfaces(self, priority: int) -> frozenset[int]:
        """Where a program of this priority sees what comes in."""
        return frozenset(
            place.interface_index for place in self._links if place.priority == priority and not place.egress
        )

    def remove_left(self, interface_index: int, priorities: tuple[int, ...]) -> bool:
        """Remove what a crashed predecessor left there; False if there was nothing."""
        removed = [
            bpf_loader.detach_tc(interface_index, False, priority, priority) for priority in priorities
        ]
        if any(removed) and not self._has_filters(interface_index):
            bpf_loader.remove_clsact(interface_index)
        return any(removed)

    def _remove_own_clsact(self, index: int) -> None:
        still_used = any(
            place.interface_index == index and link is None for place, link in self._links.items()
        )
        if index in self._own_clsact and not still_used:
            self._own_clsact.remove(index)
            if not self._has_filters(index):
                bpf_loader.remove_clsact(index)

    def _has_filters(self, interface_index: int) -> bool:
        def count(ip: Any) -> int:
            return sum(
                len(list(ip.get_filters(index=interface_index, parent=parent)))
                for parent in (INGRESS, EGRESS)
            )

        try:
            return self._netlink.run("list filters", count) > 0
        except (KernelRefused, NetlinkError):
            return False
