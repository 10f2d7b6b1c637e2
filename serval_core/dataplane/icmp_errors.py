"""Which of our packets do other hosts, or our own kernel, report as undeliverable? ICMP errors, as they come.

A raw socket of its own, which receives nothing but errors: on a socket that also sends, the kernel would report
an error about one packet as the failure of the next one (raw(7), IP_RECVERR).
"""

from __future__ import annotations

import ctypes
import errno
import socket
import struct
from typing import NamedTuple

from serval_core.errors import KernelRefused
from serval_core.wire.sal import PROTOCOL_SAL

IP_RECVERR = 11
SO_ATTACH_FILTER = 26
MSG_ERRQUEUE = 0x2000
ORIGIN_ICMP = 2  # linux/errqueue.h, SO_EE_ORIGIN_ICMP
_EXTENDED_ERROR = struct.Struct("=IBBBBII")
_REFUSE_EVERYTHING = struct.pack("HBBI", 6, 0, 0, 0)  # BPF_RET | BPF_K, 0
_QUOTED_BYTES_MAX = 2048
_ERRORS_PER_CALL = 64


class IcmpError(NamedTuple):
    """`quoted` is the beginning of the IPv4 packet that was not delivered, `errno` what that amounts to."""

    quoted: bytes
    errno: int


class IcmpErrors:
    """Waits for ICMP errors about protocol 144. Readable (as POLLERR) when there are some."""

    def __init__(self) -> None:
        """Raises KernelRefused without CAP_NET_RAW."""
        try:
            self._socket = socket.socket(
                socket.AF_INET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, PROTOCOL_SAL
            )
        except OSError as error:
            raise KernelRefused("socket(AF_INET, SOCK_RAW, 144)", error.errno or 0, "Needs CAP_NET_RAW.") from error
        try:
            program = ctypes.create_string_buffer(_REFUSE_EVERYTHING, len(_REFUSE_EVERYTHING))
            self._socket.setsockopt(
                socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program))
            )
            self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
            self._socket.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        except OSError as error:
            self._socket.close()
            raise KernelRefused("setsockopt on the socket for ICMP errors", error.errno or 0, "") from error

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def take(self) -> list[IcmpError]:
        """The errors that wait, 64 at most: an ICMP storm must not hold up the rest of the loop."""
        taken: list[IcmpError] = []
        for _ in range(_ERRORS_PER_CALL):
            try:
                quoted, ancillary, _, _ = self._socket.recvmsg(_QUOTED_BYTES_MAX, 512, MSG_ERRQUEUE)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EINTR):
                    break
                continue  # an error that came without its message: taking it was all there is to do
            for level, kind, data in ancillary:
                if level == socket.IPPROTO_IP and kind == IP_RECVERR and len(data) >= _EXTENDED_ERROR.size:
                    code, origin = _EXTENDED_ERROR.unpack_from(data)[:2]
                    # Of packets that were too large `too_big` hears, whatever protocol they had.
                    if origin == ORIGIN_ICMP and code != errno.EMSGSIZE:
                        taken.append(IcmpError(quoted, code))
        return taken
