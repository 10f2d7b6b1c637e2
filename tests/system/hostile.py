"""What does an attacker send, and what must it not disturb? Hand-made packets, an attacker's host, a live transfer.

The packets are built here from bytes and not by our own emitters, which refuse to make most of them.
"""

from __future__ import annotations

import hashlib
import os
import random
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from lab.hosts import Host
from lab.waiting import wait_for

SERVICE_NUMBER, UNKNOWN_SERVICE_NUMBER = 76568, 99
SYN, RSYN, ACK, NACK, RST, FIN = 0x80, 0x40, 0x20, 0x10, 0x08, 0x04
TCP_FIN, TCP_SYN, TCP_RST, TCP_ACK = 0x01, 0x02, 0x04, 0x10
PROTOCOL_SAL, PROTOCOL_TCP, PROTOCOL_UDP = 144, 6, 17
MORE_FRAGMENTS = 0x2000
HANDSHAKE_OPTIONS = bytes.fromhex("020405a8 01030301")
NONCE = bytes.fromhex("1122334455667788")
CHUNK_BYTES = 1 << 14


def folded(data: bytes, start: int = 0) -> int:
    """The Internet checksum (RFC 1071) of `data`, begun at `start`."""
    data += bytes(len(data) % 2)
    total: int = start + sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def service(number: int = SERVICE_NUMBER) -> bytes:
    """A SERVICE extension."""
    return b"\x20\x24\0\0" + struct.pack("!I28x", number)


def control(flags: int, verno: int = 1000, ackno: int = 0, nonce: bytes = NONCE) -> bytes:
    """A CONTROL extension."""
    return struct.pack("!BBBxII8s", 0x10, 20, flags, verno, ackno, nonce)


def source(*addresses: str) -> bytes:
    """A SOURCE extension."""
    return bytes((0x40, 4 + 4 * len(addresses), 0, 0)) + b"".join(map(socket.inet_aton, addresses))


def sal(
    *extensions: bytes,
    flows: tuple[int, int] = (5, 0),
    words: int | None = None,
    protocol: int = PROTOCOL_TCP,
    damage: int = 0,
) -> bytes:
    """A SAL header whose checksum is right for the length that it states, and then changed by `damage`."""
    body = b"".join(extensions)
    stated = 3 + len(body) // 4 if words is None else words
    header = struct.pack("!IIBBH", *flows, stated, protocol, 0) + body
    checksum = folded(header[: stated * 4]) ^ damage
    return header[:10] + struct.pack("!H", checksum) + header[12:]


def tcp(
    addresses: tuple[str, str],
    *,
    flags: int = TCP_SYN,
    sequence: int = 7000,
    acknowledgement: int = 0,
    options: bytes = HANDSHAKE_OPTIONS,
    payload: bytes = b"",
    words: int | None = None,
    window: int = 0,
    damage: int = 0,
) -> bytes:
    """A TCP segment between two addresses, its checksum changed by `damage`; ports 0."""
    stated = 5 + len(options) // 4 if words is None else words
    head = struct.pack("!HHIIBBHHH", 0, 0, sequence, acknowledgement, stated << 4, flags, window, 0, 0)
    segment = head + options + payload
    pseudo_header = b"".join(map(socket.inet_aton, addresses)) + struct.pack("!HH", 6, len(segment))
    checksum = folded(pseudo_header + segment) ^ damage
    return segment[:16] + struct.pack("!H", checksum) + segment[18:]


def ipv4(
    addresses: tuple[str, str],
    payload: bytes,
    *,
    fragment: int = 0,
    identification: int = 0,
    options: bytes = b"",
) -> bytes:
    """An IPv4 packet of protocol 144 for a raw socket, which fills in the checksum."""
    source_address, destination = map(socket.inet_aton, addresses)
    words = 5 + len(options) // 4
    length = words * 4 + len(payload)
    head = struct.pack("!BBHHHBBH", 0x40 | words, 0, length, identification, fragment, 64, PROTOCOL_SAL, 0)
    return head + source_address + destination + options + payload


class Attacker:
    """Sends whatever it likes from its own address or another one, and sees what is sent to it in answer."""

    def __init__(self, host: Host, victim: str) -> None:
        self.address = host.address()
        self.victim = victim
        self._socket = host.call(socket.socket, socket.AF_INET, socket.SOCK_RAW, PROTOCOL_SAL)
        self._socket.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)

    @property
    def ends(self) -> tuple[str, str]:
        """Own address and the victim's."""
        return self.address, self.victim

    def send(
        self,
        payload: bytes,
        *,
        sender: str = "",
        fragment: int = 0,
        identification: int = 0,
        options: bytes = b"",
    ) -> None:
        """One packet of protocol 144; `sender` forges its source address, `options` are those of IPv4."""
        addresses = (sender or self.address, self.victim)
        self.send_packet(
            ipv4(addresses, payload, fragment=fragment, identification=identification, options=options)
        )

    def send_packet(self, packet: bytes) -> None:
        """One IPv4 packet as it is."""
        self._socket.sendto(packet, (self.victim, 0))

    def send_fragmented(self, payload: bytes, *, sender: str = "") -> None:
        """The same in two fragments. The kernel of the victim puts them together."""
        half = len(payload) // 2 // 8 * 8
        identification = random.getrandbits(16) | 1
        self.send(payload[:half], sender=sender, fragment=MORE_FRAGMENTS, identification=identification)
        self.send(payload[half:], sender=sender, fragment=half // 8, identification=identification)

    def answers(self) -> list[bytes]:
        """The SAL packets, from their SAL header on, that came since the last call."""
        received = []
        while select.select([self._socket], [], [], 0)[0]:
            packet = self._socket.recv(65535)
            received.append(packet[(packet[0] & 15) * 4 :])
        return received

    def answer(self, longer_than_bytes: int = 0) -> bytes:
        """The next of them that is longer than that, once it is there."""
        return wait_for(
            lambda: next((each for each in self.answers() if len(each) > longer_than_bytes), b""), "an answer"
        )

    def close(self) -> None:
        """End."""
        self._socket.close()


@dataclass
class LiveTransfer:
    """Bytes that flow from one socket to another until `finish()`, which compares what went in with what came out."""

    sender: socket.socket
    receiver: socket.socket
    seed: int = 0
    moved_bytes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _failures: list[BaseException] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sent, self.received = hashlib.sha256(), hashlib.sha256()
        # Little is under way at a time, so that the end is not far when it is asked for.
        self.sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        self._threads = [
            threading.Thread(target=self._guarded, args=(each,)) for each in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()
        self.goes_on()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._failures.append(error)

    def _send(self) -> None:
        numbers = random.Random(self.seed)
        while not self._stop.is_set():
            chunk = numbers.randbytes(CHUNK_BYTES)
            self.sender.sendall(chunk)
            self.sent.update(chunk)
        self.sender.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while data := self.receiver.recv(1 << 16):
            self.received.update(data)
            self.moved_bytes += len(data)

    def goes_on(self) -> None:
        """Wait until so many bytes have arrived that some were sent after this call."""
        enough = self.moved_bytes + (1 << 19)
        wait_for(lambda: self.moved_bytes >= enough or self._failures, "the transfer to go on")
        assert not self._failures

    def finish(self) -> None:
        """End it; AssertionError unless every byte arrived."""
        self._stop.set()
        for thread in self._threads:
            thread.join(30)
        assert not self._failures
        assert self.received.hexdigest() == self.sent.hexdigest()


def resident_bytes(pid: int) -> int:
    """The memory of a process that is in RAM."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class SynTemplate:
    """Makes SYNs that differ in source address, flowID and nonce, with right checksums, thousands per second."""

    def __init__(self, victim: str, number: int = SERVICE_NUMBER) -> None:
        header = sal(control(SYN, nonce=bytes(8)), service(number), flows=(0, 0))
        segment = tcp(("0.0.0.0", victim))
        packet = ipv4(("0.0.0.0", victim), header + segment)
        self._packet = packet
        self._sal_sum = folded(header[:10] + bytes(2) + header[12:]) ^ 0xFFFF
        self._tcp_sum = folded(segment[:16] + bytes(2) + segment[18:]) ^ 0xFFFF
        self._tcp_sum += sum(struct.unpack("!HH", socket.inet_aton(victim))) + PROTOCOL_TCP + len(segment)
        self._sal_at, self._tcp_at = 20, 20 + len(header)

    def make(self, source_address: int, flow_id: int, nonce: int) -> bytes:
        """One of them."""
        packet = bytearray(self._packet)
        struct.pack_into("!I", packet, 12, source_address)
        struct.pack_into("!I", packet, self._sal_at, flow_id)
        struct.pack_into("!Q", packet, self._sal_at + 24, nonce)
        struct.pack_into("!H", packet, self._sal_at + 10, _complement(self._sal_sum + flow_id + nonce))
        struct.pack_into("!H", packet, self._tcp_at + 16, _complement(self._tcp_sum + source_address))
        return bytes(packet)


def _complement(total: int) -> int:
    """The checksum field for a sum of any size: 65536 is 1 in this arithmetic."""
    return (total % 0xFFFF) ^ 0xFFFF
