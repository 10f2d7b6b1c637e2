"""When did data arrive at a host, and for how long did none? A packet socket whose timestamps are the kernel's.

The kernel takes the time when a packet enters the host, so neither the program that reads it nor this one, late as
they may be, can make an interruption look longer.
"""

from __future__ import annotations

import socket
import struct
import threading
from array import array
from bisect import bisect_left, bisect_right
from itertools import pairwise
from types import TracebackType
from typing import NamedTuple, Self

from lab.hosts import Host
from lab.wire_counter import ETHERTYPE_IPV4, attach_filter

ETHERNET_BYTES, IP_HEADER_BYTES = 14, 20
SNAPPED_BYTES = 96  # Ethernet, IPv4 without options, TCP with its longest header is 94
RECEIVE_BUFFER_BYTES = 64 << 20
SO_TIMESTAMPNS = 35
SO_RCVBUFFORCE = 33
SOL_PACKET, PACKET_STATISTICS = 263, 6
TIME = struct.Struct("@qq")
POLL_S = 0.05

# Classic BPF: load 16 bits, 8 bits; jump if equal; return. Without IP options the TCP ports follow byte 34.
LOAD_HALF, LOAD_BYTE, JUMP_EQUAL, RETURN = 0x28, 0x30, 0x15, 0x06
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


class Arrivals:
    """Notes when how many bytes of TCP came from `source_port` through `interface`, by destination port, from now on.

    Owns a socket and a thread: close it or use `with`. Times are seconds of the wall clock.
    """

    def __init__(self, host: Host, interface: str, source_port: int) -> None:
        self._socket = host.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
        attach_filter(self._socket, _from_port(source_port))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.bind((interface, ETHERTYPE_IPV4))
        self._socket.settimeout(POLL_S)
        self._timelines: dict[int, Timeline] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, name="arrivals", daemon=True)
        self._thread.start()

    def to(self, port: int) -> Timeline:
        """What has arrived, and still will, for a port."""
        return self._timelines.setdefault(port, Timeline())

    def missed(self) -> int:
        """Packets that came too fast to be noted, since this was last asked."""
        _, dropped = struct.unpack("II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        return int(dropped)

    def close(self) -> None:
        """Stop noting. What was noted stays."""
        self._closing.set()
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        receive = self._socket.recvmsg
        space = socket.CMSG_SPACE(TIME.size)
        while not self._closing.is_set():
            try:
                frame, control, _, _ = receive(SNAPPED_BYTES, space)
            except TimeoutError:
                continue
            ip_bytes = frame[16] << 8 | frame[17]
            payload_bytes = ip_bytes - IP_HEADER_BYTES - (frame[46] >> 4 << 2)
            if payload_bytes > 0:
                seconds, nanoseconds = TIME.unpack(control[0][2])
                port = frame[36] << 8 | frame[37]
                self.to(port).add(seconds + nanoseconds / 1e9, payload_bytes)


def _from_port(port: int) -> list[tuple[int, int, int, int]]:
    return [
        (LOAD_BYTE, 0, 0, ETHERNET_BYTES + 9),
        (JUMP_EQUAL, 0, 3, PROTOCOL_TCP),
        (LOAD_HALF, 0, 0, ETHERNET_BYTES + IP_HEADER_BYTES),
        (JUMP_EQUAL, 0, 1, port),
        (RETURN, 0, 0, SNAPPED_BYTES),
        (RETURN, 0, 0, 0),
    ]
