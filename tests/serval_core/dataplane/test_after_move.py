"""Are the ICMP messages that tell a kernel socket of its new path such as a router would send?"""

from __future__ import annotations

from scapy.layers.inet import ICMP, IP, IPerror, TCPerror

from serval_core.dataplane.after_move import VirtualTuple, too_big, unreachable
from serval_core.names import parse_address

ENDS = VirtualTuple(parse_address("100.127.255.1"), 54324, parse_address("100.126.1.2"), 770)


def quoted(packet: bytes) -> tuple[object, ...]:
    layers = IP(packet)
    inner, segment = layers[IPerror], layers[TCPerror]
    return inner.src, inner.dst, segment.sport, segment.dport, segment.seq


def with_right_checksums(packet: bytes) -> bytes:
    """The same packet, with the checksums that scapy computes."""
    layers = IP(packet)
    del layers[IP].chksum, layers[ICMP].chksum
    return bytes(layers)


def test_a_segment_that_did_not_arrive() -> None:
    packet = unreachable(ENDS, 0xFFFFFFF0)
    message = IP(packet)
    assert (message.src, message.dst) == ("100.126.1.2", "100.127.255.1")
    assert (message[ICMP].type, message[ICMP].code) == (3, 1)
    assert quoted(packet) == ("100.127.255.1", "100.126.1.2", 54324, 770, 0xFFFFFFF0)
    assert with_right_checksums(packet) == packet


def test_a_segment_that_was_too_big() -> None:
    """The kernel's packets are 12 bytes shorter than what they become on the wire."""
    packet = too_big(ENDS, 7, 1400)
    message = IP(packet)
    assert (message[ICMP].type, message[ICMP].code, message[ICMP].nexthopmtu) == (3, 4, 1388)
    assert quoted(packet)[-1] == 7
    assert with_right_checksums(packet) == packet
