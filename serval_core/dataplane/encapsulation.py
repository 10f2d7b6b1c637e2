"""How do packets inside UDP get in? Two real UDP sockets, on the ports of SPEC 8, for all that is no data of an open flow.

Such data is taken by the BPF programs before it gets here. Packets are sent through the raw socket, which writes any header.
The kernel has verified the UDP checksum of what comes out of these sockets.
"""

from __future__ import annotations

import socket
import struct
from errno import EADDRINUSE, EAGAIN, EINTR
from typing import NamedTuple

from serval_core.errors import KernelRefused
from serval_core.wire.encapsulation import PORTS
from serval_core.wire.ipv4 import OuterPorts

IP_PKTINFO = 8
SO_ATTACH_BPF = 50
_PACKET_INFO = struct.Struct("=I4s4s")  # interface, the address that the packet was delivered to, the one in its header
_BYTES_MAX = 65535
_PACKETS_PER_CALL = 64


class Received(NamedTuple):
    """A SAL packet that came inside UDP. `ports` as this host sees them."""

    payload: bytes
    source: int
    destination: int
    ports: OuterPorts
    interface_index: int
    broadcast: bool


class Encapsulation:
    """The sockets. `ports_in_use` names those that another program has: without both there is no encapsulation."""

    def __init__(self, filter_program_fd: int) -> None:
        """Raises KernelRefused."""
        self.sockets: list[socket.socket] = []
        self.ports_in_use: list[int] = []
        for port in PORTS:
            try:
                self._open(port, filter_program_fd)
            except OSError as error:
                if error.errno != EADDRINUSE:
                    self.close()
                    raise KernelRefused(f"open UDP port {port}", error.errno or 0, "") from error
                self.ports_in_use.append(port)
        if self.ports_in_use:
            self.close()

    def close(self) -> None:
        """Close the sockets."""
        while self.sockets:
            self.sockets.pop().close()

    def receive(self, own: socket.socket) -> list[Received]:
        """What waits in one of the sockets, 64 packets at most."""
        local_port = own.getsockname()[1]
        received = []
        for _ in range(_PACKETS_PER_CALL):
            try:
                payload, ancillary, _, (source, port) = own.recvmsg(_BYTES_MAX, 64)
            except OSError as error:
                if error.errno in (EAGAIN, EINTR):
                    break
                raise
            for level, kind, data in ancillary:
                if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
                    index, delivered_to, header = _PACKET_INFO.unpack_from(data)
                    received.append(
                        Received(
                            payload,
                            int.from_bytes(socket.inet_aton(source), "big"),
                            int.from_bytes(header, "big"),
                            OuterPorts(local_port, port),
                            index,
                            delivered_to != header,  # the kernel names an own address for a broadcast
                        )
                    )
        return received

    def _open(self, port: int, filter_program_fd: int) -> None:
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            own.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, filter_program_fd)
            own.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            own.bind(("", port))
        except OSError:
            own.close()
            raise
        self.sockets.append(own)
