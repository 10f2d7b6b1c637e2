"""Are IPv4 headers written as they are read, and damaged ones refused with the right reason?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP

from serval_core.names import format_address
from serval_core.wire import ipv4
from serval_core.wire.checksum import internet_checksum

from .mistakes import reason_for
from .strategies import addresses, octets, words

packets = st.builds(
    ipv4.IPv4Packet,
    source=addresses,
    destination=addresses,
    protocol=octets,
    ttl=octets,
    identification=words,
    flags_fragment=words,
    tos=octets,
    payload=st.binary(max_size=100),
    outer_ports=st.none(),  # never written
)


def emit(packet: ipv4.IPv4Packet) -> bytes:
    return ipv4.emit(
        packet.source,
        packet.destination,
        packet.protocol,
        packet.payload,
        packet.ttl,
        packet.identification,
        packet.flags_fragment,
        packet.tos,
    )


def with_header(data: bytes, **changes: int) -> bytes:
    """`data` with some bytes of its header changed, keys being _OFFSET, and the header's checksum redone."""
    changed = bytearray(data)
    for key, value in changes.items():
        changed[int(key[1:])] = value
    changed[10:12] = b"\0\0"
    changed[10:12] = internet_checksum(changed[: (changed[0] & 15) * 4]).to_bytes(2, "big")
    return bytes(changed)


@given(packets)
def test_what_is_written_is_read(packet: ipv4.IPv4Packet) -> None:
    assert ipv4.parse(emit(packet)) == packet


@given(packets)
def test_scapy_writes_the_same(packet: ipv4.IPv4Packet) -> None:
    theirs = IP(
        src=format_address(packet.source),
        dst=format_address(packet.destination),
        proto=packet.protocol,
        ttl=packet.ttl,
        id=packet.identification,
        flags=packet.flags_fragment >> 13,
        frag=packet.flags_fragment & 0x1FFF,
        tos=packet.tos,
    )
    assert bytes(theirs / packet.payload) == emit(packet)


@given(st.binary(max_size=80))
def test_random_bytes_are_refused_with_a_listed_reason(data: bytes) -> None:
    assert reason_for(ipv4.parse, data) in {None, *ipv4.REASONS}


PACKET = ipv4.emit(0x0A000001, 0x0A000002, 144, b"payload")


def test_damaged_headers_are_refused() -> None:
    assert reason_for(ipv4.parse, b"") == ipv4.TRUNCATED
    assert reason_for(ipv4.parse, PACKET[:19]) == ipv4.TRUNCATED
    assert reason_for(ipv4.parse, PACKET[:-1]) == ipv4.TRUNCATED
    assert reason_for(ipv4.parse, with_header(PACKET, _0=0x65)) == ipv4.WRONG_VERSION
    assert reason_for(ipv4.parse, with_header(PACKET, _0=0x44)) == ipv4.HEADER_LENGTH
    assert reason_for(ipv4.parse, with_header(PACKET, _3=19)) == ipv4.TOTAL_LENGTH
    assert reason_for(ipv4.parse, with_header(PACKET, _0=0x47)) == ipv4.TOTAL_LENGTH
    assert reason_for(ipv4.parse, PACKET[:8] + b"\x3f" + PACKET[9:]) == ipv4.WRONG_CHECKSUM


def test_link_layer_padding_is_cut_off() -> None:
    assert ipv4.parse(PACKET + bytes(19)).payload == b"payload"


def test_options_are_skipped() -> None:
    assert ipv4.parse(with_header(PACKET, _0=0x46)).payload == b"oad"


@pytest.mark.parametrize(
    ("flags_fragment", "fragment"),
    [(0, False), (ipv4.DONT_FRAGMENT, False), (ipv4.MORE_FRAGMENTS, True), (1, True), (0x2001, True)],
)
def test_fragments_are_recognized(flags_fragment: int, fragment: bool) -> None:
    packet = ipv4.parse(ipv4.emit(1, 2, 144, b"x", flags_fragment=flags_fragment))
    assert packet.is_fragment == fragment
