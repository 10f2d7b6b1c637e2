"""Do the scapy layers and our formats, written independently of each other, agree?"""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.packet import Packet

from serval_core.names import ServiceID, format_address, parse_address
from serval_core.wire import ipv4, sal, tcp_segment, udp
from serval_core.wire.sal import Control, SalPacket
from serval_core.wire.scapy_layers import (
    IP,
    SAL,
    UDP,
    Raw,
    SALAddress,
    SALControl,
    SALKey,
    SALPad,
    SALProof,
    SALService,
    SALSource,
    ServalTCP,
    ServalUDP,
)
from serval_core.wire.tcp_segment import TcpOptions, TcpSegment
from serval_core.wire.udp import UdpDatagram

from . import captures, strategies
from .captures import CAPTURES, Capture
from .strategies import addresses, words
from .vectors import ENCAPSULATED_SYN, PACKETS, PacketVector

by_capture = pytest.mark.parametrize("capture", CAPTURES, ids=lambda capture: capture.name)
by_packet = pytest.mark.parametrize("vector", PACKETS, ids=lambda vector: vector.title)

sal_packets = strategies.sal_packets(st.sampled_from([6, 17]), st.just(b""))
segments = strategies.segments(strategies.tcp_options(capabilities=st.none()))
datagrams = st.builds(UdpDatagram, words, words, st.binary(max_size=40), st.booleans())


def sal_layer(packet: SalPacket) -> Packet:
    """The scapy layer for what a SalPacket says, transport aside."""
    extensions: list[Packet] = []
    if packet.control is not None:
        flags, verno, ackno, nonce = packet.control
        extensions.append(SALControl(flags=flags, verno=verno, ackno=ackno, nonce=nonce))
    extensions += [SALService(service_id=bytes(service)) for service in packet.services]
    if packet.source_addresses:
        addresses = [format_address(address) for address in packet.source_addresses]
        extensions.append(SALSource(addresses=addresses))
    if packet.key:
        extensions.append(SALKey(key=packet.key))
    if packet.proof:
        extensions.append(SALProof(authenticator=packet.proof))
    return SAL(
        src_flowid=packet.src_flow_id,
        dst_flowid=packet.dst_flow_id,
        protocol=packet.protocol,
        extensions=extensions,
    )


def sal_packet(layer: Packet) -> SalPacket:
    """What a scapy layer says as a SalPacket, transport aside."""
    control = layer.extension(SALControl)
    source = layer.extension(SALSource)
    key, proof = layer.extension(SALKey), layer.extension(SALProof)
    return SalPacket(
        layer.src_flowid,
        layer.dst_flowid,
        layer.protocol,
        None if control is None else Control(int(control.flags), control.verno, control.ackno, control.nonce),
        tuple(ServiceID(e.service_id) for e in layer.extensions if isinstance(e, SALService)),
        () if source is None else tuple(parse_address(address) for address in source.addresses),
        b"",
        b"" if key is None else key.key,
        b"" if proof is None else proof.authenticator,
    )


def tcp_layer(segment: TcpSegment) -> Packet:
    """The scapy layer for a TcpSegment, with the options in our order."""
    mss, window_scale, sack_permitted, timestamp, *_ = segment.options
    options: list[tuple[str, object]] = []
    if mss is not None:
        options.append(("MSS", mss))
    if sack_permitted:
        options += [] if timestamp else [("NOP", None), ("NOP", None)]
        options.append(("SAckOK", b""))
    if timestamp is not None:
        options += [] if sack_permitted else [("NOP", None), ("NOP", None)]
        options.append(("Timestamp", timestamp))
    if window_scale is not None:
        options += [("NOP", None), ("WScale", window_scale)]
    return ServalTCP(
        sport=segment.source_port,
        dport=segment.destination_port,
        seq=segment.sequence,
        ack=segment.acknowledgement,
        flags=segment.flags,
        window=segment.window,
        urgptr=segment.urgent,
        options=options,
    ) / Raw(segment.payload)


def tcp_segment_of(layer: Packet) -> TcpSegment:
    """What a scapy layer says as a TcpSegment, without capabilities."""
    options = dict(layer.options)
    return TcpSegment(
        layer.sport,
        layer.dport,
        layer.seq,
        layer.ack,
        int(layer.flags),
        layer.window,
        layer.urgptr,
        TcpOptions(options.get("MSS"), options.get("WScale"), "SAckOK" in options, options.get("Timestamp")),
        bytes(layer.payload),
    )


@given(addresses, addresses, sal_packets, segments)
def test_both_write_and_read_the_same_tcp(
    source: int, destination: int, packet: SalPacket, segment: TcpSegment
) -> None:
    packet = packet._replace(protocol=sal.PROTOCOL_TCP)
    transport = tcp_segment.emit(segment, source, destination)
    ours = ipv4.emit(source, destination, 144, sal.emit(packet._replace(transport=transport)), 64, 1)
    ip = IP(src=format_address(source), dst=format_address(destination), id=1)
    theirs = bytes(ip / sal_layer(packet) / tcp_layer(segment))
    assert theirs == ours
    read = IP(ours)
    assert sal_packet(read[SAL]) == packet
    assert tcp_segment_of(read[ServalTCP]) == segment
    assert read[SAL].checksum_is_right()
    assert read[ServalTCP].checksum_is_right()


@given(addresses, addresses, sal_packets, datagrams)
def test_both_write_and_read_the_same_udp(
    source: int, destination: int, packet: SalPacket, datagram: UdpDatagram
) -> None:
    packet = packet._replace(protocol=sal.PROTOCOL_UDP)
    transport = udp.emit(datagram, source, destination)
    ours = ipv4.emit(source, destination, 144, sal.emit(packet._replace(transport=transport)), 64, 1)
    layer = ServalUDP(sport=datagram.source_port, dport=datagram.destination_port)
    if not datagram.checksummed:
        layer.chksum = 0
    ip = IP(src=format_address(source), dst=format_address(destination), id=1)
    theirs = bytes(ip / sal_layer(packet) / layer / Raw(datagram.payload))
    assert theirs == ours
    read = IP(ours)
    assert sal_packet(read[SAL]) == packet
    assert read[ServalUDP].checksum_is_right()
    assert bytes(read[ServalUDP].payload) == datagram.payload


@given(sal_packets)
def test_both_write_and_read_the_same_without_transport(packet: SalPacket) -> None:
    ours = sal.emit(packet)
    assert bytes(sal_layer(packet)) == ours
    assert sal_packet(SAL(ours)) == packet


@by_packet
def test_vectors_are_dissected(vector: PacketVector) -> None:
    read = IP(vector.packet)
    assert (read.src, read.dst) == (format_address(vector.source), format_address(vector.destination))
    assert sal_packet(read[SAL]) == vector.sal
    assert read[SAL].checksum_is_right()
    if isinstance(vector.transport, TcpSegment):
        assert tcp_segment_of(read[ServalTCP]) == vector.transport
        assert read[ServalTCP].checksum_is_right()
    elif isinstance(vector.transport, UdpDatagram):
        assert bytes(read[ServalUDP].payload) == vector.transport.payload
        assert read[ServalUDP].checksum_is_right()
    else:
        assert len(read[SAL].payload) == 0


def rebuilt(packet: bytes) -> bytes:
    """The packet as scapy writes it after having forgotten every length and checksum that it read."""
    layer: Packet = IP(packet)
    without_checksum = ServalUDP in layer and layer[ServalUDP].chksum == 0
    del layer[IP].len, layer[IP].chksum, layer[SAL].shl, layer[SAL].check
    for extension in layer[SAL].extensions:
        if not isinstance(extension, SALPad):
            del extension.length
    if ServalTCP in layer:
        del layer[ServalTCP].dataofs, layer[ServalTCP].chksum
    elif ServalUDP in layer:
        del layer[ServalUDP].len, layer[ServalUDP].chksum
        if without_checksum:
            layer[ServalUDP].chksum = 0
    return bytes(layer)


@by_capture
def test_captured_packets_are_dissected_and_built_again(capture: Capture) -> None:
    count = 0
    for packet in capture.packets():
        if not captures.is_whole(packet):
            assert IP(packet)[SAL].checksum_is_right()
            continue
        count += 1
        identification = int.from_bytes(packet[4:6], "big")
        damaged_probes = (
            (captures.PROBE_WITH_WRONG_SAL_CHECKSUM, captures.PROBE_WITH_WRONG_TCP_CHECKSUM)
            if capture.name.startswith("14_")
            else ()
        )
        read = IP(packet)
        right = read[SAL].checksum_is_right()
        if ServalTCP in read:
            right = right and read[ServalTCP].checksum_is_right()
        elif ServalUDP in read:
            right = right and read[ServalUDP].checksum_is_right()
        assert right == (identification not in damaged_probes)
        assert (rebuilt(packet) == packet) == right
        if right and identification != captures.PROBE_WITH_PADDING:
            ours = sal.parse(ipv4.parse(packet).payload)
            assert sal_packet(read[SAL]) == ours._replace(transport=b"")
            assert bytes(read[SAL].payload) == ours.transport
    assert count == capture.whole


def test_an_encapsulated_packet_is_dissected_and_built() -> None:
    read = IP(ENCAPSULATED_SYN)
    assert sal_packet(read[SAL]) == PACKETS[0].sal
    assert read[ServalTCP].checksum_is_right()
    inner = sal_layer(PACKETS[0].sal)
    segment = PACKETS[0].transport
    assert isinstance(segment, TcpSegment)
    built = IP(src="10.0.0.1", dst="10.0.0.2", id=0) / UDP() / inner / tcp_layer(segment)
    assert bytes(built) == ENCAPSULATED_SYN


@pytest.mark.parametrize("ports", [(54324, 54325), (54325, 54324), (40000, 54325), (54325, 40000)])
def test_either_encapsulation_port_on_either_side_means_sal(ports: tuple[int, int]) -> None:
    outer = UDP(ENCAPSULATED_SYN[20:])
    outer.sport, outer.dport = ports
    assert SAL in UDP(bytes(outer))


def test_address_and_padding_extensions_are_dissected() -> None:
    layer = SAL(
        extensions=[
            SALControl(flags="SYN+ACK"),
            SALAddress(verno=1, ackno=2, addresses=["10.0.0.1", "10.0.0.2"]),
            *[SALPad()] * 4,
        ]
    )
    read = SAL(bytes(layer))
    assert [type(extension) for extension in read.extensions] == [SALControl, SALAddress, *[SALPad] * 4]
    assert read.extension(SALAddress).addresses == ["10.0.0.1", "10.0.0.2"]
    assert read.extension(SALControl).flags == sal.SYN | sal.ACK
    assert read.extension(SALSource) is None
    assert sal.parse(bytes(layer)).control == Control(sal.SYN | sal.ACK, 0, 0, bytes(8))


@given(st.binary(max_size=150))
def test_random_bytes_are_dissected_into_something(data: bytes) -> None:
    packet = ipv4.emit(1, 2, 144, data)
    assert bytes(IP(packet)) == packet


def test_a_summary_says_flow_flags_and_numbers() -> None:
    summary = IP(PACKETS[0].packet).summary()
    assert "SAL 2 > 0 SYN [4096,0]" in summary
    assert "Serval TCP S seq=167772160" in summary
    assert "data=0" in IP(PACKETS[16].packet).summary()


def test_the_layers_come_with_a_star_import_in_a_fresh_interpreter() -> None:
    program = (
        "from serval_core.wire.scapy_layers import *\n"
        "packet = IP(src='10.0.0.1', dst='10.0.0.2', id=0)"
        " / SAL(src_flowid=2, extensions=[SALControl(flags='SYN', verno=0x1000,"
        " nonce=bytes.fromhex('1122334455667788')), SALService.of(76568)])"
        " / ServalTCP(seq=0x0a000000, flags='S', window=0,"
        " options=[('MSS', 1448), ('NOP', None), ('WScale', 1)])\n"
        "print(bytes(packet).hex())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert bytes.fromhex(done.stdout.strip()) == PACKETS[0].packet
