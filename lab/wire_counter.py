"""How many packets of one IP protocol passed an interface? The kernel counts them; no sender is asked.

A packet socket with a filter and a receive buffer that is never read: the socket's packet statistics count
what the filter let through, delivered or dropped, at no cost in user space (packet(7), PACKET_STATISTICS).
"""

from __future__ import annotations

import ctypes
import socket
import struct
from types import TracebackType
from typing import NamedTuple, Self

from lab.hosts import Host

ETH_P_ALL = 3
ETHERNET_HEADER_BYTES = 14
ETHERTYPE_IPV4 = 0x0800
SOL_PACKET = 263
PACKET_STATISTICS = 6
SO_ATTACH_FILTER = 26
_STATISTICS = struct.Struct("=II")

# Classic BPF: load 16 bits, 8 bits, the length; jump if equal, if greater; return.
LOAD_HALF, LOAD_BYTE, LOAD_LENGTH, JUMP_EQUAL, JUMP_GREATER, RETURN = 0x28, 0x30, 0x80, 0x15, 0x25, 0x06


class PacketStatistics(NamedTuple):
    """What a packet socket's filter let through, and how much of that found no room in the receive buffer."""

    passed: int
    dropped: int


def packet_statistics(packet_socket: socket.socket) -> PacketStatistics:
    """Since this was last asked: reading resets the kernel's 32-bit counters."""
    statistics = packet_socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, _STATISTICS.size)
    return PacketStatistics(*_STATISTICS.unpack(statistics))


class WireCounter:
    """Counts IPv4 packets of `protocol` that pass `interface` of `host` in either direction, from now on.

    With `longer_than_bytes` only packets whose IP length exceeds it. Owns one socket: close it or use `with`.
    """

    def __init__(self, host: Host, interface: str, protocol: int, longer_than_bytes: int = -1) -> None:
        self._socket = host.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        attach_filter(self._socket, _filter(protocol, longer_than_bytes + ETHERNET_HEADER_BYTES))
        self._socket.bind((interface, ETH_P_ALL))
        self._count = 0

    def count(self) -> int:
        """Packets so far."""
        self._count += packet_statistics(self._socket).passed
        return self._count

    def close(self) -> None:
        """Stop counting."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _filter(protocol: int, longer_than_bytes: int) -> list[tuple[int, int, int, int]]:
    """(code, jump if true, jump if false, constant) of each instruction, for frames on Ethernet."""
    return [
        (LOAD_HALF, 0, 0, 12),
        (JUMP_EQUAL, 0, 5, ETHERTYPE_IPV4),
        (LOAD_BYTE, 0, 0, ETHERNET_HEADER_BYTES + 9),
        (JUMP_EQUAL, 0, 3, protocol),
        (LOAD_LENGTH, 0, 0, 0),
        (JUMP_GREATER, 0, 1, longer_than_bytes),
        (RETURN, 0, 0, 1),
        (RETURN, 0, 0, 0),
    ]


def attach_filter(packet_socket: socket.socket, program: list[tuple[int, int, int, int]]) -> None:
    """Let through what the classic BPF `program` returns a length for; each step is (code, jump if true, if false, constant)."""
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))
    sock_fprog = struct.pack("HP", len(program), ctypes.addressof(instructions))
    packet_socket.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, sock_fprog)
