"""How does the prototype put packets on the wire and take them off? With a raw socket of IP protocol 144.

A raw socket sees what a NIC without offloads would: a checksum that was left to hardware, or a segment that
was left to be cut, is an error here. What arrives is verified and counted before anyone looks at it.
"""

from __future__ import annotations

import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

from scapy.packet import Packet

from serval_core.wire.scapy_layers import IP, SAL, Raw, ServalTCP, ServalUDP

SAL_PROTOCOL = 144
ANCILLARY_BYTES = 64
RECEIVE_BUFFER_BYTES = 8 << 20
LARGEST_PACKET_BYTES = 65535
SO_RCVBUFFORCE = 33
IP_PKTINFO = 8

Direction = Literal["sent", "received"]
Loss = Callable[[Direction, Packet], bool]
"""Whether this packet is to get lost on the way."""


class Received(NamedTuple):
    """A packet that passed every check, and the address of ours that a reply comes from."""

    packet: Packet
    reply_address: str


def lose_nothing(_direction: Direction, _packet: Packet) -> bool:
    """A good wire."""
    return False


class Wire(Protocol):
    """Where a flow sends to."""

    def send(self, source: str, destination: str, layers: Packet) -> None:
        """Send SAL and what follows it from `source` to `destination`."""


class RawWire:
    """The raw socket. `counters` tells what was seen; `log` lists every packet that passed, either way."""

    def __init__(self, mtu_bytes: int = 1500, lose: Loss = lose_nothing) -> None:
        self.mtu_bytes = mtu_bytes
        self.lose = lose
        self.counters: Counter[str] = Counter()
        self.log: list[str] = []
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_RAW, SAL_PROTOCOL)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_HDRINCL, 1)
        self.socket.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def send(self, source: str, destination: str, layers: Packet) -> None:
        """Send a SAL packet as the prototype does: TTL 64, DF not set, identification left to the kernel."""
        packet = IP(src=source, dst=destination, ttl=64, id=0, flags=0) / layers
        if self._lost("sent", packet):
            return
        self.counters["sent"] += 1
        self.socket.sendto(bytes(packet), (destination, 0))

    def receive(self) -> Received | None:
        """The next packet that is fit to be processed, or None when there is none for now."""
        while True:
            try:
                data, ancillary, _, _ = self.socket.recvmsg(LARGEST_PACKET_BYTES, ANCILLARY_BYTES)
            except BlockingIOError:
                return None
            packet = IP(data)
            if not self._lost("received", packet) and self._is_fit(data, packet):
                return Received(packet, _reply_address(ancillary))

    def _lost(self, direction: Direction, packet: Packet) -> bool:
        lost = self.lose(direction, packet)
        fate = f"{direction}, lost" if lost else direction
        self.log.append(f"{fate}: {packet.src} > {packet.dst} {packet.summary()}")
        if lost:
            self.counters[f"{direction}_and_lost"] += 1
        return lost

    def _is_fit(self, data: bytes, packet: Packet) -> bool:
        """Count what arrived; false when the prototype would drop it without a look at its content."""
        self.counters["received"] += 1
        self.counters["largest_packet_bytes"] = max(self.counters["largest_packet_bytes"], len(data))
        if len(data) > self.mtu_bytes:
            self.counters["oversize_packets"] += 1
        if SAL not in packet or Raw in packet[SAL].extensions:
            self.counters["malformed_packets"] += 1
            return False
        if not packet[SAL].checksum_is_right():
            self.counters["wrong_sal_checksums"] += 1
            return False
        for layer in (ServalTCP, ServalUDP):
            if layer in packet and not packet[layer].checksum_is_right():
                self.counters["wrong_transport_checksums"] += 1
                return False
        return True


def _reply_address(ancillary: list[tuple[int, int, bytes]]) -> str:
    """The address that the kernel would answer from: that of the receiving interface for a broadcast."""
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            _interface_index, address, _destination = struct.unpack("@i4s4s", data[:12])
            return socket.inet_ntoa(address)
    raise AssertionError("the kernel did not say where the packet arrived")


def source_address(destination: str) -> str:
    """The address that this host uses towards `destination`, which may be a broadcast address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        probe.connect((destination, 9))
        address: str = probe.getsockname()[0]
        return address
