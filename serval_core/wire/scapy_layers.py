"""How does scapy read and write Serval? Layers for SAL, its extensions, and the TCP and UDP inside (SPEC 2,
4, 8).

    from serval_core.wire.scapy_layers import *
    IP(dst="10.0.0.2") / SAL(src_flowid=2, extensions=[SALControl(flags="SYN"), SALService.of(76568)]) /
    ServalTCP(flags="S")

Importing binds SAL to IP protocol 144 and to the encapsulation ports of UDP. Lengths and checksums that are
left None are filled in. The layout is written down here a second time on purpose: `sal.py` is tested against
this file, and this file against `sal.py`.
"""

from __future__ import annotations

import struct
from typing import Any

from scapy.base_classes import BasePacket
from scapy.fields import (
    BitEnumField,
    BitField,
    ByteEnumField,
    ByteField,
    Field,
    FieldListField,
    FlagsField,
    IntField,
    IPField,
    PacketListField,
    ShortField,
    StrFixedLenField,
    XByteField,
    XShortField,
    _FieldContainer,
)
from scapy.layers.inet import IP, TCP, UDP
from scapy.packet import Packet, Raw, bind_bottom_up, bind_layers
from scapy.utils import checksum, inet_aton

__all__ = [
    "IP",
    "SAL",
    "SAL_ENCAPSULATION_CLIENT_PORT",
    "SAL_ENCAPSULATION_SERVER_PORT",
    "SAL_IP_PROTOCOL",
    "TCP",
    "UDP",
    "Raw",
    "SALAddress",
    "SALControl",
    "SALKey",
    "SALPad",
    "SALProof",
    "SALService",
    "SALSource",
    "ServalTCP",
    "ServalUDP",
]

SAL_IP_PROTOCOL = 144
SAL_ENCAPSULATION_CLIENT_PORT = 54324
SAL_ENCAPSULATION_SERVER_PORT = 54325

_EXTENSION_NAMES = {0: "PAD", 1: "CONTROL", 2: "SERVICE", 3: "ADDRESS", 4: "SOURCE", 5: "KEY", 6: "PROOF"}
_FLAG_NAMES = ["reserved0", "reserved1", "FIN", "RST", "NACK", "ACK", "RSYN", "SYN"]


_Fields = list[Field[Any, Any] | _FieldContainer]


def _fields(*fields: Field[Any, Any] | _FieldContainer) -> _Fields:
    """The fields of a layer, in order."""
    return list(fields)


def _extension_fields(kind: int, *fields: Field[Any, Any] | _FieldContainer) -> _Fields:
    """The fields of an extension, in order, with its type and the reserved bits in front."""
    return [BitEnumField("type", kind, 4, _EXTENSION_NAMES), BitField("reserved", 0, 4), *fields]


class _Extension(Packet):
    """What the extensions share: whatever follows one is the next, not its payload."""

    def extract_padding(self, s: bytes) -> tuple[bytes, bytes | None]:
        return b"", s


class SALPad(_Extension):
    """One byte that means nothing."""

    name = "SAL PAD"
    fields_desc = _extension_fields(0)


class SALControl(_Extension):
    """The state of a flow: flags, version numbers, nonce."""

    name = "SAL CONTROL"
    fields_desc = _extension_fields(
        1,
        ByteField("length", 20),
        FlagsField("flags", 0, 8, _FLAG_NAMES),
        XByteField("reserved2", 0),
        IntField("verno", 0),
        IntField("ackno", 0),
        StrFixedLenField("nonce", bytes(8), length=8),
    )


class SALService(_Extension):
    """A serviceID. The first in a header is the destination's, a second one the source's."""

    name = "SAL SERVICE"
    fields_desc = _extension_fields(
        2,
        ByteField("length", 36),
        XShortField("reserved2", 0),
        StrFixedLenField("service_id", bytes(32), length=32),
    )

    @classmethod
    def of(cls, number: int) -> SALService:
        """The serviceID whose decimal text form is `number`."""
        return cls(service_id=struct.pack("!I28x", number))


class _AddressList(_Extension):
    """An extension that ends in addresses and whose length follows from their number."""

    def post_build(self, pkt: bytes, pay: bytes) -> bytes:
        if self.length is None:
            pkt = pkt[:1] + bytes([len(pkt)]) + pkt[2:]
        return pkt + pay


class SALAddress(_AddressList):
    """Declared by the prototype, sent by nobody."""

    name = "SAL ADDRESS"
    fields_desc = _extension_fields(
        3,
        ByteField("length", None),
        XShortField("reserved2", 0),
        IntField("verno", 0),
        IntField("ackno", 0),
        FieldListField("addresses", [], IPField("", "0.0.0.0"), length_from=lambda p: p.length - 12),
    )


class SALSource(_AddressList):
    """Where a forwarded packet came from: originator, then forwarders in order."""

    name = "SAL SOURCE"
    fields_desc = _extension_fields(
        4,
        ByteField("length", None),
        XShortField("reserved2", 0),
        FieldListField("addresses", [], IPField("", "0.0.0.0"), length_from=lambda p: p.length - 4),
    )


class SALKey(_Extension):
    """A public key for authentication. Ours: no prototype sends or gets one."""

    name = "SAL KEY"
    fields_desc = _extension_fields(
        5,
        ByteField("length", 36),
        XShortField("reserved2", 0),
        StrFixedLenField("key", bytes(32), length=32),
    )


class SALProof(_Extension):
    """The authenticator of a control packet. Ours, too."""

    name = "SAL PROOF"
    fields_desc = _extension_fields(
        6,
        ByteField("length", 20),
        XShortField("reserved2", 0),
        StrFixedLenField("authenticator", bytes(16), length=16),
    )


_EXTENSION_LAYERS: dict[int, type[Packet]] = {
    0: SALPad,
    1: SALControl,
    2: SALService,
    3: SALAddress,
    4: SALSource,
    5: SALKey,
    6: SALProof,
}


def _next_extension(
    _packet: Packet, _before: list[BasePacket], _current: Packet | None, remaining: bytes
) -> type[Packet] | None:
    return _EXTENSION_LAYERS.get(remaining[0] >> 4, Raw) if remaining else None


class SAL(Packet):
    """The SAL header with its extensions; what follows is TCP or UDP, or nothing."""

    name = "SAL"
    fields_desc = _fields(
        IntField("src_flowid", 0),
        IntField("dst_flowid", 0),
        ByteField("shl", None),
        ByteEnumField("protocol", 6, {6: "tcp", 17: "udp"}),
        XShortField("check", None),
        PacketListField(
            "extensions", [], next_cls_cb=_next_extension, length_from=lambda p: max(p.shl * 4 - 12, 0)
        ),
    )

    def post_build(self, pkt: bytes, pay: bytes) -> bytes:
        if self.shl is None:
            pkt = pkt[:8] + bytes([len(pkt) // 4]) + pkt[9:]
        if self.check is None:
            pkt = pkt[:10] + struct.pack("!H", checksum(pkt)) + pkt[12:]
        return pkt + pay

    def extension(self, layer: type[Packet]) -> Packet | None:
        """The first extension of that kind, if there is one."""
        return next((extension for extension in self.extensions if isinstance(extension, layer)), None)

    def checksum_is_right(self) -> bool:
        """Whether the header, as it was received, sums up."""
        return checksum(self.original[: self.shl * 4]) == 0

    def mysummary(self) -> str:
        control = self.extension(SALControl)
        flags = f" {control.flags} [{control.verno},{control.ackno}]" if control is not None else ""
        return f"SAL {self.src_flowid} > {self.dst_flowid}{flags}"


def _pseudo_header(transport: Packet, protocol: int, length_bytes: int) -> bytes | None:
    """The pseudo header from the IP header around `transport`, whatever lies between; None without an IP
    header.
    """
    layer = transport.underlayer
    while layer is not None and not isinstance(layer, IP):
        layer = layer.underlayer
    if layer is None:
        return None
    return struct.pack("!4s4sHH", inet_aton(layer.src), inet_aton(layer.dst), protocol, length_bytes)


def _without_ports(fields: _Fields) -> _Fields:
    """A transport's fields with ports that are 0 unless said otherwise."""
    return [ShortField("sport", 0), ShortField("dport", 0), *fields[2:]]


class ServalTCP(TCP):
    """TCP behind a SAL header: ports 0, the checksum over the addresses of the IP header."""

    name = "Serval TCP"
    fields_desc = _without_ports(TCP.fields_desc)

    def post_build(self, p: bytes, pay: bytes) -> bytes:
        if self.dataofs is None:
            p = p[:12] + bytes([len(p) // 4 << 4 | p[12] & 0x0F]) + p[13:]
        segment = p + pay
        if self.chksum is None:
            pseudo_header = _pseudo_header(self, 6, len(segment)) or b""
            segment = segment[:16] + struct.pack("!H", checksum(pseudo_header + segment)) + segment[18:]
        return segment

    def mysummary(self) -> tuple[str, list[type[Packet]]]:  # type: ignore[override]
        return f"Serval TCP {self.flags} seq={self.seq} ack={self.ack} data={len(self.payload)}", [SAL]

    def checksum_is_right(self) -> bool:
        """Whether the segment, as it was received, sums up with the addresses of its IP header."""
        pseudo_header = _pseudo_header(self, 6, len(self.original))
        return pseudo_header is not None and checksum(pseudo_header + self.original) == 0


class ServalUDP(UDP):
    """UDP behind a SAL header: ports 0, the checksum over the addresses of the IP header, or 0 for none."""

    name = "Serval UDP"
    fields_desc = _without_ports(UDP.fields_desc)

    def post_build(self, p: bytes, pay: bytes) -> bytes:
        datagram = p + pay
        if self.len is None:
            datagram = datagram[:4] + struct.pack("!H", len(datagram)) + datagram[6:]
        if self.chksum is None:
            pseudo_header = _pseudo_header(self, 17, len(datagram)) or b""
            computed = checksum(pseudo_header + datagram) or 0xFFFF
            datagram = datagram[:6] + struct.pack("!H", computed) + datagram[8:]
        return datagram

    def mysummary(self) -> tuple[str, list[type[Packet]]]:  # type: ignore[override]
        return f"Serval UDP data={len(self.payload)}", [SAL]

    def checksum_is_right(self) -> bool:
        """Whether the datagram, as it was received, sums up; one without a checksum does."""
        pseudo_header = _pseudo_header(self, 17, len(self.original))
        return self.chksum == 0 or (
            pseudo_header is not None and checksum(pseudo_header + self.original) == 0
        )


bind_layers(IP, SAL, proto=SAL_IP_PROTOCOL)
bind_layers(SAL, ServalTCP, protocol=6)
bind_layers(SAL, ServalUDP, protocol=17)
for _port in (SAL_ENCAPSULATION_CLIENT_PORT, SAL_ENCAPSULATION_SERVER_PORT):
    bind_bottom_up(UDP, SAL, dport=_port)
    bind_bottom_up(UDP, SAL, sport=_port)
bind_layers(UDP, SAL, sport=SAL_ENCAPSULATION_CLIENT_PORT, dport=SAL_ENCAPSULATION_SERVER_PORT)
