"""What does the TCP handshake inside the SAL handshake say, and what comes out of it? (SPEC 4.2, 4.3)

Pure functions between settings, what the peer offered, and the parameters of the kernel socket. Who sends
what when is in active_open and passive_open.

A SYN offers everything: the prototype ignores options that it does not know (OBSERVED, T9). A SYN-ACK
answers only what the SYN offered.
"""

from __future__ import annotations

from serval_core.control_authentication import AUTHENTICATES
from serval_core.effects import TransportParameters
from serval_core.flow import Flow
from serval_core.framing import Framing
from serval_core.sal_settings import Authenticate, SalSettings
from serval_core.wire.tcp_segment import ACK, NO_OPTIONS, SYN, TcpOptions, TcpSegment

SAL_OVERHEAD_BYTES = 20 + 12  # IPv4 and SAL base header of a data packet
OUTER_UDP_BYTES = 8  # of a data packet in framing `udp`, in addition
TCP_HEADER_BYTES = 20
MSS_MIN_BYTES = 88  # what the kernel takes (TCP_MIN_MSS); no honest peer offers less
MSS_WITHOUT_OPTION_BYTES = 536 - 12  # RFC 9293 3.7.1, less the SAL header, as the prototype has it
MSS_MAX_BYTES = 32767

_WINDOW_MAX = 0xFFFF
_SERIAL_MASK = 0xFFFFFFFF
_NO_SCALING = -1


def mss_for_path(mtu_bytes: int, may_be_encapsulated: bool = False) -> int:
    """The largest TCP payload of a data packet on a path, never below the minimum that TCP works with.

    It is the same for all framings that a flow may change to, the most expensive of which is `udp`.
    """
    outer_bytes = OUTER_UDP_BYTES if may_be_encapsulated else 0
    return max(mtu_bytes - outer_bytes - SAL_OVERHEAD_BYTES - TCP_HEADER_BYTES, MSS_MIN_BYTES)


def mss_to_offer(mtu_bytes: int, cap_bytes: int) -> int:
    """What our MSS option says. The user-mode prototype reads the option byte-swapped and would send tiny
    segments if the low byte were small (OBSERVED 3), so that one is kept above 5.
    """
    mss_bytes = min(mss_for_path(mtu_bytes), max(cap_bytes, MSS_MIN_BYTES), MSS_MAX_BYTES)
    low_byte = mss_bytes & 0xFF
    return mss_bytes if low_byte > 5 else mss_bytes - low_byte - 1


def mss_to_send(flow: Flow) -> int:
    """The largest payload that we send: what the path carries and the peer takes."""
    peer_mss_bytes = MSS_WITHOUT_OPTION_BYTES if flow.options.mss is None else flow.options.mss
    path_bytes = mss_for_path(flow.mtu_bytes, _may_be_encapsulated(flow))
    wanted_bytes = min(flow.offered_mss_bytes, peer_mss_bytes, path_bytes)
    return max(wanted_bytes, MSS_MIN_BYTES)


def _may_be_encapsulated(flow: Flow) -> bool:
    """A prototype stays with what the handshake used. A flow between our own stacks may come to a path that
    passes nothing but UDP.
    """
    if flow.outer_ports is not None:
        return True
    return flow.framing in (Framing.AUTO, Framing.UDP) and flow.options.capabilities is not None


def timestamp_value(flow: Flow, now: float) -> int:
    """TSval of a segment sent now: milliseconds from a random start. The lowest bit is 0, because the kernel
    takes it for a sign that timestamps count microseconds.
    """
    return int(now * 1000) + flow.timestamp_offset & 0xFFFFFFFE


def syn_segment(flow: Flow, settings: SalSettings, now: float) -> TcpSegment:
    """The TCP part of a SYN. The window is that of an unscaled SYN, where the prototype puts 0."""
    options = TcpOptions(
        flow.offered_mss_bytes,
        settings.window_scale,
        settings.sack,
        (timestamp_value(flow, now), 0) if settings.timestamps else None,
        AUTHENTICATES if settings.authenticate is not Authenticate.OFF else 0,
        flow.native_port,
    )
    window = min(settings.receive_window_bytes, _WINDOW_MAX)
    return TcpSegment(0, 0, flow.initial_sequence, 0, SYN, window, 0, options, b"")


def syn_ack_segment(flow: Flow, settings: SalSettings, now: float) -> TcpSegment:
    """The TCP part of a SYN-ACK to the SYN whose options are in `flow.options`."""
    offered = flow.options
    options = TcpOptions(
        flow.offered_mss_bytes,
        None if offered.window_scale is None else settings.window_scale,
        settings.sack and offered.sack_permitted,
        _answering_timestamp(flow, settings, now),
        None if offered.capabilities is None else 0 if flow.key_pair is None else AUTHENTICATES,
        flow.native_port,
    )
    window = min(settings.receive_window_bytes, _WINDOW_MAX)
    acknowledgement = flow.peer_initial_sequence + 1 & _SERIAL_MASK
    return TcpSegment(0, 0, flow.initial_sequence, acknowledgement, SYN | ACK, window, 0, options, b"")


def ack_segment(flow: Flow, settings: SalSettings, now: float) -> TcpSegment:
    """The TCP part of the ACK that completes the handshake."""
    scale = 0 if flow.options.window_scale is None else settings.window_scale
    window = min(settings.receive_window_bytes >> scale, _WINDOW_MAX)
    timestamp = _answering_timestamp(flow, settings, now)
    options = NO_OPTIONS if timestamp is None else TcpOptions(timestamp=timestamp)
    sequence = flow.initial_sequence + 1 & _SERIAL_MASK
    acknowledgement = flow.peer_initial_sequence + 1 & _SERIAL_MASK
    return TcpSegment(0, 0, sequence, acknowledgement, ACK, window, 0, options, b"")


def _answering_timestamp(flow: Flow, settings: SalSettings, now: float) -> tuple[int, int] | None:
    if not settings.timestamps or flow.options.timestamp is None:
        return None
    return timestamp_value(flow, now), flow.options.timestamp[0]


def syn_is_acceptable(segment: TcpSegment) -> bool:
    """Whether this is the TCP part of a SYN."""
    return segment.flags & 0x3F == SYN


def syn_ack_is_acceptable(flow: Flow, segment: TcpSegment) -> bool:
    """Whether this is the TCP part of a SYN-ACK that answers our SYN."""
    return segment.flags & 0x3F == SYN | ACK and _acknowledges_syn(flow, segment)


def first_segment_is_acceptable(flow: Flow, segment: TcpSegment, window_bytes: int) -> bool:
    """Whether a client that has our SYN-ACK may have sent this: its ACK, or data within the window.

    The acknowledgement number proves that the sender has seen our initial sequence number.
    """
    ahead_bytes = segment.sequence - flow.peer_initial_sequence - 1 & _SERIAL_MASK
    return (
        segment.flags & 0x16 == ACK  # no SYN, no RST
        and _acknowledges_syn(flow, segment)
        and ahead_bytes < window_bytes
    )


def _acknowledges_syn(flow: Flow, segment: TcpSegment) -> bool:
    return segment.acknowledgement == flow.initial_sequence + 1 & _SERIAL_MASK


def scaled_window(flow: Flow, segment: TcpSegment) -> int:
    """The window in bytes of a segment other than a SYN or SYN-ACK."""
    return segment.window << (flow.options.window_scale or 0)


def window_without_segment(flow: Flow) -> int:
    """The peer's window in bytes when a SAL ACK without TCP part completes the handshake.

    It is not told then, so that of the SYN stands, which is 0 in a prototype's. Four segments are what such a
    peer starts with (SPEC 4.4); its first acknowledgement of data corrects it.
    """
    return flow.peer_window_bytes or 4 * mss_to_send(flow)


def transport_parameters(flow: Flow, settings: SalSettings, now: float) -> TransportParameters:
    """What the kernel socket must know, once `flow.options` holds what the peer's SYN or SYN-ACK said."""
    options = flow.options
    scales = options.window_scale is not None
    return TransportParameters(
        send_next=flow.initial_sequence + 1 & _SERIAL_MASK,
        receive_next=flow.peer_initial_sequence + 1 & _SERIAL_MASK,
        mss_bytes=mss_to_send(flow),
        send_window_scale=options.window_scale if options.window_scale is not None else _NO_SCALING,
        receive_window_scale=settings.window_scale if scales else _NO_SCALING,
        sack=settings.sack and options.sack_permitted,
        timestamp=timestamp_value(flow, now) if settings.timestamps and options.timestamp else None,
        send_window_bytes=flow.peer_window_bytes,
        receive_window_bytes=min(settings.receive_window_bytes, _WINDOW_MAX),
    )
