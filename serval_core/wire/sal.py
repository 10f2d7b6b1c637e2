"""What does a SAL header with its extensions say, and how is one written? (SPEC 2, OBSERVED 1)

Layout, lengths and the checksum are checked here; whether a packet fits the state of its flow is
`serval_core.sal`'s question.

    base      src_flow_id(4) dst_flow_id(4) length(1, in 32-bit words, with extensions) protocol(1) checksum(2)
    PAD       0x00, a single byte
    CONTROL   0x10 20 flags(1) reserved(1) verno(4) ackno(4) nonce(8)
    SERVICE   0x20 36 reserved(2) serviceID(32)        the first is the destination, the second the source
    ADDRESS   0x30 length(1, at least 12) ...          accepted and skipped: nobody sends it
    SOURCE    0x40 4+4n reserved(2) n addresses(4)     originator, forwarders in order; 2 <= n <= 20
    KEY       0x50 36 reserved(2) public key(32)       ours, and so is the next: only for peers that ask for them,
    PROOF     0x60 20 reserved(2) authenticator(16)    see `serval_core.control_authentication`

Reserved bits may be anything on receipt and are zero on emission. We ask for exact lengths of CONTROL and
SERVICE, where the prototype's parser lets longer ones pass and drops the packet later.
"""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

from serval_core.errors import OurMistake, TheirMistake
from serval_core.names import ServiceID
from serval_core.wire.checksum import checksum_of_sum

PROTOCOL_SAL = 144
PROTOCOL_TCP = 6
PROTOCOL_UDP = 17

SYN = 0x80
RSYN = 0x40
ACK = 0x20
NACK = 0x10
RST = 0x08
FIN = 0x04
_FLAG_BITS = SYN | RSYN | ACK | NACK | RST | FIN

BASE_BYTES = 12
CONTROL_BYTES = 20
SERVICE_BYTES = 36
MAX_EXTENSIONS = 10
MAX_SERVICES = 2
MIN_SOURCE_ADDRESSES = 2
MAX_SOURCE_ADDRESSES = 20

KEY_BYTES = 32
PROOF_BYTES = 16

_PAD, _CONTROL, _SERVICE, _ADDRESS, _SOURCE, _KEY, _PROOF = range(7)
_OURS_HEAD_BYTES = 4
_MIN_ADDRESS_BYTES = 12

TRUNCATED = "sal_truncated"
HEADER_LENGTH = "sal_header_length"
UNKNOWN_EXTENSION = "sal_unknown_extension"
EXTENSION_LENGTH = "sal_extension_length"
EXTENSION_OVERRUN = "sal_extension_overrun"
TOO_MANY_EXTENSIONS = "sal_too_many_extensions"
SECOND_CONTROL = "sal_second_control"
THIRD_SERVICE = "sal_third_service"
SECOND_SOURCE = "sal_second_source"
SECOND_KEY = "sal_second_key"
SOURCE_ADDRESSES = "sal_source_addresses"
WRONG_CHECKSUM = "sal_checksum"
HEADER_FULL = "sal_header_full"

REASONS = frozenset(
    {
        TRUNCATED,  # shorter than the base header, or than the header length it states
        HEADER_LENGTH,  # states a header shorter than the base header
        UNKNOWN_EXTENSION,
        EXTENSION_LENGTH,  # not a length that this type can have
        EXTENSION_OVERRUN,  # reaches beyond the end of the header
        TOO_MANY_EXTENSIONS,
        SECOND_CONTROL,
        THIRD_SERVICE,
        SECOND_SOURCE,
        SECOND_KEY,  # or a second proof
        SOURCE_ADDRESSES,  # fewer than 2 or more than 20
        WRONG_CHECKSUM,
    }
)
"""Every reason that `parse` gives with TheirMistake."""

_BASE = Struct("!IIBBH")
_CONTROL_EXTENSION = Struct("!HBxII8s")
_CONTROL_ONLY = Struct("!IIBBH HBxII8s")
_CONTROL_SERVICE = Struct("!IIBBH HBxII8s Hxx32s")
_READ_CONTROL = Struct("!xxBxII8s")
_READ_CONTROL_SERVICE = Struct("!xxBxII8s xxxx32s")
_CONTROL_ONLY_WORDS = _CONTROL_ONLY.size // 4
_CONTROL_SERVICE_WORDS = _CONTROL_SERVICE.size // 4
_CONTROL_HEAD = _CONTROL << 12 | CONTROL_BYTES
_SERVICE_HEAD = _SERVICE << 12 | SERVICE_BYTES


class Control(NamedTuple):
    """The CONTROL extension. `nonce` is the sender's own; `ackno`, never absent, what it expects next."""

    flags: int
    verno: int
    ackno: int
    nonce: bytes


class SalPacket(NamedTuple):
    """What follows the IP header of a SAL packet. `transport` is the TCP or UDP part, possibly empty."""

    src_flow_id: int
    dst_flow_id: int
    protocol: int
    control: Control | None
    services: tuple[ServiceID, ...]
    source_addresses: tuple[int, ...]
    transport: bytes
    key: bytes = b""
    proof: bytes = b""


def parse(data: bytes) -> SalPacket:
    """Read the payload of an IP packet. Raises TheirMistake with one of REASONS, in the order of SPEC 2.3."""
    if len(data) < BASE_BYTES:
        raise TheirMistake(TRUNCATED)
    src_flow_id, dst_flow_id, words, protocol, _checksum = _BASE.unpack_from(data)
    header_bytes = words * 4
    if len(data) < header_bytes:
        raise TheirMistake(TRUNCATED)

    # The shapes of data, SYN-ACK and FIN, SYN and ACK are read in one go. Anything unusual, such as a wrong
    # length byte, goes to the general reader, which names the reason.
    control: Control | None = None
    services: tuple[ServiceID, ...] = ()
    addresses: tuple[int, ...] = ()
    key = proof = b""
    if words == 3:
        pass
    elif words == _CONTROL_ONLY_WORDS and data[12] >> 4 == _CONTROL and data[13] == CONTROL_BYTES:
        flags, verno, ackno, nonce = _READ_CONTROL.unpack_from(data, BASE_BYTES)
        control = Control(flags & _FLAG_BITS, verno, ackno, nonce)
    elif (
        words == _CONTROL_SERVICE_WORDS
        and data[12] >> 4 == _CONTROL
        and data[13] == CONTROL_BYTES
        and data[32] >> 4 == _SERVICE
        and data[33] == SERVICE_BYTES
    ):
        flags, verno, ackno, nonce, service = _READ_CONTROL_SERVICE.unpack_from(data, BASE_BYTES)
        control = Control(flags & _FLAG_BITS, verno, ackno, nonce)
        services = (ServiceID(service),)
    elif words < 3:
        raise TheirMistake(HEADER_LENGTH)
    else:
        control, services, addresses, key, proof = _parse_extensions(data, header_bytes)

    if int.from_bytes(data[:header_bytes], "big") % 0xFFFF:
        raise TheirMistake(WRONG_CHECKSUM)
    return SalPacket(
        src_flow_id, dst_flow_id, protocol, control, services, addresses, data[header_bytes:], key, proof
    )


def _parse_extensions(
    data: bytes, end: int
) -> tuple[Control | None, tuple[ServiceID, ...], tuple[int, ...], bytes, bytes]:
    """Read the extensions in data[12:end], in whatever order they come."""
    control: Control | None = None
    services: tuple[ServiceID, ...] = ()
    addresses: tuple[int, ...] = ()
    ours = {_KEY: b"", _PROOF: b""}
    offset = BASE_BYTES
    count = 0
    while offset < end:
        count += 1
        if count > MAX_EXTENSIONS:
            raise TheirMistake(TOO_MANY_EXTENSIONS)
        kind = data[offset] >> 4
        if kind == _PAD:
            offset += 1
            continue
        if kind > _PROOF:
            raise TheirMistake(UNKNOWN_EXTENSION)
        if offset + 1 == end:
            raise TheirMistake(EXTENSION_OVERRUN)
        length = data[offset + 1]
        if not _length_is_possible(kind, length):
            raise TheirMistake(EXTENSION_LENGTH)
        following = offset + length
        if following > end:
            raise TheirMistake(EXTENSION_OVERRUN)
        if kind == _CONTROL:
            if control is not None:
                raise TheirMistake(SECOND_CONTROL)
            flags, verno, ackno, nonce = _READ_CONTROL.unpack_from(data, offset)
            control = Control(flags & _FLAG_BITS, verno, ackno, nonce)
        elif kind == _SERVICE:
            if len(services) == MAX_SERVICES:
                raise TheirMistake(THIRD_SERVICE)
            services += (ServiceID(data[offset + 4 : following]),)
        elif kind == _SOURCE:
            if addresses:
                raise TheirMistake(SECOND_SOURCE)
            addresses = _parse_source(data[offset + 4 : following])
        elif kind in ours:
            if ours[kind]:
                raise TheirMistake(SECOND_KEY)
            ours[kind] = data[offset + _OURS_HEAD_BYTES : following]
        offset = following
    return control, services, addresses, ours[_KEY], ours[_PROOF]


def _length_is_possible(kind: int, length: int) -> bool:
    if kind == _CONTROL:
        return length == CONTROL_BYTES
    if kind == _SERVICE:
        return length == SERVICE_BYTES
    if kind == _ADDRESS:
        return length >= _MIN_ADDRESS_BYTES
    if kind == _KEY:
        return length == _OURS_HEAD_BYTES + KEY_BYTES
    if kind == _PROOF:
        return length == _OURS_HEAD_BYTES + PROOF_BYTES
    return length >= 4 and length % 4 == 0


def _parse_source(data: bytes) -> tuple[int, ...]:
    count = len(data) // 4
    if not MIN_SOURCE_ADDRESSES <= count <= MAX_SOURCE_ADDRESSES:
        raise TheirMistake(SOURCE_ADDRESSES)
    return tuple(int.from_bytes(data[i : i + 4], "big") for i in range(0, len(data), 4))


def emit(packet: SalPacket) -> bytes:
    """Write a packet, extensions in the order CONTROL, SERVICE, SOURCE, KEY, PROOF.

    OurMistake: more than two services, a number of source addresses other than 0 or 2..20, or a nonce, key or
    proof of a wrong size.
    """
    extensions = b""
    control = packet.control
    if control is not None:
        if len(control.nonce) != 8:
            raise OurMistake(f"a nonce has 8 bytes, not {len(control.nonce)}")
        extensions = _CONTROL_EXTENSION.pack(_CONTROL_HEAD, *control)
    if len(packet.services) > MAX_SERVICES:
        raise OurMistake(f"a SAL header names at most two services, not {len(packet.services)}")
    for service in packet.services:
        extensions += b"\x20\x24\x00\x00" + service
    if packet.source_addresses:
        extensions += _source_extension(packet.source_addresses)
    for kind, size, value in ((_KEY, KEY_BYTES, packet.key), (_PROOF, PROOF_BYTES, packet.proof)):
        if value:
            if len(value) != size:
                raise OurMistake(f"this extension holds {size} bytes, not {len(value)}")
            extensions += bytes((kind << 4, _OURS_HEAD_BYTES + size, 0, 0)) + value
    words = 3 + len(extensions) // 4
    checksum = checksum_of_sum(
        packet.src_flow_id
        + packet.dst_flow_id
        + (words << 8 | packet.protocol)
        + int.from_bytes(extensions, "big")
    )
    base = _BASE.pack(packet.src_flow_id, packet.dst_flow_id, words, packet.protocol, checksum)
    return base + extensions + packet.transport


def _source_extension(addresses: tuple[int, ...]) -> bytes:
    if not MIN_SOURCE_ADDRESSES <= len(addresses) <= MAX_SOURCE_ADDRESSES:
        raise OurMistake(f"a SOURCE extension lists 2 to 20 addresses, not {len(addresses)}")
    body = b"".join(address.to_bytes(4, "big") for address in addresses)
    return bytes((_SOURCE << 4, 4 + len(body), 0, 0)) + body


def emit_control(
    src_flow_id: int,
    dst_flow_id: int,
    protocol: int,
    flags: int,
    verno: int,
    ackno: int,
    nonce: bytes,
    service: ServiceID | None = None,
    source_addresses: tuple[int, ...] = (),
    transport: bytes = b"",
    key: bytes = b"",
    proof: bytes = b"",
) -> bytes:
    """Write a control packet: what `emit` makes of the same values, without a SalPacket in between."""
    if source_addresses or key or proof:
        control = Control(flags, verno, ackno, nonce)
        services = () if service is None else (service,)
        return emit(
            SalPacket(
                src_flow_id, dst_flow_id, protocol, control, services, source_addresses, transport, key, proof
            )
        )
    total = (
        src_flow_id
        + dst_flow_id
        + protocol
        + _CONTROL_HEAD
        + (flags << 8)
        + verno
        + ackno
        + int.from_bytes(nonce, "big")
    )
    if service is None:
        return (
            _CONTROL_ONLY.pack(
                src_flow_id,
                dst_flow_id,
                _CONTROL_ONLY_WORDS,
                protocol,
                checksum_of_sum(total + (_CONTROL_ONLY_WORDS << 8)),
                _CONTROL_HEAD,
                flags,
                verno,
                ackno,
                nonce,
            )
            + transport
        )
    total += (_CONTROL_SERVICE_WORDS << 8) + _SERVICE_HEAD + int.from_bytes(service, "big")
    return (
        _CONTROL_SERVICE.pack(
            src_flow_id,
            dst_flow_id,
            _CONTROL_SERVICE_WORDS,
            protocol,
            checksum_of_sum(total),
            _CONTROL_HEAD,
            flags,
            verno,
            ackno,
            nonce,
            _SERVICE_HEAD,
            service,
        )
        + transport
    )


def append_source(header: bytes, originator: int, forwarder: int) -> bytes:
    """The SAL header, without transport, after a forwarder at `forwarder` has put itself into it (SPEC 6.5).

    A new SOURCE extension goes to the end and begins with `originator`. `header` is one that `parse` accepts,
    with less than 20 source addresses. TheirMistake(HEADER_FULL) if it cannot hold any more.
    """
    count, source_at = 0, 0
    offset = BASE_BYTES
    while offset < len(header):
        kind = header[offset] >> 4
        if kind == _SOURCE:
            source_at = offset
        offset += 1 if kind == _PAD else header[offset + 1]
        count += 1
    if source_at:
        length = header[source_at + 1]
        end = source_at + length
        extended = b"".join(
            (
                header[BASE_BYTES : source_at + 1],
                bytes((length + 4,)),
                header[source_at + 2 : end],
                forwarder.to_bytes(4, "big"),
                header[end:],
            )
        )
    elif count == MAX_EXTENSIONS:
        raise TheirMistake(HEADER_FULL)
    else:
        extended = header[BASE_BYTES:] + _source_extension((originator, forwarder))
    words = 3 + len(extended) // 4
    if words > 0xFF:
        raise TheirMistake(HEADER_FULL)
    src_flow_id, dst_flow_id, _words, protocol, _checksum = _BASE.unpack_from(header)
    checksum = checksum_of_sum(
        src_flow_id + dst_flow_id + (words << 8 | protocol) + int.from_bytes(extended, "big")
    )
    return _BASE.pack(src_flow_id, dst_flow_id, words, protocol, checksum) + extended


def data_header(src_flow_id: int, dst_flow_id: int, protocol: int = PROTOCOL_TCP) -> bytes:
    """The 12 bytes in front of every data segment of a flow. Constant per flow: compute them once."""
    checksum = checksum_of_sum(src_flow_id + dst_flow_id + (3 << 8 | protocol))
    return _BASE.pack(src_flow_id, dst_flow_id, 3, protocol, checksum)
