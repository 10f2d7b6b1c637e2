"""When did SYNs of Serval reach a host? What comes to its interface, before its stack."""

from __future__ import annotations

import socket
from typing import Any

from lab.hosts import Host
from lab.timed_packets import TimedPackets
from serval_core.errors import TheirMistake
from serval_core.wire import ipv4
from serval_core.wire.sal import PROTOCOL_SAL, SYN, parse

FRAME_BYTES = 65536
# Classic BPF on the IP packet of a SOCK_DGRAM socket: load 8 bits, jump if equal, return.
_ONLY_SAL = [(0x30, 0, 0, 9), (0x15, 0, 1, PROTOCOL_SAL), (0x06, 0, 0, FRAME_BYTES), (0x06, 0, 0, 0)]


class Attempts(TimedPackets):
    """Notes the SYNs that come in through `interface` of `host`, from now on."""

    def __init__(self, host: Host, interface: str) -> None:
        self.times: list[float] = []  # of arrival, seconds of the wall clock
        super().__init__(host, interface, socket.SOCK_DGRAM, _ONLY_SAL, FRAME_BYTES)

    def note(self, packet: bytes, at: float, where: Any) -> None:
        """A packet of protocol 144."""
        if where[2] != socket.PACKET_OUTGOING and _is_syn(packet):
            self.times.append(at)


def _is_syn(packet: bytes) -> bool:
    try:
        control = parse(ipv4.parse(packet).payload).control
    except TheirMistake:
        return False
    return control is not None and control.flags == SYN
