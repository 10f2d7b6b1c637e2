"""Which of our packets did a router not forward because they were too large? ICMP "fragmentation needed" (RFC 1191).

A raw ICMP socket that hears of unreachable destinations only, whatever protocol the packet had: data leaves in
several framings, and the kernel, which has no socket for some of them, would not tell.
"""

from __future__ import annotations

import socket
from struct import Struct
from typing import NamedTuple

from serval_core.errors import KernelRefused
from serval_core.wire.checksum import internet_checksum

SOL_RAW = 255
ICMP_FILTER = 1
DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED = 3, 4
_HEADER = Struct("!BBHHH")
_ALL_BUT_UNREACHABLE = Struct("=I").pack(0xFFFFFFFF & ~(1 << DESTINATION_UNREACHABLE))
_MESSAGE_BYTES_MAX = 2048
_MESSAGES_PER_CALL = 64


class TooBig(NamedTuple):
    """`quoted` is the beginning of the IPv4 packet; the next link carries `mtu_bytes`, 0 if the router does not say."""

    quoted: bytes
    mtu_bytes: int


class TooBigMessages:
    """Readable when there are some. Owns its socket."""

    def __init__(self) -> None:
        """Raises KernelRefused without CAP_NET_RAW."""
        try:
            self._socket = socket.socket(
                socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.IPPROTO_ICMP
            )
        except OSError as error:
            raise KernelRefused("socket(AF_INET, SOCK_RAW, ICMP)", error.errno or 0, "Needs CAP_NET_RAW.") from error
        try:
            self._socket.setsockopt(SOL_RAW, ICMP_FILTER, _ALL_BUT_UNREACHABLE)
        except OSError as error:
            self._socket.close()
            raise KernelRefused("setsockopt(ICMP_FILTER)", error.errno or 0, "") from error

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def take(self) -> list[TooBig]:
        """What waits, 64 at most: an ICMP storm must not hold up the rest of the loop."""
        taken = []
        for _ in range(_MESSAGES_PER_CALL):
            try:
                packet = self._socket.recv(_MESSAGE_BYTES_MAX)
            except BlockingIOError:
                break
            message = packet[(packet[0] & 15) * 4 :]
            if len(message) < _HEADER.size or internet_checksum(message):
                continue  # the kernel lets raw sockets see what is damaged, too
            kind, code, _, _, mtu_bytes = _HEADER.unpack_from(message)
            if (kind, code) == (DESTINATION_UNREACHABLE, FRAGMENTATION_NEEDED):
                taken.append(TooBig(message[_HEADER.size :], mtu_bytes))
        return taken
