"""Which MAC address has the next hop right now? `Neighbours` follows the kernel's neighbour table for the next hops in use.

A flow whose next hop is REACHABLE carries the addresses in its map entry and costs no neighbour lookup per packet. In
any other state the data plane hands its packets to the kernel's neighbour code, which then probes, and the answer
makes the entry REACHABLE again. So ARP, failover of a gateway and stale entries stay the kernel's business.
"""

from __future__ import annotations

import errno
import socket
import struct

from serval_core.dataplane.addresses import ATTRIBUTE_HEADER, MESSAGE_HEADER, walk_attributes

RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
NLM_F_REQUEST = 1
RTMGRP_NEIGH = 0x4
NDA_DST, NDA_LLADDR = 1, 2
NUD_REACHABLE, NUD_PERMANENT = 0x02, 0x80
NEIGHBOUR_HEADER = struct.Struct("=BxxxiHBB")
MAC_BYTES = 6

Key = tuple[int, int]  # interface index, IPv4 address of the next hop


class Neighbours:
    """The neighbours that flows use. `fileno()` is readable when some of them may have changed."""

    def __init__(self) -> None:
        self._known: dict[Key, bytes | None] = {}
        self._users: dict[Key, set[int]] = {}
        self._key_of: dict[int, Key] = {}
        self._asking = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._asking.settimeout(1.0)
        self._listening = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        self._listening.bind((0, RTMGRP_NEIGH))
        self._sequence = 0

    def fileno(self) -> int:
        return self._listening.fileno()

    def close(self) -> None:
        self._asking.close()
        self._listening.close()

    def use(self, flow_id: int, key: Key) -> bytes | None:
        """The flow sends to this next hop from now on. Its MAC address, or None: leave it to the kernel."""
        self._users.setdefault(key, set()).add(flow_id)
        self._key_of[flow_id] = key
        if key not in self._known:
            self._known[key] = self._ask(key)
        return self._known[key]

    def release(self, flow_id: int) -> None:
        """The flow is gone."""
        key = self._key_of.pop(flow_id, None)
        if key is not None:
            users = self._users[key]
            users.discard(flow_id)
            if not users:
                del self._users[key], self._known[key]

    def changes(self) -> list[tuple[int, bytes | None]]:
        """(flow, MAC address or None) of every flow whose next hop has changed since the last call."""
        before = dict(self._known)
        while True:
            try:
                data = self._listening.recv(65536)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # Notifications were lost: ask for all that matter.
                for key in self._known:
                    self._known[key] = self._ask(key)
                continue
            self._take(data)
        return [
            (flow_id, mac) for key, mac in self._known.items() if mac != before[key] for flow_id in self._users[key]
        ]

    def _take(self, data: bytes) -> None:
        """Note what the messages say of next hops in use."""
        offset = 0
        while offset + MESSAGE_HEADER.size <= len(data):
            length, kind, _, _, _ = MESSAGE_HEADER.unpack_from(data, offset)
            if length < MESSAGE_HEADER.size:
                return
            if kind in (RTM_NEWNEIGH, RTM_DELNEIGH):
                key, mac = _decode(data[offset : offset + length])
                if key in self._known:
                    self._known[key] = mac if kind == RTM_NEWNEIGH else None
            offset += (length + 3) & ~3

    def _ask(self, key: Key) -> bytes | None:
        interface_index, address = key
        body = NEIGHBOUR_HEADER.pack(socket.AF_INET, interface_index, 0, 0, 0)
        body += ATTRIBUTE_HEADER.pack(8, NDA_DST) + address.to_bytes(4, "big")
        self._sequence += 1
        header = MESSAGE_HEADER.pack(MESSAGE_HEADER.size + len(body), RTM_GETNEIGH, NLM_F_REQUEST, self._sequence, 0)
        self._asking.send(header + body)
        while True:
            answer = self._asking.recv(8192)
            _, kind, _, sequence, _ = MESSAGE_HEADER.unpack_from(answer)
            if sequence == self._sequence:
                return _decode(answer)[1] if kind == RTM_NEWNEIGH else None


def _decode(message: bytes) -> tuple[Key, bytes | None]:
    """The next hop that a neighbour message is about, and its MAC address if that may be used without asking."""
    family, interface_index, state, _, _ = NEIGHBOUR_HEADER.unpack_from(message, MESSAGE_HEADER.size)
    attributes = dict(walk_attributes(message, MESSAGE_HEADER.size + NEIGHBOUR_HEADER.size))
    address = int.from_bytes(attributes.get(NDA_DST, b""), "big") if family == socket.AF_INET else 0
    mac = attributes.get(NDA_LLADDR, b"")
    usable = state & (NUD_REACHABLE | NUD_PERMANENT) and len(mac) == MAC_BYTES
    return (interface_index, address), mac if usable else None
