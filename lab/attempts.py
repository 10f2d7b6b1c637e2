"""When did SYNs of Serval reach a host? A packet socket before its stack, with the kernel's timestamps."""

from __future__ import annotations

import socket
import struct
import threading
from types import TracebackType
from typing import Self

from lab.hosts import Host
from lab.wire_counter import attach_filter
from serval_core.errors import TheirMistake
from serval_core.wire import ipv4
from serval_core.wire.sal import PROTOCOL_SAL, SYN, parse

ETHERTYPE_IPV4 = 0x0800
SO_TIMESTAMPNS = 35
FRAME_BYTES = 65536
POLL_S = 0.05
_TIME = struct.Struct("@qq")
# Classic BPF on the IP packet of a SOCK_DGRAM socket: load 8 bits, jump if equal, return.
_ONLY_SAL = [(0x30, 0, 0, 9), (0x15, 0, 1, PROTOCOL_SAL), (0x06, 0, 0, FRAME_BYTES), (0x06, 0, 0, 0)]


class Attempts:
    """Notes the SYNs that come in through `interface` of `host`, from now on. Owns a socket and a thread."""

    def __init__(self, host: Host, interface: str) -> None:
        self.times: list[float] = []  # of arrival, seconds of the wall clock
        self._socket = host.call(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        attach_filter(self._socket, _ONLY_SAL)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.bind((interface, ETHERTYPE_IPV4))
        self._socket.settimeout(POLL_S)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, name="attempts", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop noting. What was noted stays."""
        self._closing.set()
        self._thread.join()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        space = socket.CMSG_SPACE(_TIME.size)
        while not self._closing.is_set():
            try:
                packet, control, _, where = self._socket.recvmsg(FRAME_BYTES, space)
            except TimeoutError:
                continue
            if where[2] != socket.PACKET_OUTGOING and _is_syn(packet):
                seconds, nanoseconds = _TIME.unpack(control[0][2])
                self.times.append(seconds + nanoseconds / 1e9)


def _is_syn(packet: bytes) -> bool:
    try:
        control = parse(ipv4.parse(packet).payload).control
    except TheirMistake:
        return False
    return control is not None and control.flags == SYN
