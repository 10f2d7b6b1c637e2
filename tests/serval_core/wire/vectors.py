"""Which packets must we be able to write and read? The worked vectors, each as values and as bytes.

They were computed from the layouts alone, by neither our code nor the prototype. A is the client (flow 2), B
the server (flow 5), M is A's address after it has moved, F a SAL forwarder.
"""

from __future__ import annotations

from typing import NamedTuple

from serval_core.names import ServiceID, ServicePrefix
from serval_core.wire import tcp_segment
from serval_core.wire.control_messages import (
    MessageType,
    Migration,
    Registration,
    ServiceChange,
    ServiceInfo,
)
from serval_core.wire.sal import ACK, FIN, PROTOCOL_TCP, PROTOCOL_UDP, RST, RSYN, SYN, Control, SalPacket
from serval_core.wire.tcp_segment import NO_OPTIONS, TcpOptions, TcpSegment
from serval_core.wire.udp import UdpDatagram

A = 0x0A000001
B = 0x0A000002
F = 0x0A000009
M = 0xC0A80701
A_NONCE = bytes.fromhex("1122334455667788")
B_NONCE = bytes.fromhex("99aabbccddeeff00")
SERVICE = ServiceID.from_number(76568)
ECHO = ServiceID.from_number(16385)
ECHO_CLIENT = ServiceID.from_number(32769)
EXACTLY = ServicePrefix.of(SERVICE)
OPTIONS = TcpOptions(mss=1448, window_scale=1)


class PacketVector(NamedTuple):
    """An IP packet of protocol 144. `sal` has no transport part in it: that is `transport`."""

    title: str
    source: int
    destination: int
    ttl: int
    sal: SalPacket
    transport: TcpSegment | UdpDatagram | None
    packet: bytes


class MessageVector(NamedTuple):
    """A control message."""

    title: str
    message: Registration | ServiceChange | Migration
    data: bytes


def _control(
    src_flow_id: int,
    dst_flow_id: int,
    flags: int,
    verno: int,
    ackno: int,
    nonce: bytes,
    service: ServiceID | None = None,
    protocol: int = PROTOCOL_TCP,
    source_addresses: tuple[int, ...] = (),
) -> SalPacket:
    control = Control(flags, verno, ackno, nonce)
    services = () if service is None else (service,)
    return SalPacket(src_flow_id, dst_flow_id, protocol, control, services, source_addresses, b"")


def _data(src_flow_id: int, dst_flow_id: int) -> SalPacket:
    return SalPacket(src_flow_id, dst_flow_id, PROTOCOL_TCP, None, (), (), b"")


def _tcp(
    sequence: int,
    acknowledgement: int,
    flags: int,
    window: int,
    options: TcpOptions = NO_OPTIONS,
    payload: bytes = b"",
) -> TcpSegment:
    return TcpSegment(0, 0, sequence, acknowledgement, flags, window, 0, options, payload)


PACKETS = (
    PacketVector(
        "1.1 SYN",
        A,
        B,
        64,
        _control(2, 0, SYN, 0x1000, 0, A_NONCE, SERVICE),
        _tcp(0x0A000000, 0, tcp_segment.SYN, 0, OPTIONS),
        bytes.fromhex(
            "45000074 00000000 409065f8 0a000001 0a000002 00000002 00000000 1106f250 "
            "10148000 00001000 00000000 11223344 55667788 20240000 00012b18 00000000 "
            "00000000 00000000 00000000 00000000 00000000 00000000 00000000 0a000000 "
            "00000000 70020000 66280000 020405a8 01030301"
        ),
    ),
    PacketVector(
        "1.2 SYN-ACK",
        B,
        A,
        64,
        _control(5, 2, SYN | ACK, 0x2000, 0x1001, B_NONCE),
        _tcp(0x0B000000, 0x0A000001, tcp_segment.SYN | tcp_segment.ACK, 5792, OPTIONS),
        bytes.fromhex(
            "45000050 00000000 4090661c 0a000002 0a000001 00000005 00000002 0806e575 "
            "1014a000 00002000 00001001 99aabbcc ddeeff00 00000000 0b000000 0a000001 "
            "701216a0 44770000 020405a8 01030301"
        ),
    ),
    PacketVector(
        "1.3 ACK",
        A,
        B,
        64,
        _control(2, 5, ACK, 0x1001, 0x2001, A_NONCE, SERVICE),
        _tcp(0x0A000001, 0x0B000001, tcp_segment.ACK, 2896),
        bytes.fromhex(
            "4500006c 00000000 40906600 0a000001 0a000002 00000002 00000005 1106324a "
            "10142000 00001001 00002001 11223344 55667788 20240000 00012b18 00000000 "
            "00000000 00000000 00000000 00000000 00000000 00000000 00000000 0a000001 "
            "0b000001 50100b50 7b800000"
        ),
    ),
    PacketVector(
        "1.4 data",
        A,
        B,
        64,
        _data(2, 5),
        _tcp(0x0A000001, 0x0B000001, tcp_segment.PSH | tcp_segment.ACK, 2896, payload=b"hello"),
        bytes.fromhex(
            "45 00003900 00000040 9066330a 0000010a 00000200 00000200 00000503 "
            "06fcf200 0000000a 0000010b 00000150 180b5037 a1000068 656c6c6f"
        ),
    ),
    PacketVector(
        "2.1 TCP FIN",
        A,
        B,
        64,
        _data(2, 5),
        _tcp(0x0A000006, 0x0B000001, tcp_segment.FIN | tcp_segment.ACK, 2896),
        bytes.fromhex(
            "45000034 00000000 40906638 0a000001 0a000002 00000002 00000005 0306fcf2 "
            "00000000 0a000006 0b000001 50110b50 7b7a0000"
        ),
    ),
    PacketVector(
        "2.2 SAL FIN",
        A,
        B,
        64,
        _control(2, 5, FIN, 0x1001, 0x2001, A_NONCE),
        None,
        bytes.fromhex(
            "45000034 00000000 40906638 0a000001 0a000002 00000002 00000005 0806a287 "
            "10140400 00001001 00002001 11223344 55667788"
        ),
    ),
    PacketVector(
        "2.3 SAL ACK of FIN",
        B,
        A,
        64,
        _control(5, 2, ACK, 0x2001, 0x1002, B_NONCE),
        None,
        bytes.fromhex(
            "45000034 00000000 40906638 0a000002 0a000001 00000005 00000002 08066574 "
            "10142000 00002001 00001002 99aabbcc ddeeff00"
        ),
    ),
    PacketVector(
        "3.1 RSYN",
        M,
        B,
        64,
        _control(2, 5, RSYN, 0x1001, 0x2001, A_NONCE),
        None,
        bytes.fromhex(
            "45000034 00000000 4090a88f c0a80701 0a000002 00000002 00000005 08066687 "
            "10144000 00001001 00002001 11223344 55667788"
        ),
    ),
    PacketVector(
        "3.2 RSYN-ACK",
        B,
        M,
        64,
        _control(5, 2, RSYN | ACK, 0x2001, 0x1002, B_NONCE),
        None,
        bytes.fromhex(
            "45000034 00000000 4090a88f 0a000002 c0a80701 00000005 00000002 08062574 "
            "10146000 00002001 00001002 99aabbcc ddeeff00"
        ),
    ),
    PacketVector(
        "3.3 ACK",
        M,
        B,
        64,
        _control(2, 5, ACK, 0x1002, 0x2001, A_NONCE),
        None,
        bytes.fromhex(
            "45000034 00000000 4090a88f c0a80701 0a000002 00000002 00000005 08068686 "
            "10142000 00001002 00002001 11223344 55667788"
        ),
    ),
    PacketVector(
        "3.4 Data after migration",
        M,
        B,
        64,
        _data(2, 5),
        _tcp(0x0A000006, 0x0B000001, tcp_segment.PSH | tcp_segment.ACK, 2896, payload=b"again"),
        bytes.fromhex(
            "45 00003900 00000040 90a88ac0 a807010a 00000200 00000200 00000503 "
            "06fcf200 0000000a 0000060b 00000150 180b508c f4000061 6761696e"
        ),
    ),
    PacketVector(
        "4.1 SYN to a forwarder",
        A,
        F,
        64,
        _control(2, 0, SYN, 0x1000, 0, A_NONCE, SERVICE),
        _tcp(0x0A000000, 0, tcp_segment.SYN, 0, OPTIONS),
        bytes.fromhex(
            "45000074 00000000 409065f1 0a000001 0a000009 00000002 00000000 1106f250 "
            "10148000 00001000 00000000 11223344 55667788 20240000 00012b18 00000000 "
            "00000000 00000000 00000000 00000000 00000000 00000000 00000000 0a000000 "
            "00000000 70020000 66210000 020405a8 01030301"
        ),
    ),
    PacketVector(
        "4.2 same SYN as F forwards it",
        A,
        B,
        63,
        _control(2, 0, SYN, 0x1000, 0, A_NONCE, SERVICE, source_addresses=(A, F)),
        _tcp(0x0A000000, 0, tcp_segment.SYN, 0, OPTIONS),
        bytes.fromhex(
            "45000080 00000000 3f9066ec 0a000001 0a000002 00000002 00000000 14069b3a "
            "10148000 00001000 00000000 11223344 55667788 20240000 00012b18 00000000 "
            "00000000 00000000 00000000 00000000 00000000 00000000 400c0000 0a000001 "
            "0a000009 00000000 0a000000 00000000 70020000 66280000 020405a8 01030301"
        ),
    ),
    PacketVector(
        "4.3 SYN-ACK to a forwarded SYN",
        B,
        A,
        64,
        _control(5, 2, SYN | ACK, 0x2000, 0x1001, B_NONCE, source_addresses=(A, F, B)),
        _tcp(0x0B000000, 0x0A000001, tcp_segment.SYN | tcp_segment.ACK, 5792, OPTIONS),
        bytes.fromhex(
            "45000060 00000000 4090660c 0a000002 0a000001 00000005 00000002 0c068359 "
            "1014a000 00002000 00001001 99aabbcc ddeeff00 40100000 0a000001 0a000009 "
            "0a000002 00000000 0b000000 0a000001 701216a0 44770000 020405a8 01030301"
        ),
    ),
    PacketVector(
        "5.1 datagram to 16385 from 32769",
        A,
        B,
        64,
        SalPacket(2, 0, PROTOCOL_UDP, None, (ECHO, ECHO_CLIENT), (), b""),
        UdpDatagram(0, 0, b"ping"),
        bytes.fromhex(
            "45000074 00000000 409065f8 0a000001 0a000002 00000002 00000000 1511eaa1 "
            "20240000 00004001 00000000 00000000 00000000 00000000 00000000 00000000 "
            "00000000 20240000 00008001 00000000 00000000 00000000 00000000 00000000 "
            "00000000 00000000 00000000 000c0d03 70696e67"
        ),
    ),
    PacketVector(
        "5.2 Connected-UDP SYN",
        A,
        B,
        64,
        _control(2, 0, SYN, 0x1000, 0, A_NONCE, ECHO, PROTOCOL_UDP),
        UdpDatagram(0, 0, b""),
        bytes.fromhex(
            "45000060 00000000 4090660c 0a000001 0a000002 00000002 00000000 1111dd5d "
            "10148000 00001000 00000000 11223344 55667788 20240000 00004001 00000000 "
            "00000000 00000000 00000000 00000000 00000000 00000000 00000000 0008ebdb"
        ),
    ),
    PacketVector(
        "5.3 Connected-UDP SYN-ACK",
        B,
        A,
        64,
        _control(5, 2, SYN | ACK, 0x2000, 0x1001, B_NONCE, protocol=PROTOCOL_UDP),
        UdpDatagram(0, 0, b"", checksummed=False),
        bytes.fromhex(
            "4500003c 00000000 40906630 0a000002 0a000001 00000005 00000002 0811e56a "
            "1014a000 00002000 00001001 99aabbcc ddeeff00 00000000 00080000"
        ),
    ),
    PacketVector(
        "6.1 RST answering 1.3",
        B,
        A,
        64,
        _control(5, 2, RST, 0x2001, 0, A_NONCE),
        None,
        bytes.fromhex(
            "45000034 00000000 40906638 0a000002 0a000001 00000005 00000002 0806ae88 "
            "10140800 00002001 00000000 11223344 55667788"
        ),
    ),
    PacketVector(
        "6.2 active RST",
        A,
        B,
        64,
        _control(2, 5, RST | ACK, 0x1001, 0x2001, A_NONCE),
        None,
        bytes.fromhex(
            "45000034 00000000 40906638 0a000001 0a000002 00000002 00000005 08067e87 "
            "10142800 00001001 00002001 11223344 55667788"
        ),
    ),
)

# 1.1 inside UDP, from port 54324 to port 54325.
ENCAPSULATED_SYN = bytes.fromhex(
    "4500007c 00000000 4011666f 0a000001 0a000002 d434d435 006856d6 00000002 "
    "00000000 1106f250 10148000 00001000 00000000 11223344 55667788 20240000 "
    "00012b18 00000000 00000000 00000000 00000000 00000000 00000000 00000000 "
    "00000000 0a000000 00000000 70020000 66280000 020405a8 01030301"
)

MESSAGES = (
    MessageVector(
        "8.1 REGISTER",
        Registration(MessageType.REGISTER, 1, EXACTLY),
        bytes.fromhex(
            "00000030 01000000 00000000 00000000 00012b18 00000000 00000000 00000000 "
            "00000000 00000000 00000000 00000000"
        ),
    ),
    MessageVector(
        "8.2 REGISTER again",
        Registration(MessageType.REGISTER, 2, EXACTLY, refresh=True, old_address=A),
        bytes.fromhex(
            "00000030 02000000 01000000 0a000001 00012b18 00000000 00000000 00000000 "
            "00000000 00000000 00000000 00000000"
        ),
    ),
    MessageVector(
        "8.3 ADD_SERVICE",
        ServiceChange(MessageType.ADD_SERVICE, 1, (ServiceInfo(1, EXACTLY, B),)),
        bytes.fromhex(
            "03004800 01000000 00000000 01000000 ffffffff 01000000 00000000 00000000 "
            "00000000 0a000002 00012b18 00000000 00000000 00000000 00000000 00000000 "
            "00000000 00000000"
        ),
    ),
    MessageVector(
        "8.4 MIGRATE",
        Migration(1, 0, b"eth0".ljust(32, b"\0"), "wlan0"),
        bytes.fromhex(
            "09 00390001 00000000 65746830 00000000 00000000 00000000 00000000 "
            "00000000 00000000 00000000 776c616e 30000000 00000000 00000000"
        ),
    ),
)
