"""How does a native program send and receive Serval datagrams (SPEC 4.6)? With a socket of type SOCK_DGRAM.

Unconnected, `sendto` resolves the service of each datagram anew, and `recvfrom` tells the serviceID and address that one came from.
`connect`, and `listen` and `accept`, open a flow, as a stream does, on which `send` and `recv` work; a peer that has closed it
reads as an empty datagram. The descriptor is that of a Unix socket to the stack: `select` works, options of UDP do not.
"""

from __future__ import annotations

import errno
import os
import select
import socket as system
from typing import Any, NamedTuple

from serval_core.names import DEFAULT_SERVICE, ServiceID, ServicePrefix, format_address, parse_address
from serval_core.native_client import StackSocket
from serval_core.native_protocol import (
    DATAGRAM,
    DATAGRAM_LIMIT_BYTES,
    DATAGRAM_MARK,
    FLOW_DATAGRAM_LIMIT_BYTES,
    JSON_MARK,
    MESSAGE_LIMIT_BYTES,
    Reply,
    decode_reply,
)
from serval_core.service_address import ServiceAddress, service_address


class Received(NamedTuple):
    """A datagram with all that is known of it. `service`: the one of ours that it was sent to."""

    payload: bytes
    source: ServiceAddress
    service: ServiceID
    interface_index: int


class ServalDatagramSocket(StackSocket):
    """A datagram socket of AF_SERVAL.

    What goes wrong with a datagram after `sendto` (no rule for its service, a host that refuses it) is reported by SO_ERROR and by
    the next `sendto`, not by `recvfrom`: one client that is gone must not trouble a server.
    """

    datagrams = True

    def __init__(self, fileno: int | None = None) -> None:
        """An unbound socket; with `fileno` (taken) one that was accepted. OSError (ENETDOWN) when no stack runs here."""
        super().__init__(system.AF_UNIX, system.SOCK_SEQPACKET, 0, fileno)
        self._bound = False
        self._pending_errno = 0
        self._pending_error = ""

    def bind(self, address: Any) -> None:
        """Receive datagrams for a serviceID, or for all under a prefix. OSError as for streams."""
        super().bind(address)
        self._bound = True

    def accept(self) -> tuple[ServalDatagramSocket, ServiceAddress]:
        """Wait for a flow: its socket and the address of its peer."""
        reply, fd = self._accept()
        flow = ServalDatagramSocket(fd)._accepted(reply)
        return flow, flow.getpeername()

    # -- unconnected --------------------------------------------------------------------------------------------------

    def sendto(self, payload: Any, *arguments: Any) -> int:
        """`sendto(payload, address)` or `sendto(payload, flags, address)`. An address with an IPv4 address skips resolution.

        An unbound socket is bound to a random serviceID first. OSError: EMSGSIZE, EINVAL (empty; SPEC 3.10), or what has gone wrong
        with an earlier datagram.
        """
        return self.send_as(None, payload, arguments[-1])

    def send_as(self, service: ServiceID | None, payload: Any, address: Any) -> int:
        """`sendto` from one of the services of a socket that is bound to a prefix."""
        if self._connected:
            raise OSError(errno.EISCONN, os.strerror(errno.EISCONN))
        where = service_address(address)
        data = _checked(payload, DATAGRAM_LIMIT_BYTES)
        if not self._bound:
            self.bind("")
        self.raise_failure()
        destination = parse_address(where.address) if where.address else 0
        self._send_off(
            DATAGRAM.pack(DATAGRAM_MARK, destination, 0, where.service.service_id, service or DEFAULT_SERVICE) + data
        )
        return len(data)

    def _send_off(self, message: bytes) -> None:
        """To the stack that there is, or to the next one."""
        try:
            if self._return is not None and not self._replies_due:
                self._come_back()
            try:
                system.socket.send(self, message, system.MSG_NOSIGNAL)
            except (BrokenPipeError, ConnectionResetError):
                self._stack_is_gone()
                system.socket.send(self, message, system.MSG_NOSIGNAL)
        except BlockingIOError:
            if self._return is None:
                raise
            raise OSError(errno.ENETDOWN, "the Serval stack of this network namespace is away") from None

    @property
    def _serves(self) -> bool:
        if self._listening:
            return super()._serves
        return self._bound and not self._connected and self._connecting is None

    def recvfrom(self, size: int, flags: int = 0) -> tuple[bytes, ServiceAddress]:
        """The next datagram and where it came from; what is beyond `size` bytes of it is lost."""
        received = self.receive(flags)
        return received.payload[:size], received.source

    def receive(self, flags: int = 0) -> Received:
        """The next datagram, whole, with everything that is known of it. An empty payload: the peer has closed the flow."""
        while True:
            if self._return is not None and not self._replies_due:
                self._come_back()
            try:
                message = system.socket.recv(self, DATAGRAM.size + FLOW_DATAGRAM_LIMIT_BYTES, flags)
            except ConnectionResetError:
                # The stack has ended before it had read everything; what it said before that is still there.
                message = system.socket.recv(self, DATAGRAM.size + FLOW_DATAGRAM_LIMIT_BYTES, flags)
            if not message:
                if not self._connected:
                    self._stack_is_gone()
                    continue
                self._raise_if_gone()
                return Received(b"", self.getpeername(), DEFAULT_SERVICE, 0)
            if message[0] != JSON_MARK:
                break
            reply = decode_reply(message)
            if self._connected:
                raise OSError(reply.errno, reply.error)
            if flags & system.MSG_PEEK:
                system.socket.recv(self, MESSAGE_LIMIT_BYTES)
            if self._replies_due:
                self._returned(reply)
            else:
                self._pending_errno, self._pending_error = reply.errno, reply.error
        _, address, interface_index, source, service = DATAGRAM.unpack_from(message)
        where = ServiceAddress(ServicePrefix.of(ServiceID(source)), format_address(address) if address else "")
        return Received(message[DATAGRAM.size :], where, ServiceID(service), interface_index)

    # -- connected ----------------------------------------------------------------------------------------------------

    def send(self, payload: Any, flags: int = 0, /) -> int:
        """To the peer of the flow."""
        self._ready()
        data = _checked(payload, FLOW_DATAGRAM_LIMIT_BYTES)
        self._tell(DATAGRAM.pack(DATAGRAM_MARK, 0, 0, DEFAULT_SERVICE, DEFAULT_SERVICE) + data)
        return len(data)

    def sendall(self, payload: Any, flags: int = 0, /) -> None:
        """A datagram is sent whole or not at all."""
        self.send(payload, flags)

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """The next datagram of the flow; empty at its end."""
        self._ready()
        return self.receive(flags).payload[:size]

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """`recv` into a buffer."""
        view = memoryview(buffer).cast("B")
        payload = self.recv(nbytes or len(view), flags)
        view[: len(payload)] = payload
        return len(payload)

    def _raise_if_gone(self) -> None:
        """A peer that has closed the flow reads as the end of one direction; a stack that has ended closes both."""
        ending = select.poll()
        ending.register(self, 0)
        if any(events & select.POLLHUP for _, events in ending.poll(0)):
            raise OSError(errno.ECONNRESET, "the Serval stack of this network namespace has ended")

    # -- errors -------------------------------------------------------------------------------------------------------

    def getsockopt(self, level: int, option: int, *arguments: Any) -> Any:
        """As of any socket; SO_ERROR also tells what has gone wrong with a datagram, once."""
        if (level, option) == (system.SOL_SOCKET, system.SO_ERROR) and self._pending_errno:
            code, self._pending_errno = self._pending_errno, 0
            return code
        return super().getsockopt(level, option, *arguments)

    def raise_failure(self) -> None:
        """Raise what has gone wrong with a datagram, once."""
        if self._pending_errno:
            code, self._pending_errno = self._pending_errno, 0
            raise OSError(code, self._pending_error)

    def _next_reply(self) -> tuple[Reply, int]:
        """Datagrams that came before the stack's answer are lost: the socket becomes another one."""
        while True:
            head = system.socket.recv(self._way, MESSAGE_LIMIT_BYTES, system.MSG_PEEK)
            if not head:
                return super()._next_reply()
            if head[0] == JSON_MARK:
                reply = decode_reply(head)
                if not reply.datagram:
                    return super()._next_reply()
                self._pending_errno, self._pending_error = reply.errno, reply.error
            system.socket.recv(self._way, 1)


def _checked(payload: Any, limit_bytes: int) -> bytes:
    data = bytes(payload)
    if not data:
        raise OSError(errno.EINVAL, "a Serval datagram has at least one byte")
    if len(data) > limit_bytes:
        raise OSError(errno.EMSGSIZE, f"a Serval datagram has at most {limit_bytes} bytes here, not {len(data)}")
    return data
