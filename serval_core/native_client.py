"""What do all native sockets of a program have in common? The way to the stack, and addresses made of serviceIDs.

Knows neither streams nor datagrams; the messages are those of `native_protocol`.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket as system
import time
from typing import Any, Self

import msgspec

from serval_core.names import (
    DEFAULT_SERVICE,
    ServiceID,
    ServicePrefix,
    format_address,
    parse_address,
)
from serval_core.native_protocol import (
    HOLD,
    HOLD_SEND_BUFFER_BYTES,
    MESSAGE_LIMIT_BYTES,
    Reply,
    Request,
    decode_reply,
    encode,
)
from serval_core.native_way import Return, reach_stack
from serval_core.service_address import ServiceAddress, service_address

DEFAULT_BACKLOG = 128
RETURN_PATIENCE_S = 60.0
DESCRIPTOR_BYTES = system.CMSG_LEN(array.array("i").itemsize)


class StackSocket(system.socket):
    """A socket whose descriptor leads to the stack, at least until it is connected.

    One that listens has an epoll descriptor in place of that, and the way to the stack behind it: when the stack comes back
    after its end there is another way, and whoever waits for the descriptor need not know. One that is bound for datagrams
    must also say when it is writable, which epoll cannot: there the descriptor's number stays, and what it stands for changes.
    """

    datagrams = False
    return_patience_s = RETURN_PATIENCE_S
    """How long a socket that serves something waits for a stack that has ended to come back."""

    def __init__(self, family: int, kind: int, protocol: int, fileno: int | None) -> None:
        """With `fileno` (taken) it is connected already. OSError (ENETDOWN) when no stack runs in this network namespace."""
        super().__init__(family, kind, protocol, reach_stack() if fileno is None else fileno)
        self._connected = fileno is not None
        self._listening = False
        self._backlog = 0  # of one that listens; 0: it is about to end
        self._random = False  # the stack has chosen the own serviceID
        self._inner: system.socket | None = None
        self._poller: select.epoll | None = None
        self._return: Return | None = None
        self._replies_due = 0  # to what was asked of a stack that has come back
        self._connecting: ServicePrefix | None = None
        self._local = ServiceAddress(ServicePrefix.of(DEFAULT_SERVICE, 0))
        self._remote: ServiceAddress | None = None
        self.flow_id = 0
        """The local flowID of a connected socket, as `serval flows` shows it."""
        self.failure = ""
        """Why a connect that did not block has failed, when SO_ERROR has said that it did."""
        self.settimeout(system.getdefaulttimeout())

    def _adopt(self, fd: int) -> None:
        """The connection is there, and with it perhaps a descriptor (-1: none)."""

    # -- serving --------------------------------------------------------------------------------------------------

    def bind(self, address: Any) -> None:
        """Take a serviceID, or all under a prefix; an empty one is replaced by a random serviceID.

        OSError: EADDRINUSE (somebody has it), EACCES (the stack's policy), EINVAL (no serviceID, or bound already).
        """
        service = "" if address in ("", None) else service_address(address).service
        request = (
            Request("bind", datagrams=self.datagrams)
            if isinstance(service, str)
            else Request("bind", service.service_id.hex(), service.bits, datagrams=self.datagrams)
        )
        reply = self._ask(request)
        self._random = isinstance(service, str)
        self._bound_to(reply)

    def _bound_to(self, reply: Reply) -> None:
        prefix = ServicePrefix.of(ServiceID(bytes.fromhex(reply.service)), reply.bits)
        self._local = ServiceAddress(prefix)

    def listen(self, backlog: int = DEFAULT_BACKLOG, /) -> None:
        """Accept connections; at most about `backlog` of them wait. Registers the service.

        A stream socket that listens already takes a backlog of 0: no more connections begin, clients ask another
        instance, and those under way can still be accepted. So a server ends without a client noticing.
        """
        if self._listening:
            if not backlog and not self.datagrams:
                self._backlog = 0
                self._tell(encode(Request("listen")))
            return
        if not self._local.service.bits:
            self.bind("")
        backlog = max(backlog, 1)
        self._ask(Request("listen", backlog=backlog, datagrams=self.datagrams))
        self._listening, self._backlog = True, backlog
        self._inner = system.socket(system.AF_UNIX, system.SOCK_SEQPACKET, 0, os.dup(self.fileno()))
        self._poller = select.epoll()
        self._poller.register(self._inner, select.EPOLLIN)
        os.dup2(self._poller.fileno(), self.fileno(), inheritable=self.get_inheritable())

    def _accept(self) -> tuple[Reply, int]:
        if not self._listening:
            raise OSError(errno.EINVAL, "the socket does not listen")
        if self._return is not None and not self._replies_due:
            self._come_back()
        self._way.settimeout(self.gettimeout())
        reply, fd = self._next_reply()
        if fd < 0:
            raise OSError(errno.EBADMSG, "the stack said something else than that there is a connection")
        return reply, fd

    def _accepted(self, reply: Reply) -> Self:
        """Name a connection that was just accepted: its service is known, its peer's is not."""
        service = ServicePrefix.of(ServiceID(bytes.fromhex(reply.service)))
        self._describe(reply, service, ServicePrefix.of(DEFAULT_SERVICE, 0))
        return self

    # -- connecting -----------------------------------------------------------------------------------------------

    def connect(self, address: Any, /) -> None:
        """Connect to an instance of a service. OSError as SPEC 3.10; BlockingIOError (EINPROGRESS) when it does not block.

        Then the socket becomes writable when the outcome is there, and `getsockopt(SOL_SOCKET, SO_ERROR)` tells it.
        """
        if self._connected:
            raise OSError(errno.EISCONN, os.strerror(errno.EISCONN))
        if self._listening:
            raise OSError(errno.EOPNOTSUPP, "the socket listens")
        if self._connecting is None:
            self._begin_connect(service_address(address))
            if self.gettimeout() == 0:
                raise BlockingIOError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))
        try:
            self._finish_connect()
        except BlockingIOError:
            raise BlockingIOError(errno.EALREADY, os.strerror(errno.EALREADY)) from None

    def connect_ex(self, address: Any, /) -> int:
        """Like `connect`, with the errno as its result."""
        try:
            self.connect(address)
        except TimeoutError as error:
            return error.errno or errno.EAGAIN
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def _begin_connect(self, where: ServiceAddress) -> None:
        service, hold = where.service, self.gettimeout() == 0
        request = Request(
            "connect",
            service.service_id.hex(),
            destination=parse_address(where.address) if where.address else 0,
            datagrams=self.datagrams,
            hold=hold,
        )
        if hold:
            self.setsockopt(system.SOL_SOCKET, system.SO_SNDBUF, HOLD_SEND_BUFFER_BYTES)
        self._tell(encode(request))
        if hold:
            self._tell(HOLD)
        self._connecting = service

    def _finish_connect(self) -> None:
        """Take the outcome. BlockingIOError or TimeoutError: it is not there yet."""
        service = self._connecting
        assert service is not None
        try:
            reply, fd = self._next_reply()
        except (BlockingIOError, TimeoutError):
            raise
        except OSError:
            self._connecting = None
            raise
        self._connecting = None
        self._connected = True
        self._adopt(fd)
        self._describe(reply, self._local.service, service)

    def getsockopt(self, level: int, option: int, *arguments: Any) -> Any:
        """As of any socket; SO_ERROR finishes a connect under way."""
        if self._connecting is not None and (level, option) == (system.SOL_SOCKET, system.SO_ERROR):
            timeout = self.gettimeout()
            self.setblocking(False)
            try:
                self._finish_connect()
            except BlockingIOError:
                return 0
            except OSError as error:
                self.failure = error.strerror or ""
                return error.errno
            finally:
                self.settimeout(timeout)
        return system.socket.getsockopt(self._way, level, option, *arguments)

    def setsockopt(self, *arguments: Any) -> None:
        """As of any socket."""
        system.socket.setsockopt(self._way, *arguments)

    def close(self) -> None:
        """As of any socket."""
        super().close()
        if self._inner is not None and self._poller is not None:
            self._poller.close()
            self._inner.close()

    # -- names ----------------------------------------------------------------------------------------------------

    def getsockname(self) -> ServiceAddress:
        """The own service (for an accepted connection the exact one that was asked for) and address."""
        return self._local

    def getpeername(self) -> ServiceAddress:
        """The peer's service ("default" when it is unknown) and address. OSError ENOTCONN."""
        self._settle()
        if self._remote is None:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        return self._remote

    def _describe(self, reply: Reply, local: ServicePrefix, remote: ServicePrefix) -> None:
        self._local = ServiceAddress(local, format_address(reply.local_address))
        self._remote = ServiceAddress(remote, format_address(reply.peer_address))
        self.flow_id = reply.flow_id

    def _settle(self) -> None:
        if self._connecting is not None:
            self._finish_connect()

    def _ready(self) -> None:
        """Raise ENOTCONN unless it is connected, or a connect that did not block has succeeded meanwhile."""
        if not self._connected:
            self._settle()
            if not self._connected:
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    # -- talking to the stack -----------------------------------------------------------------------------------------

    @property
    def _way(self) -> system.socket:
        """What leads to the stack."""
        return self if self._inner is None else self._inner

    def _tell(self, message: bytes) -> None:
        try:
            system.socket.send(self._way, message, system.MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            # It may have said why before it closed.
            self._next_reply()
            raise

    def _ask(self, request: Request) -> Reply:
        """A request that the stack answers at once, whatever the socket's timeout is."""
        timeout = self.gettimeout()
        self.settimeout(None)
        try:
            self._tell(encode(request))
            return self._next_reply()[0]
        finally:
            self.settimeout(timeout)

    def _next_reply(self) -> tuple[Reply, int]:
        """What the stack says next, with the descriptor that came along or -1. Raises the OSError that it reports."""
        try:
            message, ancillary = self._receive()
        except ConnectionResetError:
            # It closed before it had read everything; what it said before that is still there.
            message, ancillary = self._receive()
        if not message:
            self._stack_is_gone()
            return self._next_reply()
        fd = _descriptor(ancillary)
        try:
            reply = decode_reply(message)
        except msgspec.DecodeError as error:
            raise OSError(errno.EPROTO, f"the stack speaks another language: {error}") from None
        if self._replies_due:
            self._returned(reply)
            return self._next_reply()
        if reply.errno:
            raise OSError(reply.errno, reply.error)
        return reply, fd

    def _receive(self) -> tuple[bytes, list[tuple[int, int, bytes]]]:
        message, ancillary, _, _ = system.socket.recvmsg(
            self._way, MESSAGE_LIMIT_BYTES, DESCRIPTOR_BYTES, system.MSG_CMSG_CLOEXEC
        )
        return message, ancillary

    # -- when the stack has ended -------------------------------------------------------------------------------------

    @property
    def _serves(self) -> bool:
        return self._listening and self._backlog > 0

    def _stack_is_gone(self) -> None:
        """Come back to the next one if this socket serves something, or else raise ENETDOWN. OSError as `_come_back`."""
        if not self._serves:
            self._lead_nowhere()
            raise OSError(errno.ENETDOWN, "the Serval stack of this network namespace has ended")
        if self._return is None:
            self._return = Return(self.return_patience_s)
        elif self._replies_due:
            self._replies_due = 0
            self._return.failed()
        self._come_back()

    def _come_back(self) -> None:
        """Reach the stack again, and ask for what we had. Waits as long as the socket's timeout says.

        OSError: BlockingIOError and TimeoutError (it is not back yet); ENETDOWN or EPERM when patience is over.
        """
        timeout, returning = self.gettimeout(), self._return
        assert returning is not None
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._reached(returning):
            self._put(returning.timer())
            wait_s = returning.due - time.monotonic()
            if deadline is not None and deadline - time.monotonic() < wait_s:
                if timeout == 0:
                    raise BlockingIOError(errno.EAGAIN, "the Serval stack is away")
                time.sleep(max(0.0, deadline - time.monotonic()))
                raise TimeoutError("timed out")
            time.sleep(max(0.0, wait_s))
        service = self._local.service
        if self._random and not self._listening:
            requests = [Request("bind", datagrams=self.datagrams)]
        else:
            requests = [Request("bind", service.service_id.hex(), service.bits, datagrams=self.datagrams)]
        if self._listening:
            requests.append(Request("listen", backlog=self._backlog, datagrams=self.datagrams))
        self._replies_due = len(requests)
        for request in requests:
            # If it is gone again, what is read next says so.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                system.socket.send(self._way, encode(request), system.MSG_NOSIGNAL)

    def _reached(self, returning: Return) -> bool:
        """Make the attempt that is due, if one is. Raises its OSError when there is none after it."""
        if returning.due > time.monotonic():
            return False
        try:
            self._put(reach_stack(wait=False))
        except OSError:
            if returning.over:
                self._give_up()
                raise
            returning.failed()
            return False
        return True

    def _returned(self, reply: Reply) -> None:
        """An answer of the stack that we have come back to. Raises the OSError that it reports."""
        if reply.errno:
            self._give_up()
            raise OSError(reply.errno, f"after the stack came back: {reply.error}")
        if reply.service:
            self._bound_to(reply)
        self._replies_due -= 1
        if not self._replies_due:
            self._return = None

    def _give_up(self) -> None:
        self._return, self._replies_due, self._backlog = None, 0, 0
        self._lead_nowhere()

    def _lead_nowhere(self) -> None:
        """The descriptor is never readable from now on, or an event loop would not rest."""
        self._put(os.eventfd(0, os.EFD_CLOEXEC))

    def _put(self, fd: int) -> None:
        """Have the way lead there; takes `fd`."""
        way = self._way
        os.dup2(fd, way.fileno(), inheritable=way.get_inheritable())
        os.close(fd)
        if self._poller is not None:
            self._poller.register(way, select.EPOLLIN)
        way.settimeout(self.gettimeout())


def _descriptor(ancillary: list[tuple[int, int, bytes]]) -> int:
    for level, kind, data in ancillary:
        if (level, kind) == (system.SOL_SOCKET, system.SCM_RIGHTS):
            return int(array.array("i", data)[0])
    return -1
