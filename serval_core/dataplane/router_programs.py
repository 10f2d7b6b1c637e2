"""How does the kernel forward for a service router? Loads `serval_router.bpf.c` and keeps its maps.

It knows plans and addresses, not the service table: `router` tells it what to put in. `devices` attaches the program, and the
next start removes what a crash left; until then the lease runs out and the program does nothing.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections import deque
from collections.abc import Iterator, Set
from pathlib import Path as FilePath
from typing import NamedTuple

from serval_core.dataplane import bpf_loader
from serval_core.dataplane.neighbours import Key
from serval_core.dataplane.next_hops import Link
from serval_core.forwarding_plan import PLANNED_TARGETS_MAX, WHOLE_SHARE, Plan
from serval_core.names import ServicePrefix

OBJECT_FILE = FilePath(__file__).parent / "bpf" / "serval_router.bpf.o"
PREFIXES_MAX = 65536
TARGETS_MAX = 65536
LINKS_MAX = 4096
LEASE_S = 10.0

SERVICE_KEY = struct.Struct("=I32s")
SERVICE = struct.Struct(f"=I{PLANNED_TARGETS_MAX}I{PLANNED_TARGETS_MAX}I")
TARGET = struct.Struct("=4sII")
LINK = struct.Struct("=4sII6s6s")
HOST = struct.Struct("=Q64s")
OWN_ADDRESSES_MAX = 16
COUNTER = struct.Struct("=QQ")
NO_LINK = 0, bytes(6), bytes(6)
FIRST = bytes(4)


class TargetCount(NamedTuple):
    """How many packets went to a target of a prefix since the last time; bytes are those behind the SAL header."""

    prefix: ServicePrefix
    address: int
    packets: int
    bytes: int


class RouterPrograms:
    """The loaded program and its maps. Raises KernelRefused when the kernel does not take it, and OSError
    when there is no memory."""

    def __init__(self) -> None:
        self._object = bpf_loader.BpfObject(str(OBJECT_FILE))
        self.program_fd = self._object.program_fd("serval_route")
        self._services = self._object.map("services")
        self._host = self._object.map("host")
        self._targets = self._object.map("targets")
        self._link_map = self._object.map("links")
        self._links: dict[Key, int] = {}  # those set last at the end
        self._free_links = deque(range(LINKS_MAX))
        self._link_of: dict[int, Key] = {}  # by the index of a target
        # The counters are read where they are: asking for each would cost a system call.
        self._memory = mmap.mmap(
            self._object.map("target_counters").fd,
            TARGETS_MAX * COUNTER.size,
            mmap.MAP_SHARED,
            mmap.PROT_READ,
        )
        self._free = deque(range(TARGETS_MAX))
        self._indexes: dict[tuple[ServicePrefix, int], int] = {}
        self._counted: dict[int, tuple[int, int]] = {}
        self._own_addresses = b""

    def close(self) -> None:
        """Free the maps, and the program unless it is attached."""
        self._memory.close()
        self._object.close()

    def set_own_addresses(self, addresses: Set[int]) -> None:
        """Only what comes to these addresses is forwarded, and nothing that pretends to come from them. Ends the lease.

        Packets to all but the first 16 are left to user space.
        """
        used = sorted(addresses)[:OWN_ADDRESSES_MAX]
        self._own_addresses = b"".join(address.to_bytes(4, "big") for address in used)
        self.end_lease()

    def extend_lease(self) -> None:
        """The maps are right: act on them for some seconds more."""
        self._host.update(FIRST, HOST.pack(int((time.monotonic() + LEASE_S) * 1e9), self._own_addresses))

    def end_lease(self) -> None:
        """The maps are not right: leave everything to user space."""
        self._host.update(FIRST, HOST.pack(0, self._own_addresses))

    def set_link(self, key: Key, link: Link | None) -> None:
        """What is known of a next hop. Beyond 4096 that are used nothing is forwarded to more."""
        if key not in self._links and not self._free_links:
            self._free_unused_links()
        if key in self._links:
            index = self._links[key] = self._links.pop(key)
        elif self._free_links:
            index = self._links[key] = self._free_links.popleft()
        else:
            return
        interface_index, next_hop = key
        known = (1, *link) if link else NO_LINK
        self._link_map.update(
            index.to_bytes(4, "little"), LINK.pack(next_hop.to_bytes(4, "big"), interface_index, *known)
        )

    def put(self, prefix: ServicePrefix, plan: Plan) -> None:
        """Say what happens under a prefix; an empty plan leaves it to user space. Raises KernelRefused when the map is full.

        The next hops of the plan have been set.
        """
        indexes = []
        for target in plan:
            index = self._index(prefix, target.address)
            key = target.interface_index, target.next_hop
            link = self._links.get(key)
            if index is None or link is None:
                plan = ()
                break
            self._link_of[index] = key
            value = TARGET.pack(target.address.to_bytes(4, "big"), target.mtu_bytes, link)
            self._targets.update(index.to_bytes(4, "little"), value)
            indexes.append(index)
        shares = [min(target.share_end, WHOLE_SHARE - 1) for target in plan]
        unused = [0] * (PLANNED_TARGETS_MAX - len(plan))
        service = SERVICE.pack(len(plan), *shares, *unused, *indexes[: len(plan)], *unused)
        self._services.update(_key(prefix), service)

    def delete(self, prefix: ServicePrefix) -> None:
        """Nothing is known of this prefix any more; shorter ones count again."""
        self._services.delete(_key(prefix))

    def forget_target(self, prefix: ServicePrefix, address: int) -> TargetCount | None:
        """The target is in no plan any more: its last count, if there is one."""
        index = self._indexes.pop((prefix, address), None)
        if index is None:
            return None
        count = self._count(prefix, address, index)
        self._free.append(index)
        self._link_of.pop(index, None)
        return count

    def take_counts(self) -> Iterator[TargetCount]:
        """What was forwarded since the last call."""
        for (prefix, address), index in self._indexes.items():
            count = self._count(prefix, address, index)
            if count is not None:
                yield count

    def test_run(self, frame: bytes) -> tuple[int, bytes, int]:
        """Run the program on one Ethernet frame: its verdict, the frame and the mark afterwards."""
        return self._object.test_run("serval_route", frame)

    def _free_unused_links(self) -> None:
        """Next hops of no target make room, except those that may have been set for the next plan."""
        used = set(self._link_of.values())
        for key in list(self._links)[:-PLANNED_TARGETS_MAX]:
            if key not in used:
                self._free_links.append(self._links.pop(key))

    def _index(self, prefix: ServicePrefix, address: int) -> int | None:
        """Where a target stands; None when all places are taken."""
        index = self._indexes.get((prefix, address))
        if index is None and self._free:
            # The place that rested longest: a program that still runs with an old entry may count there.
            index = self._indexes[prefix, address] = self._free.popleft()
            self._counted[index] = COUNTER.unpack_from(self._memory, index * COUNTER.size)
        return index

    def _count(self, prefix: ServicePrefix, address: int, index: int) -> TargetCount | None:
        packets, packet_bytes = COUNTER.unpack_from(self._memory, index * COUNTER.size)
        packets_before, bytes_before = self._counted[index]
        if packets == packets_before:
            return None
        self._counted[index] = packets, packet_bytes
        return TargetCount(prefix, address, packets - packets_before, packet_bytes - bytes_before)


def _key(prefix: ServicePrefix) -> bytes:
    return SERVICE_KEY.pack(prefix.bits, prefix.service_id)
