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
COUNTERS_MAX = 65536
LINKS_MAX = 4096
LEASE_S = 10.0

SERVICE_KEY = struct.Struct("=I32s")
TARGET = struct.Struct("=4sIIII")
LINK = struct.Struct("=4sII6s6s")
HOST = struct.Struct("=Q64s")
OWN_ADDRESSES_MAX = 16
SERVICE_COUNT = struct.Struct("=I")
COUNTER = struct.Struct("=QQ")
NO_TARGET = bytes(TARGET.size)
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
        self._link_map = self._object.map("links")
        self._links: dict[Key, int] = {}
        # The counters are read where they are: asking for each would cost a system call.
        self._memory = mmap.mmap(
            self._object.map("target_counters").fd,
            COUNTERS_MAX * COUNTER.size,
            mmap.MAP_SHARED,
            mmap.PROT_READ,
        )
        self._free = deque(range(COUNTERS_MAX))
        self._counters: dict[tuple[ServicePrefix, int], int] = {}
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
        """What is known of a next hop. Beyond 4096 of them nothing is forwarded to more."""
        index = self._links.setdefault(key, len(self._links))
        if index < LINKS_MAX:
            interface_index, next_hop = key
            known = (1, *link) if link else NO_LINK
            self._link_map.update(
                index.to_bytes(4, "little"), LINK.pack(next_hop.to_bytes(4, "big"), interface_index, *known)
            )

    def put(self, prefix: ServicePrefix, plan: Plan) -> None:
        """Say what happens under a prefix; an empty plan leaves it to user space. Raises KernelRefused when the map is full.

        The next hops of the plan have been set.
        """
        value = [SERVICE_COUNT.pack(len(plan))]
        for target in plan:
            counter = self._counter(prefix, target.address)
            link = self._links[target.interface_index, target.next_hop]
            if counter is None or link >= LINKS_MAX:
                value = [SERVICE_COUNT.pack(0)]
                break
            value.append(
                TARGET.pack(
                    target.address.to_bytes(4, "big"),
                    min(target.share_end, WHOLE_SHARE - 1),
                    target.mtu_bytes,
                    link,
                    counter,
                )
            )
        value.append(NO_TARGET * (PLANNED_TARGETS_MAX + 1 - len(value)))
        self._services.update(_key(prefix), b"".join(value))

    def delete(self, prefix: ServicePrefix) -> None:
        """Nothing is known of this prefix any more; shorter ones count again."""
        self._services.delete(_key(prefix))

    def forget_target(self, prefix: ServicePrefix, address: int) -> TargetCount | None:
        """The target is in no plan any more: its last count, if there is one."""
        counter = self._counters.pop((prefix, address), None)
        if counter is None:
            return None
        count = self._count(prefix, address, counter)
        self._free.append(counter)
        return count

    def take_counts(self) -> Iterator[TargetCount]:
        """What was forwarded since the last call."""
        for (prefix, address), counter in self._counters.items():
            count = self._count(prefix, address, counter)
            if count is not None:
                yield count

    def test_run(self, frame: bytes) -> tuple[int, bytes, int]:
        """Run the program on one Ethernet frame: its verdict, the frame and the mark afterwards."""
        return self._object.test_run("serval_route", frame)

    def _counter(self, prefix: ServicePrefix, address: int) -> int | None:
        """The counter of a target; None when all are in use."""
        counter = self._counters.get((prefix, address))
        if counter is None and self._free:
            # The one that rested longest: a program that still runs with an old entry may count in it.
            counter = self._counters[prefix, address] = self._free.popleft()
            self._counted[counter] = COUNTER.unpack_from(self._memory, counter * COUNTER.size)
        return counter

    def _count(self, prefix: ServicePrefix, address: int, counter: int) -> TargetCount | None:
        packets, packet_bytes = COUNTER.unpack_from(self._memory, counter * COUNTER.size)
        packets_before, bytes_before = self._counted[counter]
        if packets == packets_before:
            return None
        self._counted[counter] = packets, packet_bytes
        return TargetCount(prefix, address, packets - packets_before, packet_bytes - bytes_before)


def _key(prefix: ServicePrefix) -> bytes:
    return SERVICE_KEY.pack(prefix.bits, prefix.service_id)
