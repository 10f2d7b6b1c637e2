"""What does the kernel's TCP know about the path of a flow? Read from its socket (TCP_INFO, linux/tcp.h)."""

from __future__ import annotations

import socket
from struct import Struct
from typing import NamedTuple

# tcpi_rtt, tcpi_total_retrans and tcpi_segs_out of struct tcp_info, which only ever grows at its end.
_FIELDS = Struct("=68xI28xI32xI")


class TcpInfo(NamedTuple):
    """`round_trip_s` is smoothed, and None before the first sample. The counters are since the socket exists."""

    round_trip_s: float | None
    segments_out: int
    segments_repeated: int


def tcp_info(fd: int) -> TcpInfo:
    """Ask a TCP socket, whose descriptor stays the caller's. OSError if it is none."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fd)
    try:
        answer = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _FIELDS.size)
    finally:
        sock.detach()
    round_trip_us, repeated, sent = _FIELDS.unpack(answer)
    return TcpInfo(round_trip_us / 1e6 or None, sent, repeated)
