"""What does a TCP segment inside a SAL packet say, and how is one written? (RFC 9293, SPEC 4.1, 4.2)

A normal TCP segment whose ports are 0 and whose checksum's pseudo header uses the addresses of the IP header
around it and protocol 6. Options beyond the prototype's (MSS, window scale) are SACK-permitted and timestamps
(RFC 2018, RFC 7323) and our own capabilities, offered in an experimental option (RFC 6994: kind 254,
experiment 0x5341): 16 bits of flags and, where framing `native` is offered, the sender's port for it.
"""

from __future__ import annotations

from struct import Struct
from typing import Literal, NamedTuple

from serval_core.errors import OurMistake, TheirMistake
from serval_core.wire.checksum import checksum_of_sum, internet_checksum, pseudo_header_sum

PROTOCOL_TCP = 6

FIN = 0x01
SYN = 0x02
RST = 0x04
PSH = 0x08
ACK = 0x10

HEADER_BYTES = 20
MAX_WINDOW_SCALE = 14
CAPABILITIES_EXPERIMENT = 0x5341

TRUNCATED = "tcp_truncated"
HEADER_LENGTH = "tcp_header_length"
WRONG_CHECKSUM = "tcp_checksum"
OPTION_LENGTH = "tcp_option_length"

REASONS = frozenset(
    {
        TRUNCATED,  # shorter than 20 bytes, or than the data offset it states
        HEADER_LENGTH,  # states a data offset below 20 bytes
        WRONG_CHECKSUM,
        OPTION_LENGTH,  # below 2, beyond the header, or not the one that a known option has
    }
)
"""Every reason that `parse` gives with TheirMistake."""

_END_OF_OPTIONS = 0
_NO_OPERATION = 1
_MSS = 2
_WINDOW_SCALE = 3
_SACK_PERMITTED = 4
_TIMESTAMP = 8
_EXPERIMENT = 254
_FIXED_LENGTHS = {_MSS: 4, _WINDOW_SCALE: 3, _SACK_PERMITTED: 2, _TIMESTAMP: 10}

_HEADER = Struct("!HHIIBBHHH")
_PROTOTYPE_OPTIONS = Struct("!HH3sB")
_MSS_HEAD = _MSS << 8 | 4
_WINDOW_SCALE_HEAD = bytes((_NO_OPERATION, _WINDOW_SCALE, 3))
_TWO_WORDS = Struct("!II")
_CAPABILITIES = CAPABILITIES_EXPERIMENT.to_bytes(2, "big")
_CAPABILITIES_LENGTHS = (6, 8)  # without a native port, with one


class TcpOptions(NamedTuple):
    """The options we know. `mss` is in bytes, `window_scale` a shift count, `timestamp` (TSval, TSecr).

    `native_port` 0: framing `native` is not offered. It comes with `capabilities` only.
    """

    mss: int | None = None
    window_scale: int | None = None
    sack_permitted: bool = False
    timestamp: tuple[int, int] | None = None
    capabilities: int | None = None
    native_port: int = 0


NO_OPTIONS = TcpOptions()


class TcpSegment(NamedTuple):
    """One segment. `window` is the field of the header, not scaled."""

    source_port: int
    destination_port: int
    sequence: int
    acknowledgement: int
    flags: int
    window: int
    urgent: int
    options: TcpOptions
    payload: bytes


def parse(data: bytes, source: int, destination: int, verify: bool = True) -> TcpSegment:
    """Read a segment that came from `source` to `destination`; `verify` false leaves the checksum alone.

    Raises TheirMistake. Options of unknown kind are skipped, a window scale above 14 is read as 14.
    """
    if len(data) < HEADER_BYTES:
        raise TheirMistake(TRUNCATED)
    (
        source_port,
        destination_port,
        sequence,
        acknowledgement,
        data_offset,
        flags,
        window,
        _checksum,
        urgent,
    ) = _HEADER.unpack_from(data)
    header_bytes = (data_offset >> 4) * 4
    if header_bytes < HEADER_BYTES:
        raise TheirMistake(HEADER_LENGTH)
    if header_bytes > len(data):
        raise TheirMistake(TRUNCATED)
    if verify and internet_checksum(data, source + destination + PROTOCOL_TCP + len(data)):
        raise TheirMistake(WRONG_CHECKSUM)
    options = NO_OPTIONS if header_bytes == HEADER_BYTES else _parse_options(data[HEADER_BYTES:header_bytes])
    return TcpSegment(
        source_port,
        destination_port,
        sequence,
        acknowledgement,
        flags,
        window,
        urgent,
        options,
        data[header_bytes:],
    )


def _parse_options(data: bytes) -> TcpOptions:
    if len(data) == _PROTOTYPE_OPTIONS.size:
        mss_head, mss_bytes, window_scale_head, shift = _PROTOTYPE_OPTIONS.unpack(data)
        if mss_head == _MSS_HEAD and window_scale_head == _WINDOW_SCALE_HEAD:
            return TcpOptions(mss_bytes, min(shift, MAX_WINDOW_SCALE))
    return _parse_any_options(data)


def _parse_any_options(data: bytes) -> TcpOptions:
    mss = window_scale = timestamp = capabilities = None
    sack_permitted = False
    native_port = 0
    offset = 0
    end = len(data)
    while offset < end:
        kind = data[offset]
        if kind == _NO_OPERATION:
            offset += 1
            continue
        if kind == _END_OF_OPTIONS:
            break
        if offset + 1 == end:
            raise TheirMistake(OPTION_LENGTH)
        length = data[offset + 1]
        following = offset + length
        if length < 2 or following > end or _FIXED_LENGTHS.get(kind, length) != length:
            raise TheirMistake(OPTION_LENGTH)
        if kind == _MSS:
            mss = data[offset + 2] << 8 | data[offset + 3]
        elif kind == _WINDOW_SCALE:
            window_scale = min(data[offset + 2], MAX_WINDOW_SCALE)
        elif kind == _SACK_PERMITTED:
            sack_permitted = True
        elif kind == _TIMESTAMP:
            timestamp = _TWO_WORDS.unpack_from(data, offset + 2)
        elif (
            kind == _EXPERIMENT
            and length in _CAPABILITIES_LENGTHS
            and data[offset + 2 : offset + 4] == _CAPABILITIES
        ):
            capabilities = data[offset + 4] << 8 | data[offset + 5]
            native_port = int.from_bytes(data[offset + 6 : following], "big")
        offset = following
    return TcpOptions(mss, window_scale, sack_permitted, timestamp, capabilities, native_port)


def emit(segment: TcpSegment, source: int, destination: int) -> bytes:
    """Write a segment to be sent from `source` to `destination`, with its complete checksum."""
    options = _emit_options(segment.options) if segment.options != NO_OPTIONS else b""
    payload = segment.payload
    header_bytes = HEADER_BYTES + len(options)
    payload_sum = int.from_bytes(payload, "big")
    if len(payload) & 1:
        payload_sum <<= 8
    checksum = checksum_of_sum(
        source
        + destination
        + PROTOCOL_TCP
        + header_bytes
        + len(payload)
        + segment.source_port
        + segment.destination_port
        + segment.sequence
        + segment.acknowledgement
        + (header_bytes << 10 | segment.flags)
        + segment.window
        + segment.urgent
        + int.from_bytes(options, "big")
        + payload_sum
    )
    header = _HEADER.pack(
        segment.source_port,
        segment.destination_port,
        segment.sequence,
        segment.acknowledgement,
        header_bytes << 2,
        segment.flags,
        segment.window,
        checksum,
        segment.urgent,
    )
    return header + options + payload


def _emit_options(options: TcpOptions) -> bytes:
    """MSS; SACK-permitted and timestamps; NOP and window scale; capabilities: each padded to four bytes.

    That is Linux's order, and the only one with SACK and timestamps that a prototype was seen to accept.
    """
    mss, window_scale, sack_permitted, timestamp, capabilities, native_port = options
    data = b""
    if mss is not None:
        data = bytes((_MSS, 4)) + mss.to_bytes(2, "big")
    if sack_permitted:
        data += b"\x04\x02" if timestamp is not None else b"\x01\x01\x04\x02"
    if timestamp is not None:
        data += b"\x08\x0a" if sack_permitted else b"\x01\x01\x08\x0a"
        data += _TWO_WORDS.pack(*timestamp)
    if window_scale is not None:
        if window_scale > MAX_WINDOW_SCALE:
            raise OurMistake(f"a window scale is at most {MAX_WINDOW_SCALE}, not {window_scale}")
        data += bytes((_NO_OPERATION, _WINDOW_SCALE, 3, window_scale))
    if capabilities is not None:
        head = b"\xfe\x08" if native_port else b"\x01\x01\xfe\x06"
        data += head + _CAPABILITIES + capabilities.to_bytes(2, "big")
        if native_port:
            data += native_port.to_bytes(2, "big")
    return data


def checksum_state(data: bytes, source: int, destination: int) -> Literal["complete", "partial", "wrong"]:
    """What the checksum field of a whole segment holds.

    "partial": only the folded pseudo-header sum, which is how the kernel leaves it to transmit offload
    (CHECKSUM_PARTIAL) and how a raw socket behind a veth sees it. TheirMistake when the segment is too short.
    """
    if len(data) < HEADER_BYTES:
        raise TheirMistake(TRUNCATED)
    pseudo_header = pseudo_header_sum(source, destination, PROTOCOL_TCP, len(data))
    if internet_checksum(data, pseudo_header) == 0:
        return "complete"
    return "partial" if (data[16] << 8 | data[17]) % 0xFFFF == pseudo_header % 0xFFFF else "wrong"


def complete_checksum(data: bytes, source: int, destination: int) -> bytes:
    """The same segment with the right checksum, whatever the field held before. TheirMistake when it is too
    short.
    """
    if len(data) < HEADER_BYTES:
        raise TheirMistake(TRUNCATED)
    blank = data[:16] + b"\0\0" + data[18:]
    checksum = internet_checksum(blank, source + destination + PROTOCOL_TCP + len(data))
    return data[:16] + checksum.to_bytes(2, "big") + data[18:]
