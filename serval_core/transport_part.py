"""Which transport part do the three packets of a handshake carry, and what does the peer's say? (SPEC 2.4)

For TCP it is TCP's own handshake (`handshake`). For UDP it is an empty datagram, whose only news is that it is
one: a SYN's has a checksum, those of the answers have none, as the prototype does it (SPEC 4.6, capture 06).
So a UDP flow knows no sequence numbers, windows and options, which stay at 0 and none.
"""

from __future__ import annotations

from serval_core import handshake
from serval_core.errors import TheirMistake
from serval_core.flow import Flow
from serval_core.sal_settings import SalSettings
from serval_core.wire import tcp_segment, udp
from serval_core.wire.ipv4 import IPv4Packet
from serval_core.wire.sal import PROTOCOL_UDP, SalPacket
from serval_core.wire.tcp_segment import NO_OPTIONS, TcpSegment
from serval_core.wire.udp import UdpDatagram

_EMPTY = UdpDatagram(0, 0, b"")
_EMPTY_ANSWER = udp.emit(UdpDatagram(0, 0, b"", checksummed=False), 0, 0)
_NO_SEGMENT = TcpSegment(0, 0, 0, 0, 0, 0, 0, NO_OPTIONS, b"")
_MISTAKE = "handshake_segment"


def of_syn(flow: Flow, settings: SalSettings, source: int, destination: int) -> bytes:
    """The part of the SYN that goes from `source` to `destination`."""
    if flow.protocol == PROTOCOL_UDP:
        return udp.emit(_EMPTY, source, destination)
    return tcp_segment.emit(handshake.syn_segment(flow, settings, flow.first_sent_at), source, destination)


def of_syn_ack(flow: Flow, settings: SalSettings) -> bytes:
    """The part of the SYN-ACK."""
    if flow.protocol == PROTOCOL_UDP:
        return _EMPTY_ANSWER
    segment = handshake.syn_ack_segment(flow, settings, flow.first_sent_at)
    return tcp_segment.emit(segment, flow.local_address, flow.peer_address)


def of_handshake_ack(flow: Flow, settings: SalSettings, now: float) -> bytes:
    """The part of the ACK that completes the handshake."""
    if flow.protocol == PROTOCOL_UDP:
        return _EMPTY_ANSWER
    return tcp_segment.emit(handshake.ack_segment(flow, settings, now), flow.local_address, flow.peer_address)


def read_syn(ip: IPv4Packet, sal: SalPacket) -> TcpSegment:
    """What a SYN says, of whichever of the two protocols. Raises TheirMistake."""
    if sal.protocol == PROTOCOL_UDP:
        udp.parse(sal.transport, ip.source, ip.destination, _covers_addresses(ip))
        return _NO_SEGMENT
    segment = tcp_segment.parse(sal.transport, ip.source, ip.destination, _covers_addresses(ip))
    if not handshake.syn_is_acceptable(segment):
        raise TheirMistake(_MISTAKE)
    return segment


def read_syn_ack(flow: Flow, ip: IPv4Packet, sal: SalPacket) -> TcpSegment:
    """What the SYN-ACK to a flow's SYN says. Raises TheirMistake."""
    _check_protocol(flow, sal)
    if sal.protocol == PROTOCOL_UDP:
        udp.parse(sal.transport, ip.source, ip.destination, _covers_addresses(ip))
        return _NO_SEGMENT
    segment = tcp_segment.parse(sal.transport, ip.source, ip.destination, _covers_addresses(ip))
    if not handshake.syn_ack_is_acceptable(flow, segment):
        raise TheirMistake(_MISTAKE)
    return segment


def read_handshake_ack(flow: Flow, ip: IPv4Packet, sal: SalPacket) -> int:
    """The client's window in bytes after the ACK of the handshake, which may be bare. Raises TheirMistake."""
    _check_protocol(flow, sal)
    if not sal.transport:
        return handshake.window_without_segment(flow)
    if sal.protocol == PROTOCOL_UDP:
        udp.parse(sal.transport, ip.source, ip.destination, _covers_addresses(ip))
        return 0
    segment = tcp_segment.parse(sal.transport, ip.source, ip.destination, _covers_addresses(ip))
    if not handshake.first_segment_is_acceptable(flow, segment, 1):
        raise TheirMistake(_MISTAKE)
    return handshake.scaled_window(flow, segment)


def to_inject(ip: IPv4Packet, sal: SalPacket) -> bytes:
    """A TCP segment with a checksum for the addresses that it came with. Raises TheirMistake."""
    if _covers_addresses(ip):
        return sal.transport
    return tcp_segment.complete_checksum(sal.transport, ip.source, ip.destination)


def _covers_addresses(ip: IPv4Packet) -> bool:
    """Whether a checksum is that of the addresses in `ip`. Inside UDP it is that of the sender's own view of them, and the
    outer checksum has been verified instead (SPEC 8).
    """
    return ip.outer_ports is None


def _check_protocol(flow: Flow, sal: SalPacket) -> None:
    if sal.protocol != flow.protocol:
        raise TheirMistake("wrong_protocol")
