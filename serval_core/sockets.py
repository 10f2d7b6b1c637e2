"""How does a native program use Serval? With sockets that behave like BSD sockets and have serviceIDs for addresses (SPEC 1.5).

    from serval_core import sockets

    server = sockets.socket(sockets.AF_SERVAL, sockets.SOCK_STREAM)
    server.bind("76568")
    server.listen()
    connection, _ = server.accept()          # on another host: client.connect("76568")

A stream socket *is* a kernel TCP socket once it is connected: `select`, `sendfile`, `ssl` and asyncio work with it as with any
other, and its `family` says AF_INET for that reason. Before that, and while it listens, its descriptor leads to the stack of this
network namespace (servald or a translator), which has to run and must let this user do what it asks (`access_policy`).

When the stack ends and another one starts, connections are reset; what listens, or is bound for datagrams, goes on by itself:
`accept`, `recvfrom` and `select` wait until the next stack has the same service again, at most `return_patience_s`.

An address is anything that `service_address` reads: "76568", "0xabcd:16", 76568, a ServiceID, a ServicePrefix, or a pair of one of
them and an IPv4 address, which skips resolution. Errors are OSErrors with the errno of SPEC 3.10 and one sentence.
"""

from __future__ import annotations

import errno
import os
import socket as system
from typing import Any

from serval_core.datagram_sockets import ServalDatagramSocket
from serval_core.native_client import DEFAULT_BACKLOG, StackSocket
from serval_core.service_address import ServiceAddress, service_address

__all__ = [
    "AF_SERVAL",
    "DEFAULT_BACKLOG",
    "SOCK_DGRAM",
    "SOCK_STREAM",
    "ServalDatagramSocket",
    "ServalSocket",
    "ServiceAddress",
    "create_connection",
    "create_server",
    "service_address",
    "socket",
]

AF_SERVAL = 28  # SPEC 1.1
SOCK_STREAM = system.SOCK_STREAM
SOCK_DGRAM = system.SOCK_DGRAM


class ServalSocket(StackSocket):
    """A stream socket of AF_SERVAL. Not safe for use by several threads before it is connected."""

    def __init__(self, fileno: int | None = None) -> None:
        """An unconnected socket; with `fileno` (taken) a connected kernel socket of a Serval flow.

        OSError (ENETDOWN) when no stack runs in this network namespace.
        """
        super().__init__(system.AF_INET, system.SOCK_STREAM, system.IPPROTO_TCP, fileno)

    def accept(self) -> tuple[ServalSocket, ServiceAddress]:
        """Wait for a connection: its socket and the address of its peer, whose serviceID is unknown (SPEC 1.5)."""
        reply, fd = self._accept()
        connection = ServalSocket(fd)._accepted(reply)
        return connection, connection.getpeername()

    def _adopt(self, fd: int) -> None:
        # The number of the descriptor stays: whoever has noted it means this socket.
        os.dup2(fd, self.fileno(), inheritable=self.get_inheritable())
        os.close(fd)
        self.settimeout(self.gettimeout())

    # Data is the kernel's business, except that a connect may have to be finished first.

    def send(self, data: Any, flags: int = 0, /) -> int:
        self._ready()
        return super().send(data, flags)

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        self._ready()
        super().sendall(data, flags)

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        self._ready()
        return super().recv(size, flags)

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        self._ready()
        return super().recv_into(buffer, nbytes, flags)

    def shutdown(self, how: int, /) -> None:
        self._ready()
        super().shutdown(how)


def socket(
    family: int = AF_SERVAL, type: int = SOCK_STREAM, protocol: int = 0
) -> ServalSocket | ServalDatagramSocket:
    """A Serval socket, as socket(2) would make it. OSError: EAFNOSUPPORT, ESOCKTNOSUPPORT, EPROTONOSUPPORT, ENETDOWN."""
    if family != AF_SERVAL:
        raise OSError(errno.EAFNOSUPPORT, f"this makes sockets of AF_SERVAL ({AF_SERVAL}) only")
    if type not in (SOCK_STREAM, SOCK_DGRAM):
        raise OSError(errno.ESOCKTNOSUPPORT, "a Serval socket is of type SOCK_STREAM or SOCK_DGRAM")
    if protocol not in (0, system.IPPROTO_TCP if type == SOCK_STREAM else system.IPPROTO_UDP):
        raise OSError(errno.EPROTONOSUPPORT, "a stream socket has protocol 0 or 6, a datagram socket 0 or 17")
    return ServalSocket() if type == SOCK_STREAM else ServalDatagramSocket()


def create_connection(address: Any, timeout_s: float | None = None) -> ServalSocket:
    """A socket that is connected to an instance of a service. OSError as `connect`."""
    connection = ServalSocket()
    try:
        connection.settimeout(timeout_s)
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def create_server(address: Any, backlog: int = DEFAULT_BACKLOG) -> ServalSocket:
    """A socket that listens on a serviceID or prefix. OSError as `bind`."""
    server = ServalSocket()
    try:
        server.bind(address)
        server.listen(backlog)
    except BaseException:
        server.close()
        raise
    return server


