"""When did data arrive at a host, and for how long did none?

As the kernel saw it: a late reader cannot make an interruption look longer (`timed_packets`).
"""

from __future__ import annotations

import socket
from array import array
from bisect import bisect_left, bisect_right
from itertools import pairwise
from typing import Any, NamedTuple

from lab.hosts import Host
from lab.timed_packets import Filter, TimedPackets
from lab.wire_counter import JUMP_EQUAL, LOAD_BYTE, LOAD_HALF, RETURN

ETHERNET_BYTES, IP_HEADER_BYTES = 14, 20
SNAPPED_BYTES = 96  # Ethernet, IPv4 without options, TCP with its longest header is 94
PROTOCOL_TCP = 6


class Gap(NamedTuple):
    """A silence: the time of the last byte before it, and how long it was."""

    began: float
    length_s: float


class Timeline:
    """When how many bytes arrived. Times are seconds of any one clock."""

    def __init__(self) -> None:
        self._times: array[float] = array("d")
        self._sizes: array[int] = array("q")

    def __len__(self) -> int:
        """How many packets with data have arrived."""
        return len(self._times)

    def add(self, at: float, size_bytes: int) -> None:
        """Something has arrived, later than all before."""
        self._sizes.append(size_bytes)
        self._times.append(at)

    def received_bytes(self) -> int:
        """How much has arrived."""
        return sum(self._sizes)

    def gap(self, began: float, ended: float) -> Gap:
        """The longest silence of which some lies between the two times, as far as what has arrived by now tells."""
        times = self._times
        seen = times[max(0, bisect_right(times, began) - 1) : bisect_left(times, ended) + 1]
        before, after = max(pairwise(seen), key=lambda pair: pair[1] - pair[0], default=(began, ended))
        return Gap(before, after - before)

    def rates(self, began: float, ended: float, bin_s: float) -> list[float]:
        """Bits per second in each whole `bin_s` between the two times."""
        bits = [0] * int((ended - began) / bin_s)
        for at in range(bisect_left(self._times, began), bisect_left(self._times, ended)):
            slot = int((self._times[at] - began) / bin_s)
            if slot < len(bits):
                bits[slot] += 8 * self._sizes[at]
        return [each / bin_s for each in bits]


class Arrivals(TimedPackets):
    """Notes when how many bytes of TCP came from `source_port` through `interface`, by destination port, from now on.

    Times are seconds of the wall clock.
    """

    def __init__(self, host: Host, interface: str, source_port: int) -> None:
        self._timelines: dict[int, Timeline] = {}
        super().__init__(host, interface, socket.SOCK_RAW, _from_port(source_port), SNAPPED_BYTES)

    def to(self, port: int) -> Timeline:
        """What has arrived, and still will, for a port."""
        return self._timelines.setdefault(port, Timeline())

    def note(self, packet: bytes, at: float, where: Any) -> None:
        """A frame with a segment from the port."""
        ip_bytes = packet[16] << 8 | packet[17]
        payload_bytes = ip_bytes - IP_HEADER_BYTES - (packet[46] >> 4 << 2)
        if payload_bytes > 0:
            self.to(packet[36] << 8 | packet[37]).add(at, payload_bytes)


def _from_port(port: int) -> Filter:
    """Without IP options the TCP ports follow byte 34."""
    return [
        (LOAD_BYTE, 0, 0, ETHERNET_BYTES + 9),
        (JUMP_EQUAL, 0, 3, PROTOCOL_TCP),
        (LOAD_HALF, 0, 0, ETHERNET_BYTES + IP_HEADER_BYTES),
        (JUMP_EQUAL, 0, 1, port),
        (RETURN, 0, 0, SNAPPED_BYTES),
        (RETURN, 0, 0, 0),
    ]
