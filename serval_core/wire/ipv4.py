"""What does an IPv4 header say, and how is one written? (RFC 791)

Addresses are 32-bit numbers in host order. Fragments are made and described, not reassembled; options are
skipped, never written.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple
from zlib import crc32

from serval_core.errors import TheirMistake
from serval_core.wire.checksum import checksum_of_sum

HEADER_BYTES = 20
DEFAULT_TTL = 64
DONT_FRAGMENT = 0x4000
MORE_FRAGMENTS = 0x2000
_FRAGMENT_OFFSET = 0x1FFF

TRUNCATED = "ipv4_truncated"
WRONG_VERSION = "ipv4_version"
HEADER_LENGTH = "ipv4_header_length"
TOTAL_LENGTH = "ipv4_total_length"
WRONG_CHECKSUM = "ipv4_checksum"
TOO_BIG = "ipv4_too_big"

REASONS = frozenset({TRUNCATED, WRONG_VERSION, HEADER_LENGTH, TOTAL_LENGTH, WRONG_CHECKSUM})
"""Every reason that `parse` gives with TheirMistake."""

_HEADER = Struct("!BBHHHBBHII")


class OuterPorts(NamedTuple):
    """The ports of UDP encapsulation (SPEC 8): ours, and the peer's as it is seen from here."""

    local: int
    peer: int


class IPv4Packet(NamedTuple):
    """One packet. `flags_fragment` is the 16-bit field of flags and fragment offset (in units of 8 bytes).

    With `outer_ports` the payload came inside UDP, whose header is gone.
    """

    source: int
    destination: int
    protocol: int
    ttl: int
    identification: int
    flags_fragment: int
    tos: int
    payload: bytes
    outer_ports: OuterPorts | None = None

    @property
    def is_fragment(self) -> bool:
        """Whether the payload is only a part of what was sent."""
        return self.flags_fragment & (MORE_FRAGMENTS | _FRAGMENT_OFFSET) != 0


def parse(data: bytes) -> IPv4Packet:
    """Read a packet; bytes behind its total length are link-layer padding. Raises TheirMistake."""
    if len(data) < HEADER_BYTES:
        raise TheirMistake(TRUNCATED)
    (
        version_length,
        tos,
        total_bytes,
        identification,
        flags_fragment,
        ttl,
        protocol,
        _checksum,
        source,
        destination,
    ) = _HEADER.unpack_from(data)
    if version_length >> 4 != 4:
        raise TheirMistake(WRONG_VERSION)
    header_bytes = (version_length & 15) * 4
    if header_bytes < HEADER_BYTES:
        raise TheirMistake(HEADER_LENGTH)
    if total_bytes < header_bytes:
        raise TheirMistake(TOTAL_LENGTH)
    if total_bytes > len(data):
        raise TheirMistake(TRUNCATED)
    if int.from_bytes(data[:header_bytes], "big") % 0xFFFF:
        raise TheirMistake(WRONG_CHECKSUM)
    payload = data[header_bytes:total_bytes]
    return IPv4Packet(source, destination, protocol, ttl, identification, flags_fragment, tos, payload)


def emit(
    source: int,
    destination: int,
    protocol: int,
    payload: bytes,
    ttl: int = DEFAULT_TTL,
    identification: int = 0,
    flags_fragment: int = 0,
    tos: int = 0,
) -> bytes:
    """A whole packet with its header checksum. The payload must leave the packet below 65536 bytes
    (struct.error).
    """
    total_bytes = HEADER_BYTES + len(payload)
    checksum = checksum_of_sum(
        (0x4500 | tos)
        + total_bytes
        + identification
        + flags_fragment
        + (ttl << 8 | protocol)
        + source
        + destination
    )
    return (
        _HEADER.pack(
            0x45,
            tos,
            total_bytes,
            identification,
            flags_fragment,
            ttl,
            protocol,
            checksum,
            source,
            destination,
        )
        + payload
    )


def fragments(packet: bytes, mtu_bytes: int) -> list[bytes]:
    """A whole packet in pieces that an interface of `mtu_bytes` can send: usually just itself.

    Raises TheirMistake(TOO_BIG) if it is too big and forbids fragmentation. The kernel numbers packets without
    identification one by one, which would tear fragments apart: theirs is made of their content then.
    """
    if len(packet) <= mtu_bytes:
        return [packet]
    whole = parse(packet)
    if whole.flags_fragment & DONT_FRAGMENT:
        raise TheirMistake(TOO_BIG)
    payload = whole.payload
    identification = whole.identification or crc32(payload) % 0xFFFF + 1
    step = (mtu_bytes - HEADER_BYTES) // 8 * 8
    return [
        emit(
            whole.source,
            whole.destination,
            whole.protocol,
            payload[offset : offset + step],
            whole.ttl,
            identification,
            (MORE_FRAGMENTS if offset + step < len(payload) else 0) | offset // 8,
            whole.tos,
        )
        for offset in range(0, len(payload), step)
    ]
