"""How does a prototype's datagram socket behave? What all have in common, and unconnected ones; faults included.

Independent of our stack, as the rest of this package: SPEC 3, 4.6 and OBSERVED written down a second time. Each
peer plays once, with `run`, in a thread or process that is in the right network namespace.
"""

from __future__ import annotations

import os
import random
import select
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from scapy.packet import Packet, Raw

from serval_core.wire.scapy_layers import IP, SAL, SALControl, SALService, ServalUDP

from .application import COMPLAINTS
from .prototype_flow import ACK, RST
from .raw_wire import Loss, RawWire, lose_nothing, source_address

PACKETS_PER_TURN = 64
UDP_PROTOCOL = 17


@dataclass
class UdpResult:
    """What the program on top saw. `error` is the name of an errno, "" for none."""

    received: list[bytes] = field(default_factory=list)
    sources: list[bytes] = field(default_factory=list)
    error: str = ""
    end_of_stream: bool = False
    state: str = ""
    timed_out: bool = False
    counters: Counter[str] = field(default_factory=Counter)
    log: list[str] = field(default_factory=list, repr=False)

    @property
    def complaints(self) -> dict[str, int]:
        """What the other side did wrong."""
        return {name: self.counters[name] for name in COMPLAINTS if self.counters[name]}


def service_number(service_id: int) -> bytes:
    """The serviceID that a decimal number denotes."""
    return service_id.to_bytes(4, "big").ljust(32, b"\0")


def udp(payload: bytes = b"", checksummed: bool = True) -> Packet:
    """The UDP header with its payload."""
    header = ServalUDP() if checksummed else ServalUDP(chksum=0)
    return header / Raw(payload) if payload else header


def payload_of(packet: Packet) -> bytes:
    """What is behind the UDP header."""
    return bytes(packet[ServalUDP].payload)


class UdpSocket(ABC):
    """What all of them share: the loop and the raw wire."""

    def __init__(self, timeout_s: float = 30.0, lose: Loss = lose_nothing, seed: int = 1) -> None:
        self.ready = threading.Event()
        self.result = UdpResult()
        self._timeout_s = timeout_s
        self._lose = lose
        self._numbers = random.Random(seed)
        self._wire: RawWire
        self._over_at = float("inf")
        self._resend_at = float("inf")
        self._stop = threading.Event()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def stop(self) -> None:
        """Make `run` return soon, from another thread."""
        self._stop.set()
        os.eventfd_write(self._wake, 1)

    def run(self) -> UdpResult:
        """Play to the end."""
        self._wire = RawWire(lose=self._lose)
        deadline = time.monotonic() + self._timeout_s
        try:
            self._start(time.monotonic())
            self.ready.set()
            while not self._stop.is_set() and time.monotonic() < min(deadline, self._over_at):
                wait_s = max(0.0, min(deadline, self._over_at, self._resend_at) - time.monotonic())
                select.select([self._wire.socket.fileno(), self._wake], [], [], wait_s)
                self._turn()
            self.result.timed_out = time.monotonic() >= deadline
        finally:
            self._wire.close()
            os.close(self._wake)
        self.result.counters += self._wire.counters
        self.result.log = self._wire.log
        return self.result

    @abstractmethod
    def _start(self, now: float) -> None:
        """Send what is to be sent first."""

    @abstractmethod
    def _packet(self, packet: Packet, reply_address: str, now: float) -> None:
        """A packet that passed every check."""

    def _timeout(self, now: float) -> None:  # noqa: B027
        """`_resend_at` has come, which it never does where nothing is repeated."""

    def _turn(self) -> None:
        for _ in range(PACKETS_PER_TURN):
            received = self._wire.receive()
            if received is None:
                break
            self._packet(received.packet, received.reply_address, time.monotonic())
        if time.monotonic() >= self._resend_at:
            self._timeout(time.monotonic())

    def _end(self, error: str, linger_s: float = 0.0) -> None:
        self.result.error = error
        self._over_at = time.monotonic() + linger_s


class PrototypeDatagramSocket(UdpSocket):
    """An unconnected socket bound to `own` that sends `messages` to `peer` at `destination`, a dotted address.

    It answers every datagram in upper case if it has nothing to say itself. It ends when `expected` datagrams
    have arrived, or with the first RST: that is a fault of the prototype (OBSERVED 2).
    """

    def __init__(
        self,
        own: int,
        peer: int = 0,
        destination: str = "",
        messages: Sequence[bytes] = (),
        expected: int = 1,
        **how: float,
    ) -> None:
        super().__init__(**how)  # type: ignore[arg-type]
        self._own = service_number(own)
        self._peer = service_number(peer)
        self._destination = destination
        self._messages = list(messages)
        self._expected = expected
        self._flow_id = 6

    def _start(self, now: float) -> None:
        for message in self._messages:
            source = source_address(self._destination)
            self._send(source, self._destination, self._peer, message)

    def _send(self, source: str, destination: str, service_id: bytes, payload: bytes) -> None:
        services = [SALService(service_id=service_id), SALService(service_id=self._own)]
        header = SAL(src_flowid=self._flow_id, dst_flowid=0, protocol=UDP_PROTOCOL, extensions=services)
        self._wire.send(source, destination, header / udp(payload))

    def _packet(self, packet: Packet, reply_address: str, now: float) -> None:
        sal = packet[SAL]
        control = sal.extension(SALControl)
        if sal.dst_flowid == self._flow_id and control is not None and int(control.flags) & RST:
            # It hears its own broadcasts and refuses them, from the broadcast address, which does it no harm.
            if not packet[IP].src.endswith(".255"):
                self._end("ECONNRESET")
            return
        services = [each.service_id for each in sal.extensions if isinstance(each, SALService)]
        if not services:
            self.result.counters["packets_for_no_flow"] += 1
        elif services[0] != self._own:
            self._refuse(packet)
        elif len(services) != 2 or ServalUDP not in packet or not payload_of(packet):
            self.result.counters["malformed_packets"] += 1
        else:
            self.result.received.append(payload_of(packet))
            self.result.sources.append(services[1])
            if not self._messages:
                self._send(reply_address, packet[IP].src, services[1], payload_of(packet).upper())
            if len(self.result.received) >= self._expected:
                self._end("")

    def _refuse(self, packet: Packet) -> None:
        """The RST for a datagram to a service that is not here: verno 0, no nonce."""
        sal = packet[SAL]
        if sal.extension(SALControl) is not None:
            return
        reset = SALControl(flags=RST | ACK, verno=0, ackno=0, nonce=bytes(8))
        layer = SAL(
            src_flowid=sal.dst_flowid, dst_flowid=sal.src_flowid, protocol=sal.protocol, extensions=[reset]
        )
        self.result.counters["reply_resets"] += 1
        self._wire.send(packet[IP].dst, packet[IP].src, layer)
