"""Do we write every worked vector byte for byte, and read back what it says?"""

from __future__ import annotations

import pytest

from serval_core.wire import control_messages, ipv4, sal, tcp_segment, udp
from serval_core.wire.control_messages import Migration, Registration, ServiceChange
from serval_core.wire.tcp_segment import TcpSegment
from serval_core.wire.udp import UdpDatagram

from .vectors import ENCAPSULATED_SYN, MESSAGES, PACKETS, A, B, MessageVector, PacketVector

by_packet = pytest.mark.parametrize("vector", PACKETS, ids=lambda vector: vector.title)
by_message = pytest.mark.parametrize("vector", MESSAGES, ids=lambda vector: vector.title)


def emit_transport(transport: TcpSegment | UdpDatagram | None, source: int, destination: int) -> bytes:
    if transport is None:
        return b""
    if isinstance(transport, TcpSegment):
        return tcp_segment.emit(transport, source, destination)
    return udp.emit(transport, source, destination)


@by_packet
def test_a_packet_is_written(vector: PacketVector) -> None:
    transport = emit_transport(vector.transport, vector.source, vector.destination)
    payload = sal.emit(vector.sal._replace(transport=transport))
    written = ipv4.emit(vector.source, vector.destination, sal.PROTOCOL_SAL, payload, ttl=vector.ttl)
    assert written == vector.packet


@by_packet
def test_a_packet_is_read(vector: PacketVector) -> None:
    packet = ipv4.parse(vector.packet)
    assert (packet.source, packet.destination) == (vector.source, vector.destination)
    assert (packet.protocol, packet.ttl) == (sal.PROTOCOL_SAL, vector.ttl)
    parsed = sal.parse(packet.payload)
    assert parsed._replace(transport=b"") == vector.sal
    if isinstance(vector.transport, TcpSegment):
        assert tcp_segment.parse(parsed.transport, packet.source, packet.destination) == vector.transport
    elif isinstance(vector.transport, UdpDatagram):
        assert udp.parse(parsed.transport, packet.source, packet.destination) == vector.transport
    else:
        assert parsed.transport == b""


@by_packet
def test_the_shortcuts_for_control_and_data_write_the_same(vector: PacketVector) -> None:
    transport = emit_transport(vector.transport, vector.source, vector.destination)
    packet = vector.sal
    if packet.control is not None:
        service = packet.services[0] if packet.services else None
        written = sal.emit_control(
            packet.src_flow_id,
            packet.dst_flow_id,
            packet.protocol,
            *packet.control,
            service,
            packet.source_addresses,
            transport,
        )
    elif not packet.services:
        written = sal.data_header(packet.src_flow_id, packet.dst_flow_id, packet.protocol) + transport
    else:
        written = sal.emit(packet._replace(transport=transport))
    assert written == vector.packet[ipv4.HEADER_BYTES :]


def test_a_syn_is_written_and_read_inside_udp() -> None:
    syn = PACKETS[0].packet[ipv4.HEADER_BYTES :]
    outer = UdpDatagram(54324, 54325, syn)
    assert ipv4.emit(A, B, sal.PROTOCOL_UDP, udp.emit(outer, A, B)) == ENCAPSULATED_SYN
    assert udp.parse(ipv4.parse(ENCAPSULATED_SYN).payload, A, B) == outer


@by_message
def test_a_control_message_is_written(vector: MessageVector) -> None:
    if isinstance(vector.message, Registration):
        assert control_messages.emit_registration(vector.message) == vector.data
    elif isinstance(vector.message, ServiceChange):
        assert control_messages.emit_service_change(vector.message) == vector.data
    else:
        assert control_messages.emit_migration(vector.message) == vector.data


@by_message
def test_a_control_message_is_read(vector: MessageVector) -> None:
    if isinstance(vector.message, Registration):
        assert control_messages.parse_registration(vector.data) == vector.message
    elif isinstance(vector.message, ServiceChange):
        assert control_messages.parse_service_change(vector.data) == vector.message
    else:
        assert isinstance(vector.message, Migration)
        assert control_messages.parse_migration(vector.data) == vector.message
