"""Which MAC address has the next hop right now? `Neighbours` follows the kernel's neighbour table for the next hops in use.

A flow whose next hop is REACHABLE carries the addresses in its map entry and costs no neighbour lookup per packet. In
any other state the data plane hands its packets to the kernel's neighbour code, which then probes, and the answer
makes the entry REACHABLE again. So ARP, failover of a gateway and stale entries stay the kernel's business.
"""

from __future__ import annotations

import contextlib
import socket
import struct

from serval_core.dataplane.netlink import (
    RTMGRP_NEIGH,
    ChangeMonitor,
    RouteQueries,
    attribute,
    messages,
    walk_attributes,
)
from serval_core.errors import KernelRefused

RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
NDA_DST, NDA_LLADDR = 1, 2
NUD_INCOMPLETE, NUD_REACHABLE, NUD_PERMANENT = 0x01, 0x02, 0x80
NEIGHBOUR_HEADER = struct.Struct("=BxxxiHBB")
MAC_BYTES = 6

Key = tuple[int, int]  # interface index, IPv4 address of the next hop


class Neighbours:
    """The neighbours that flows use. `fileno()` is readable when some of them may have changed."""

    def __init__(self) -> None:
        self._known: dict[Key, bytes | None] = {}
        self._users: dict[Key, set[int]] = {}
        self._key_of: dict[int, Key] = {}
        self._queries = RouteQueries()
        self._monitor = ChangeMonitor(RTMGRP_NEIGH)

    def fileno(self) -> int:
        return self._monitor.fileno()

    def close(self) -> None:
        self._queries.close()
        self._monitor.close()

    def use(self, flow_id: int, key: Key) -> bytes | None:
        """The flow sends to this next hop from now on. Its MAC address, or None: leave it to the kernel."""
        self._users.setdefault(key, set()).add(flow_id)
        self._key_of[flow_id] = key
        if key not in self._known:
            self._known[key] = self._ask(key)
        return self._known[key]

    def key_of(self, flow_id: int) -> Key | None:
        """The next hop that a flow uses."""
        return self._key_of.get(flow_id)

    def release(self, flow_id: int) -> Key | None:
        """The flow sends to its next hop no more. Which one that was; None if it had none."""
        key = self._key_of.pop(flow_id, None)
        if key is not None:
            users = self._users[key]
            users.discard(flow_id)
            if not users:
                del self._users[key], self._known[key]
        return key

    def give_up(self, key: Key) -> None:
        """Drop the packets that wait for this next hop's address, if there are any.

        They count as being under way, and TCP does not repeat what is: not even on a path that works. The kernel
        would keep them for three seconds.
        """
        if not self._is_awaited(key):
            return
        interface_index, address = key
        body = NEIGHBOUR_HEADER.pack(socket.AF_INET, interface_index, 0, 0, 0)
        body += attribute(NDA_DST, address.to_bytes(4, "big"))
        with contextlib.suppress(KernelRefused):  # there is no such entry, or not even the interface
            self._queries.order("RTM_DELNEIGH", RTM_DELNEIGH, body)

    def changes(self) -> list[tuple[int, bytes | None]]:
        """(flow, MAC address or None) of every flow whose next hop has changed since the last call."""
        before = dict(self._known)
        changes = self._monitor.drain()
        if changes.lost:
            for key in self._known:
                self._known[key] = self._ask(key)
        else:
            for datagram in changes.datagrams:
                self._take(datagram)
        return [
            (flow_id, mac)
            for key, mac in self._known.items()
            if mac != before[key]
            for flow_id in self._users[key]
        ]

    def _take(self, datagram: bytes) -> None:
        """Note what the messages say of next hops in use."""
        for message in messages(datagram):
            if message.kind in (RTM_NEWNEIGH, RTM_DELNEIGH):
                key, mac = _decode(message.body)
                if key in self._known:
                    self._known[key] = mac if message.kind == RTM_NEWNEIGH else None

    def _ask(self, key: Key) -> bytes | None:
        body = self._entry(key)
        return None if body is None else _decode(body)[1]

    def _is_awaited(self, key: Key) -> bool:
        """Whether the kernel has asked for this address for the first time, and keeps packets meanwhile."""
        body = self._entry(key)
        return body is not None and bool(NEIGHBOUR_HEADER.unpack_from(body)[2] & NUD_INCOMPLETE)

    def _entry(self, key: Key) -> bytes | None:
        """The body of the kernel's message about a next hop."""
        interface_index, address = key
        body = NEIGHBOUR_HEADER.pack(socket.AF_INET, interface_index, 0, 0, 0)
        body += attribute(NDA_DST, address.to_bytes(4, "big"))
        try:
            return self._queries.ask("RTM_GETNEIGH", RTM_GETNEIGH, body).body
        except KernelRefused:
            # Most often there is no entry yet. Whatever it is, the kernel's own neighbour code will meet it too.
            return None


def _decode(body: bytes) -> tuple[Key, bytes | None]:
    """The next hop that the body of a neighbour message is about, and its MAC address if that may be used without asking."""
    family, interface_index, state, _, _ = NEIGHBOUR_HEADER.unpack_from(body)
    attributes = dict(walk_attributes(body, NEIGHBOUR_HEADER.size))
    address = int.from_bytes(attributes.get(NDA_DST, b""), "big") if family == socket.AF_INET else 0
    mac = attributes.get(NDA_LLADDR, b"")
    usable = state & (NUD_REACHABLE | NUD_PERMANENT) and len(mac) == MAC_BYTES
    return (interface_index, address), mac if usable else None
