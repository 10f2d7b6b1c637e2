"""Are UDP datagrams written as they are read, and damaged ones refused with the right reason?"""

from __future__ import annotations

from functools import partial

from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP

from serval_core.names import format_address
from serval_core.wire import udp
from serval_core.wire.udp import UdpDatagram

from .mistakes import reason_for
from .strategies import addresses, words

A = 0x0A000001
B = 0x0A000002

datagrams = st.builds(UdpDatagram, words, words, st.binary(max_size=60), st.booleans())
parse = partial(udp.parse, source=A, destination=B)


@given(datagrams, addresses, addresses)
def test_what_is_written_is_read(datagram: UdpDatagram, source: int, destination: int) -> None:
    assert udp.parse(udp.emit(datagram, source, destination), source, destination) == datagram


@given(datagrams, addresses, addresses)
def test_scapy_writes_the_same(datagram: UdpDatagram, source: int, destination: int) -> None:
    theirs = UDP(sport=datagram.source_port, dport=datagram.destination_port)
    if not datagram.checksummed:
        theirs.chksum = 0
    packet = IP(src=format_address(source), dst=format_address(destination)) / theirs / datagram.payload
    assert bytes(packet)[20:] == udp.emit(datagram, source, destination)


def test_a_checksum_that_comes_out_as_0_is_written_as_ffff() -> None:
    # The payload is the complement of everything else, so that the sum is 0xFFFF.
    rest = A + B + 17 + 10 + 10
    payload = (0xFFFF - rest % 0xFFFF).to_bytes(2, "big")
    data = udp.emit(UdpDatagram(0, 0, payload), A, B)
    assert data[6:8] == b"\xff\xff"
    assert parse(data).payload == payload


@given(st.binary(max_size=40))
def test_random_bytes_are_refused_with_a_listed_reason(data: bytes) -> None:
    assert reason_for(parse, data) in {None, *udp.REASONS}


def test_damaged_datagrams_are_refused() -> None:
    data = udp.emit(UdpDatagram(0, 0, b"data"), A, B)
    assert reason_for(parse, data[:7]) == udp.TRUNCATED
    assert reason_for(parse, data[:-1]) == udp.TRUNCATED
    assert reason_for(parse, data[:5] + b"\x07" + data[6:]) == udp.LENGTH
    assert reason_for(parse, data[:-1] + b"A") == udp.WRONG_CHECKSUM
    assert udp.parse(data[:-1] + b"A", A, B, verify=False).payload == b"datA"


def test_bytes_behind_the_stated_length_are_ignored() -> None:
    data = udp.emit(UdpDatagram(0, 0, b"data"), A, B)
    assert parse(data + b"more").payload == b"data"


def test_without_a_checksum_nothing_is_verified() -> None:
    data = udp.emit(UdpDatagram(0, 0, b"data", checksummed=False), A, B)
    assert parse(data[:-1] + b"A") == UdpDatagram(0, 0, b"datA", checksummed=False)
