"""How does a SAL packet look inside UDP? (SPEC 8)

The UDP header stands between the IP header and the SAL header, and there is nothing else to it. Inner checksums are
those of the sender's view of the addresses, so behind a NAT only the outer one counts.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from serval_core.wire import ipv4
from serval_core.wire.checksum import internet_checksum

PROTOCOL_UDP = 17
CLIENT_PORT = 54324
SERVER_PORT = 54325

_HEADER = Struct("!HHHH")


class OuterPorts(NamedTuple):
    """The UDP ports of the encapsulation, in host order: ours, and the peer's as it is seen from here."""

    local: int
    peer: int


ACTIVE_PORTS = OuterPorts(CLIENT_PORT, SERVER_PORT)
"""What a SYN goes from and to."""


def emit(source: int, destination: int, ports: OuterPorts, payload: bytes) -> bytes:
    """The IPv4 packet that carries a SAL packet to the peer."""
    length_bytes = _HEADER.size + len(payload)
    header = _HEADER.pack(ports.local, ports.peer, length_bytes, 0)
    checksum = internet_checksum(header + payload, source + destination + PROTOCOL_UDP + length_bytes) or 0xFFFF
    return ipv4.emit(source, destination, PROTOCOL_UDP, header[:6] + checksum.to_bytes(2, "big") + payload)
