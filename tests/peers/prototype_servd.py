"""What does the prototype's registration daemon send and understand? Played by scapy over a raw socket.

It shares no code with our controller: messages are put together here, from OBSERVED "servd registration". Made in
the network namespace it belongs to; used from any thread.
"""

from __future__ import annotations

import select
import struct
import time
from typing import NamedTuple

from serval_core.wire.scapy_layers import IP, SAL, Raw, SALService, ServalUDP

from .raw_wire import RawWire

CLIENT, ROUTER = 55555, 88888
REGISTER, UNREGISTER = 0, 1
MESSAGE = struct.Struct("=BB2sIBBBB4s32s")
OWN_FLOW_ID = 2


def service_id(number: int) -> bytes:
    """The serviceID that a decimal number denotes."""
    return number.to_bytes(4, "big").ljust(32, b"\0")


class Heard(NamedTuple):
    """A registration message as the prototype reads it. `length_bytes` is that of the whole payload."""

    source: str
    kind: int
    transaction_id: int
    refresh: bool
    prefix_bits: int
    old_address: str
    service_id: bytes
    length_bytes: int


class PlayedServd:
    """One prototype host or router. `heard` are the messages that came for its role's service."""

    def __init__(self, *, router: bool) -> None:
        self._own, self._peer = (ROUTER, CLIENT) if router else (CLIENT, ROUTER)
        self.wire = RawWire()
        self.heard: list[Heard] = []
        self.resets = 0
        self._transaction_id = 0

    def close(self) -> None:
        """Give the socket back."""
        self.wire.close()

    def say(self, source: str, destination: str, kind: int, service: int, old: str = "") -> None:
        """Send a registration for `service`; `old` is the address known before, "" for the first time."""
        self._transaction_id += 1
        message = MESSAGE.pack(
            kind,
            0,
            b"\x00\x30",
            self._transaction_id,
            1 if old else 0,
            0,
            0,
            0,
            bytes(map(int, old.split("."))) if old else bytes(4),
            service_id(service),
        )
        self.send(source, destination, message)

    def send(self, source: str, destination: str, payload: bytes, source_service: int | None = None) -> None:
        """Send any payload to the other role's service."""
        extensions = [
            SALService(service_id=service_id(self._peer)),
            SALService(service_id=service_id(self._own if source_service is None else source_service)),
        ]
        header = SAL(src_flowid=OWN_FLOW_ID, dst_flowid=0, protocol=17, extensions=extensions)
        self.wire.send(source, destination, header / ServalUDP() / Raw(payload))

    def listen(self, seconds: float) -> None:
        """Take in what arrives within that time."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.wire.socket], [], [], left)[0]:
                self._take()

    def wait_heard(self, count: int, timeout_s: float = 10.0) -> list[Heard]:
        """Return once that many messages were heard."""
        deadline = time.monotonic() + timeout_s
        while len(self.heard) < count:
            left = deadline - time.monotonic()
            assert left > 0, f"waited for {count} messages, heard {self.heard}"
            if select.select([self.wire.socket], [], [], left)[0]:
                self._take()
        return self.heard

    def _take(self) -> None:
        while (received := self.wire.receive()) is not None:
            packet = received.packet
            services = [each for each in packet[SAL].extensions if isinstance(each, SALService)]
            wanted = [service_id(self._own), service_id(self._peer)]
            if [each.service_id for each in services] != wanted or ServalUDP not in packet:
                self.resets += 1 if packet[SAL].dst_flowid == OWN_FLOW_ID else 0
                continue
            payload = bytes(packet[ServalUDP].payload)
            fields = MESSAGE.unpack_from(payload)
            kind, _, length, transaction_id, flags, _, bits, _, old, service = fields
            assert (
                length == b"\x00\x30"
            )  # this, and not the datagram's, is the length that the prototype believes
            self.heard.append(
                Heard(
                    packet[IP].src,
                    kind,
                    transaction_id,
                    bool(flags),
                    bits,
                    ".".join(map(str, old)),
                    service,
                    len(payload),
                )
            )
