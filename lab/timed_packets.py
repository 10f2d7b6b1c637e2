"""When did packets pass an interface? A packet socket whose timestamps are the kernel's, and a thread that reads it.

The kernel takes the time when a packet enters the host, so neither the program that gets it nor this one, late as
they may be, changes it.
"""

from __future__ import annotations

import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from lab.hosts import Host
from lab.wire_counter import ETHERTYPE_IPV4, attach_filter, packet_statistics

SO_TIMESTAMPNS = 35
SO_RCVBUFFORCE = 33
POLL_S = 0.05
RECEIVE_BUFFER_BYTES = 64 << 20
_TIME = struct.Struct("@qq")

Filter = Sequence[tuple[int, int, int, int]]
"""Classic BPF: (code, jump if true, jump if false, constant) of each instruction."""


class TimedPackets(ABC):
    """Notes the IPv4 packets that pass `interface` of `host` and a filter, from now on.

    `kind` is SOCK_RAW (with Ethernet header) or SOCK_DGRAM; of each packet `snapped_bytes` are looked at. Owns a socket and a
    thread: close it or use `with`.
    """

    def __init__(self, host: Host, interface: str, kind: socket.SocketKind, filter: Filter, snapped_bytes: int) -> None:
        self._snapped_bytes = snapped_bytes
        self._socket = host.call(socket.socket, socket.AF_PACKET, kind, 0)
        attach_filter(self._socket, [*filter])
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        self._socket.bind((interface, ETHERTYPE_IPV4))
        self._socket.settimeout(POLL_S)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._read, name="timed-packets", daemon=True)
        self._thread.start()

    @abstractmethod
    def note(self, packet: bytes, at: float, where: Any) -> None:
        """A packet came, or went, at that second of the wall clock; `where`: its address as of AF_PACKET."""

    def missed(self) -> int:
        """Packets that came too fast to be noted, since this was last asked."""
        return packet_statistics(self._socket).dropped

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
        receive, note, size = self._socket.recvmsg, self.note, self._snapped_bytes
        space = socket.CMSG_SPACE(_TIME.size)
        while not self._closing.is_set():
            try:
                packet, control, _, where = receive(size, space)
            except TimeoutError:
                continue
            seconds, nanoseconds = _TIME.unpack(control[0][2])
            note(packet, seconds + nanoseconds / 1e9, where)
