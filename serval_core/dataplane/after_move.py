"""What must a kernel socket be told when its flow has taken another path? ICMP messages and segments that say so.

The socket's own addresses stay what they were, so that it notices nothing by itself. It is told by what a real
path would have sent, handed in through the device that everything for it comes through:

- A smaller MTU: ICMP "fragmentation needed" (RFC 1191). The kernel lowers its segment size at once and repeats what
  was too large. The kernel forgets that after `net.ipv4.route.mtu_expires`, so it is reminded every now and then while
  the path carries less than the handshake allowed for. A larger MTU therefore needs no message.
- Data repeated in vain on the old path: ICMP "host unreachable" for the first unacknowledged segment. The kernel
  takes back one doubling of its timeout for each (RFC 6069), and repeats the segment when the shorter one is over.
  Congestion window and round-trip time stay: acknowledgements of the new path correct them, and slow start after
  the timeout means that no burst meets a path that nobody knows.
- Data lost with a path that broke (`lost_with_path`): ICMP "fragmentation needed" once more, for one byte less than the
  socket sends. So all that is unacknowledged was too large, and is repeated at once, as far as the congestion window goes.
  The window stays, as a packet that was too large says nothing of congestion (RFC 1191, 6.5).
- Acknowledgements and window updates that went to nowhere: an old segment without data, which makes the socket
  acknowledge what it has (RFC 9293, 3.10.7.4). The peer's TCP may be waiting for a window.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from serval_core.wire import ipv4
from serval_core.wire.checksum import internet_checksum
from serval_core.wire.sal import BASE_BYTES, PROTOCOL_TCP

PROTOCOL_ICMP = 1
DESTINATION_UNREACHABLE = 3
HOST_UNREACHABLE = 1
FRAGMENTATION_NEEDED = 4
DOUBLINGS_MAX = 16  # net.ipv4.tcp_retries2 is 15

_ICMP = Struct("!BBHHH")
_TCP_START = Struct("!HHI")
_TCP_BYTES = 20


class VirtualTuple(NamedTuple):
    """Where the kernel socket of a flow lives. Addresses in host order."""

    local_address: int
    local_port: int
    remote_address: int
    remote_port: int


def unreachable(ends: VirtualTuple, sequence: int) -> bytes:
    """The IPv4 packet that says: the segment with this sequence number did not reach its host."""
    return _error(ends, HOST_UNREACHABLE, 0, sequence)


def too_big(ends: VirtualTuple, sequence: int, mtu_bytes: int) -> bytes:
    """The IPv4 packet that says: the segment was larger than the path, whose data packets have `mtu_bytes` with the
    SAL header, carries.
    """
    return _error(ends, FRAGMENTATION_NEEDED, mtu_bytes - BASE_BYTES, sequence)


def _error(ends: VirtualTuple, code: int, next_mtu_bytes: int, sequence: int) -> bytes:
    start = _TCP_START.pack(ends.local_port, ends.remote_port, sequence)
    quoted = ipv4.emit(ends.local_address, ends.remote_address, PROTOCOL_TCP, start.ljust(_TCP_BYTES, b"\0"))
    checksum = internet_checksum(_ICMP.pack(DESTINATION_UNREACHABLE, code, 0, 0, next_mtu_bytes) + quoted)
    message = _ICMP.pack(DESTINATION_UNREACHABLE, code, checksum, 0, next_mtu_bytes) + quoted
    return ipv4.emit(ends.remote_address, ends.local_address, PROTOCOL_ICMP, message)
