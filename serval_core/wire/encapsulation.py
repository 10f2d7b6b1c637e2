"""How does a SAL packet look inside UDP? (SPEC 8)

The UDP header stands between the IP header and the SAL header, and there is nothing else to it. Inner checksums are
those of the sender's view of the addresses, so behind a NAT only the outer one counts.
"""

from __future__ import annotations

from struct import Struct

from serval_core.wire import ipv4
from serval_core.wire.checksum import internet_checksum
from serval_core.wire.ipv4 import IPv4Packet, OuterPorts
from serval_core.wire.sal import PROTOCOL_SAL

PROTOCOL_UDP = 17
HEADER_BYTES = 8
CLIENT_PORT = 54324
SERVER_PORT = 54325
PORTS = (CLIENT_PORT, SERVER_PORT)
ACTIVE_PORTS = OuterPorts(CLIENT_PORT, SERVER_PORT)
"""What whoever speaks first sends from and to."""

_HEADER = Struct("!HHHH")


def emit(
    source: int, destination: int, ports: OuterPorts | None, payload: bytes, ttl: int = ipv4.DEFAULT_TTL
) -> bytes:
    """The IPv4 packet that carries a SAL packet, inside UDP if there are ports for it."""
    if ports is None:
        return ipv4.emit(source, destination, PROTOCOL_SAL, payload, ttl)
    length_bytes = HEADER_BYTES + len(payload)
    header = _HEADER.pack(ports.local, ports.peer, length_bytes, 0)
    pseudo_header = source + destination + PROTOCOL_UDP + length_bytes
    checksum = internet_checksum(header + payload, pseudo_header) or 0xFFFF
    return ipv4.emit(source, destination, PROTOCOL_UDP, header[:6] + checksum.to_bytes(2, "big") + payload, ttl)


def answer(packet: IPv4Packet, payload: bytes) -> bytes:
    """The IPv4 packet that carries a SAL packet back to where `packet` came from, in the same way."""
    return emit(packet.destination, packet.source, packet.outer_ports, payload)


def payload_of(packet: bytes) -> bytes:
    """The SAL packet in an IPv4 packet that `emit` made."""
    return packet[ipv4.HEADER_BYTES + (HEADER_BYTES if packet[9] == PROTOCOL_UDP else 0) :]
