"""What does a UDP datagram inside a SAL packet say, and how is one written? (RFC 768, SPEC 4.6)

A normal UDP header whose ports are 0. The prototype leaves the checksum out (0) in the SYN-ACK and the
handshake ACK of a connected UDP flow, so its absence is part of what a datagram says.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from serval_core.errors import TheirMistake
from serval_core.wire.checksum import internet_checksum

PROTOCOL_UDP = 17
HEADER_BYTES = 8

TRUNCATED = "udp_truncated"
LENGTH = "udp_length"
WRONG_CHECKSUM = "udp_checksum"

REASONS = frozenset(
    {
        TRUNCATED,  # shorter than 8 bytes, or than the length it states
        LENGTH,  # states less than 8 bytes
        WRONG_CHECKSUM,
    }
)
"""Every reason that `parse` gives with TheirMistake."""

_HEADER = Struct("!HHHH")


class UdpDatagram(NamedTuple):
    """One datagram. `checksummed` false: it carries no checksum."""

    source_port: int
    destination_port: int
    payload: bytes
    checksummed: bool = True


def parse(data: bytes, source: int, destination: int, verify: bool = True) -> UdpDatagram:
    """Read a datagram that came from `source` to `destination`; `verify` false leaves the checksum alone.

    Bytes behind the stated length are ignored. Raises TheirMistake.
    """
    if len(data) < HEADER_BYTES:
        raise TheirMistake(TRUNCATED)
    source_port, destination_port, length_bytes, checksum = _HEADER.unpack_from(data)
    if length_bytes < HEADER_BYTES:
        raise TheirMistake(LENGTH)
    if length_bytes > len(data):
        raise TheirMistake(TRUNCATED)
    if checksum and verify:
        pseudo_header = source + destination + PROTOCOL_UDP + length_bytes
        if internet_checksum(data[:length_bytes], pseudo_header):
            raise TheirMistake(WRONG_CHECKSUM)
    return UdpDatagram(source_port, destination_port, data[HEADER_BYTES:length_bytes], checksum != 0)


def emit(datagram: UdpDatagram, source: int, destination: int) -> bytes:
    """Write a datagram to be sent from `source` to `destination`."""
    source_port, destination_port, payload, checksummed = datagram
    length_bytes = HEADER_BYTES + len(payload)
    header = _HEADER.pack(source_port, destination_port, length_bytes, 0)
    if not checksummed:
        return header + payload
    pseudo_header = source + destination + PROTOCOL_UDP + length_bytes
    # A computed 0 is written as its other form, since 0 in the field means that there is no checksum.
    checksum = internet_checksum(header + payload, pseudo_header) or 0xFFFF
    return header[:6] + checksum.to_bytes(2, "big") + payload
