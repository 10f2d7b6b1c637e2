"""Do we read every packet that the prototype was captured sending, and write it back byte for byte?"""

from __future__ import annotations

from collections import Counter

import pytest

from serval_core.errors import TheirMistake
from serval_core.names import ServiceID
from serval_core.wire import control_messages, ipv4, sal, tcp_segment, udp

from . import captures
from .captures import CAPTURES, Capture

by_capture = pytest.mark.parametrize("capture", CAPTURES, ids=lambda capture: capture.name)

REASON_FOR_PROBE = {
    captures.PROBE_WITH_WRONG_SAL_CHECKSUM: sal.WRONG_CHECKSUM,
    captures.PROBE_WITH_WRONG_TCP_CHECKSUM: tcp_segment.WRONG_CHECKSUM,
}


def read_and_write(data: bytes) -> bytes:
    """The packet after a trip through all of our formats, checksums computed anew."""
    packet = ipv4.parse(data)
    inner = sal.parse(packet.payload)
    if not inner.transport:
        transport = b""
    elif inner.protocol == sal.PROTOCOL_TCP:
        segment = tcp_segment.parse(inner.transport, packet.source, packet.destination)
        transport = tcp_segment.emit(segment, packet.source, packet.destination)
    else:
        datagram = udp.parse(inner.transport, packet.source, packet.destination)
        transport = udp.emit(datagram, packet.source, packet.destination)
    return ipv4.emit(
        packet.source,
        packet.destination,
        packet.protocol,
        sal.emit(inner._replace(transport=transport)),
        packet.ttl,
        packet.identification,
        packet.flags_fragment,
        packet.tos,
    )


@by_capture
def test_every_whole_packet_is_written_as_it_was_read(capture: Capture) -> None:
    counts = Counter[str]()
    for packet in capture.packets():
        if not captures.is_whole(packet):
            counts["cut"] += 1
            continue
        counts["whole"] += 1
        identification = int.from_bytes(packet[4:6], "big")
        if capture.name.startswith("14_") and identification in REASON_FOR_PROBE:
            with pytest.raises(TheirMistake) as mistake:
                read_and_write(packet)
            assert mistake.value.reason == REASON_FOR_PROBE[identification]
            counts["refused"] += 1
        elif capture.name.startswith("14_") and identification == captures.PROBE_WITH_PADDING:
            # PAD has no meaning and no place in our representation: the packet comes back without it.
            written = ipv4.parse(read_and_write(packet)).payload
            padded = ipv4.parse(packet).payload
            assert padded[68:72] == bytes(4)
            assert (written[12:68], written[68:]) == (padded[12:68], padded[72:])
            counts["padded"] += 1
        else:
            assert read_and_write(packet) == packet
    of_probes = {"refused": 2, "padded": 1} if capture.name.startswith("14_") else {}
    assert counts == Counter({"whole": capture.whole, "cut": capture.cut, **of_probes})
    assert counts["whole"] > 0


@pytest.mark.parametrize("capture", [c for c in CAPTURES if c.cut], ids=lambda capture: capture.name)
def test_the_headers_of_cut_packets_are_written_as_they_were_read(capture: Capture) -> None:
    cut = 0
    for packet in capture.packets():
        if captures.is_whole(packet):
            continue
        cut += 1
        with pytest.raises(TheirMistake, match=ipv4.TRUNCATED):
            ipv4.parse(packet)
        # Neither the length in the IP header nor the TCP checksum fits what was stored.
        inner = sal.parse(packet[ipv4.HEADER_BYTES :])
        assert inner.protocol == sal.PROTOCOL_TCP
        segment = tcp_segment.parse(inner.transport, 0, 0, verify=False)
        transport = bytearray(tcp_segment.emit(segment, 0, 0))
        transport[16:18] = inner.transport[16:18]
        assert sal.emit(inner._replace(transport=bytes(transport))) == packet[ipv4.HEADER_BYTES :]
    assert cut == capture.cut
    assert cut > 0


def test_all_captures_are_listed() -> None:
    assert {path.name for path in captures.DIRECTORY.glob("*.pcap")} == {capture.name for capture in CAPTURES}


def test_registrations_are_written_as_they_were_read() -> None:
    router = ServiceID.from_number(88888)
    client = ServiceID.from_number(55555)
    found = Counter[control_messages.MessageType]()
    for capture in CAPTURES:
        if not capture.name.startswith("13_"):
            continue
        for packet in capture.packets():
            outer = ipv4.parse(packet)
            inner = sal.parse(outer.payload)
            if len(inner.services) == 2 and set(inner.services) == {router, client}:
                payload = udp.parse(inner.transport, outer.source, outer.destination).payload
                message = control_messages.parse_registration(payload)
                assert control_messages.emit_registration(message) == payload
                found[message.kind] += 1
    assert found == {control_messages.MessageType.REGISTER: 21, control_messages.MessageType.UNREGISTER: 8}
